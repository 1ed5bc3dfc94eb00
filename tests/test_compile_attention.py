"""The op in the middle of a compiled attention layer: the same result, one graph, no copy."""

import ast
from collections import Counter

import pytest
import torch
from support import BF16, F32, assert_bits
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor.utils import run_and_get_code

from merge_attn_states import merge_attn_states as merge

HEADS, HEAD_SIZE = 4, 32
WIDTH = HEADS * HEAD_SIZE
MERGE = "torch.ops.merge_attn_states.merge_attn_states.default"


# PyTorch's own kernels: the graph then holds what a model without this package has.
def flash(query, key, value, is_causal):
    """PyTorch's kernels, which inductor calls as they are."""
    aten, args = torch.ops.aten, (query[None], key[None], value[None], 0.0, is_causal)
    if query.device.type == "cpu":
        output, lse = aten._scaled_dot_product_flash_attention_for_cpu(*args)
    else:
        output, lse, *_ = aten._scaled_dot_product_flash_attention(*args)
    return output[0], lse[0]


def matmul(query, key, value, is_causal):
    """The definition, for which inductor generates kernels and chooses layouts."""
    scores = query @ key.mT * HEAD_SIZE**-0.5
    if is_causal:
        seen = torch.ones_like(scores[0], dtype=torch.bool).tril()
        scores = scores.masked_fill(~seen, -torch.inf)
    return scores.softmax(-1) @ value, scores.logsumexp(-1)


def fresh(prefix, prefix_lse, suffix, suffix_lse):
    output, output_lse = torch.empty_like(suffix), torch.empty_like(suffix_lse)
    merge(output, prefix, prefix_lse, suffix, suffix_lse, output_lse)
    return output, output_lse


def in_place(prefix, prefix_lse, suffix, suffix_lse):
    merge(suffix, prefix, prefix_lse, suffix, suffix_lse, suffix_lse)
    return suffix, suffix_lse


def in_place_beside_a_copy(prefix, prefix_lse, suffix, suffix_lse):
    kept = suffix.clone()  # no compiler can leave it out: it is returned as it was before
    return *in_place(prefix, prefix_lse, suffix, suffix_lse), kept


def left_out(prefix, prefix_lse, suffix, suffix_lse):
    return suffix, suffix_lse, prefix, prefix_lse  # all are returned, so that all are computed


class Attention(torch.nn.Module):
    """New tokens attend to cached keys and, causally, to their own; `join` makes one of both."""

    def __init__(self, attend, join):
        super().__init__()
        self.attend, self.join = attend, join
        # No bias: inductor may add it in a kernel of its own, with another rounding.
        self.query, self.key, self.value, self.out = (
            torch.nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4)
        )

    def forward(self, tokens, cached_key, cached_value):
        projected = (project(tokens) for project in (self.query, self.key, self.value))
        query, key, value, cached_key, cached_value = (
            x.unflatten(1, (HEADS, HEAD_SIZE)).transpose(0, 1)
            for x in (*projected, cached_key, cached_value)
        )
        prefix, prefix_lse = self.attend(query, cached_key, cached_value, False)
        suffix, suffix_lse = self.attend(query, key, value, True)
        rows = prefix.transpose(0, 1), prefix_lse, suffix.transpose(0, 1), suffix_lse
        output, *others = self.join(*rows)
        return self.out(output.flatten(1)), *others


def make(attend, join, device):
    if attend is flash and device == "cuda" and torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("PyTorch's flash kernel needs compute capability 8")
    return Attention(attend, join).to(device, BF16 if attend is flash else F32)


def inputs(layer, tokens, cached):
    return [torch.randn(n, WIDTH).to(layer.out.weight) for n in (tokens, cached, cached)]


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("join", [fresh, in_place])
@pytest.mark.parametrize("attend", [flash, matmul])
@torch.no_grad()
def test_compiled_as_eager_in_one_graph(attend, join, backend, device):
    torch._dynamo.reset()
    layer = make(attend, join, device)
    counter = CompileCounterWithBackend(backend)
    run = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)
    for sizes in ((6, 10), (9, 5)):  # a second size without a second graph
        operands = inputs(layer, *sizes)
        for actual, expected in zip(run(*operands), layer(*operands), strict=True):
            if attend is flash:  # the same kernels in both modes
                assert_bits(actual, expected)
            else:  # inductor sums a softmax in its own order: 8 ulp of the largest value, an LSE
                torch.testing.assert_close(actual, expected, rtol=0, atol=2e-6)
    assert counter.frame_count == 1


def generated_calls(attend, join, device):
    """All calls in the code that inductor makes of the layer, by the function's name."""
    layer = make(attend, join, device)
    # Without reuse of memory each buffer has one name and is allocated where it can be counted.
    options = {"allow_buffer_reuse": False, "inplace_buffers": False}
    run = torch.compile(layer, fullgraph=True, dynamic=True, options=options)
    _, [code] = run_and_get_code(run, *inputs(layer, 6, 10))
    calls = (node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call))
    return [(ast.unparse(call.func), call) for call in calls]


def added(join, device):
    """Which calls the layer has more than the one without a merge, and how many."""
    names = Counter(name for name, _ in generated_calls(flash, join, device))
    names.subtract(name for name, _ in generated_calls(flash, left_out, device))
    # Views and assertions move no data.
    return {k: n for k, n in names.items() if n and not k.startswith(("reinterpret_", "assert_"))}


@torch.no_grad()
def test_nothing_but_the_merge_is_added(device):
    allocate = f"empty_strided_{device}"
    assert added(fresh, device) == {MERGE: 1, allocate: 2}  # its two outputs
    assert added(in_place, device) == {MERGE: 1}
    with_copy = added(in_place_beside_a_copy, device)  # a copy would show
    assert with_copy[MERGE] == with_copy[allocate] == 1
    assert any("_fused_" in name for name in with_copy), "the generated kernel that copies"


@pytest.mark.parametrize("join", [fresh, in_place])
@torch.no_grad()
def test_the_merge_takes_the_buffers_of_the_matmuls(join, device):
    """Counts say nothing here: inductor fuses the kernels around the merge anew in each graph."""
    calls = generated_calls(matmul, join, device)
    [operands] = [call.args for name, call in calls if name == MERGE]
    output, prefix, _, suffix = (  # buf1 or reinterpret_tensor(buf1, ...)
        next(node.id for node in ast.walk(x) if getattr(node, "id", "").startswith("buf"))
        for x in operands[:4]
    )
    bmms = [call.keywords for name, call in calls if name == "extern_kernels.bmm"]
    assert {prefix, suffix} <= {ast.unparse(out.value) for [out] in bmms}
    assert (output == suffix) if join is in_place else (output not in (prefix, suffix))
