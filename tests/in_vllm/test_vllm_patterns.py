"""Every way in which vLLM's backends call the merge, through this package's function."""

import pytest
import torch
from support import cloned, compare

from in_vllm.patterns import PATTERNS
from merge_attn_states import merge_attn_states


@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda pattern: pattern.name)
@pytest.mark.parametrize("tokens", [5, 128])  # fewer than a tile's, and several tiles
def test_every_pattern_is_right(pattern, tokens, device):
    operands = pattern.make(tokens, torch.device(device))
    before = cloned(operands)
    pattern.call(merge_attn_states, operands)
    compare(before, operands.output, operands.output_lse)
