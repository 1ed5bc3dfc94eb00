"""Merge partial attention outputs by their log-sum-exp, exactly, on CPU and CUDA.

>>> import torch
>>> from merge_attn_states import merge_attn_states
>>> prefix_output, suffix_output = torch.randn(2, 4, 8, 64)  # [num_tokens, num_heads, head_size]
>>> prefix_lse, suffix_lse = torch.randn(2, 8, 4)  # [num_heads, num_tokens], natural log
>>> output = torch.empty_like(suffix_output)
>>> merge_attn_states(output, prefix_output, prefix_lse, suffix_output, suffix_lse)
"""

import sys

from ._errors import UnavailableError
from ._library import build_info, load_op_library

try:
    load_op_library()
except ImportError as error:
    # `python -m merge_attn_states` imports this file first; its user gets the message alone.
    runs_module = "-m" in sys.orig_argv and sys.argv[:1] == ["-m"]
    if runs_module and sys.orig_argv[sys.orig_argv.index("-m") + 1] == "merge_attn_states":
        raise SystemExit(str(error)) from None
    raise

from .ops import SelectedKernel, merge_attn_states, selected_kernel
from .states import merge_states, update_state

__all__ = [
    "SelectedKernel",
    "UnavailableError",
    "__version__",
    "build_info",
    "merge_attn_states",
    "merge_states",
    "selected_kernel",
    "update_state",
]

__version__: str = build_info()["version"]
