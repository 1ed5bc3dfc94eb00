"""docs/compatibility.md: its table is the data of these tests, and its code runs."""

import math
import re
import warnings
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from support import BF16, F16, F32, F64, INF

from merge_attn_states import merge_states, update_state
from merge_attn_states.integrations.pytorch import attention_with_lse

TEXT = (Path(__file__).parents[1] / "docs" / "compatibility.md").read_text(encoding="utf-8")
TABLE = TEXT[TEXT.index("<!-- producers:begin -->") : TEXT.index("<!-- producers:end -->")]
BATCH, TOKENS, GROUPS, HEADS, SIZE = 2, 6, 3, 5, 16  # each another number: no mix-up fits
NATURAL = {"e": 1.0, "2": math.log(2)}
EMPTY = 2  # the token that sees no key of the first part


class Producer(NamedTuple):
    name: str
    out: str
    lse: str
    base: str
    without_keys: str
    outputs: str
    lses: str

    def views(self, out, lse):
        names = {"out": out, "lse": lse}
        return eval(self.outputs.strip("`"), names), eval(self.lses.strip("`"), names)


PRODUCERS = {
    row[0]: row
    for line in TABLE.splitlines()[4:]
    if line.startswith("|")
    for row in [Producer(*(cell.strip() for cell in line.strip("|").split(" | ")))]
}


def laid(values: torch.Tensor, layout: str) -> torch.Tensor:
    """[B, S, G, H, D], or without D, as the table's layout has it, in memory of its own."""
    axes = layout.strip("[]").split(", ")
    names = ["B", "S", "G", "H", "D"][: values.dim()]
    if "T" in axes:
        values, names = values.flatten(0, 1), ["T", *names[2:]]
    if "G" not in axes:
        at = names.index("G")
        values, names = values.select(at, 0), [name for name in names if name != "G"]
    order = [axis[0] for axis in axes if axis != "1"]
    values = values.permute(*map(names.index, order)).contiguous()
    if "S32" in axes:
        values = torch.nn.functional.pad(values, (0, -TOKENS % 32), value=INF)
    return values[..., None] if axes[-1] == "1" else values


def parts_and_whole(base):
    """Attention over two halves of the keys and over all, in float64, as [B, S, G, H, D]."""
    keys = 8
    query = torch.randn(BATCH, GROUPS, HEADS, TOKENS, SIZE, dtype=F64)
    key, value = torch.randn(2, BATCH, GROUPS, HEADS, keys, SIZE, dtype=F64)
    scores = query @ key.mT
    scores[..., EMPTY, : keys // 2] = -INF

    def attend(some):
        lse = scores[..., some].logsumexp(-1)
        out = (scores[..., some] - lse[..., None]).exp() @ value[..., some, :]
        return out.permute(0, 3, 1, 2, 4), lse.permute(0, 3, 1, 2) / NATURAL[base]

    return [attend(slice(0, keys // 2)), attend(slice(keys // 2, keys)), attend(slice(0, keys))]


def test_the_table_is_read():
    assert len(PRODUCERS) == TABLE.count("\n| ") - 2
    assert {row.base for row in PRODUCERS.values()} == {"e", "2"}


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("name", PRODUCERS)
def test_parts_in_the_layout_of(name, dtype):
    producer = PRODUCERS[name]
    *parts, whole = (
        (laid(out, producer.out), laid(lse.float(), producer.lse))
        for out, lse in parts_and_whole(producer.base)
    )
    expected, expected_lse = producer.views(*whole)
    viewed = [producer.views(out.to(dtype), lse) for out, lse in parts]
    first_lse = viewed[0][1]
    empty = first_lse == -INF
    assert empty.any()
    viewed[0][0][empty.reshape(viewed[0][0].shape[:-1])] = torch.nan  # nobody may use it
    masks = None
    if producer.without_keys in ("+inf", "0.0"):
        first_lse[empty] = float(producer.without_keys)
    if producer.without_keys == "0.0":
        masks = [empty, None]
    outputs, lses = map(list, zip(*viewed, strict=True))
    out, lse = merge_states(outputs, lses, lse_base=producer.base, empty=masks)
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == F32 else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(out.to(F64), expected, **tolerance)
    torch.testing.assert_close(lse, expected_lse.reshape(lse.shape), rtol=1e-6, atol=1e-6)

    state, of_state = torch.full_like(out, torch.nan, dtype=F32), torch.full_like(lse, -INF)
    for k, (block, of_block) in enumerate(viewed):
        mask = masks[k] if masks else None
        update_state(state, of_state, block, of_block, empty=mask, lse_base=producer.base)
    torch.testing.assert_close(state.to(F64), expected, **tolerance)
    torch.testing.assert_close(of_state, lse, rtol=1e-6, atol=1e-6)


aten = torch.ops.aten


def of_flex(query, key, value, mask=None):
    flex = pytest.importorskip("torch.nn.attention.flex_attention")
    if not hasattr(flex, "AuxRequest"):
        pytest.skip("this PyTorch has no AuxRequest")
    blocks = None
    if mask is not None:
        batch, heads, tokens, keys = *query.shape[:3], key.shape[2]
        blocks = flex.create_block_mask(
            lambda b, h, q, k: mask[q, k], batch, heads, tokens, keys, device=query.device
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # eager on purpose: what is compiled is the same function
        out, aux = flex.flex_attention(
            query, key, value, block_mask=blocks, return_aux=flex.AuxRequest(lse=True)
        )
    return out, aux.lse


def of_cpu(query, key, value, mask=None):
    if mask is not None:
        mask = torch.zeros(mask.shape, dtype=query.dtype).masked_fill(~mask, -INF)
    return aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, False, attn_mask=mask
    )


ON_THE_CPU = {
    "PyTorch `flex_attention(return_aux=AuxRequest(lse=True))`": of_flex,
    "PyTorch `_scaled_dot_product_flash_attention_for_cpu`": of_cpu,
    "this package's `attention_with_lse`": attention_with_lse,
}
ON_CUDA = {
    "PyTorch `_scaled_dot_product_flash_attention`, CUDA": (
        lambda *qkv: aten._scaled_dot_product_flash_attention(*qkv)[:2]
    ),
    "PyTorch `_scaled_dot_product_efficient_attention(compute_log_sumexp=True)`": (
        lambda *qkv: aten._scaled_dot_product_efficient_attention(*qkv, None, True)[:2]
    ),
    "PyTorch `_scaled_dot_product_cudnn_attention(compute_log_sumexp=True)`": (
        lambda *qkv: aten._scaled_dot_product_cudnn_attention(*qkv, None, True)[:2]
    ),
}


def queries_keys_values(dtype, device="cpu"):
    query = torch.randn(BATCH, HEADS, TOKENS, 64)
    keys = torch.randn(2, BATCH, HEADS, 8, 64)
    return [x.to(dtype).to(device) for x in (query, *keys)]


def check_layout(producer, out, lse, query, key):
    scores = query.to(F64) @ key.to(F64).mT * query.shape[3] ** -0.5
    assert lse.dtype == F32
    by_token = scores.logsumexp(-1).transpose(1, 2)[:, :, None].cpu()
    expected = laid(by_token / NATURAL[producer.base], producer.lse)
    assert out.shape == query.shape
    assert lse.shape == expected.shape
    torch.testing.assert_close(lse.cpu().to(F64), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ON_THE_CPU)
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_what_pytorch_gives_on_the_cpu(name, dtype):
    producer, attend = PRODUCERS[name], ON_THE_CPU[name]
    query, key, value = queries_keys_values(dtype)
    out, lse, *_ = attend(query, key, value)
    check_layout(producer, out, lse, query, key)
    mask = torch.ones(TOKENS, key.shape[2], dtype=torch.bool)
    mask[EMPTY] = False
    _, lse, *_ = attend(query, key, value, mask)
    assert (lse[:, :, EMPTY] == float(producer.without_keys)).all()


@pytest.mark.parametrize("name", ON_CUDA)
def test_what_pytorch_gives_on_cuda(name, cuda):
    query, key, value = queries_keys_values(F16, cuda)
    out, lse = ON_CUDA[name](query, key, value)
    check_layout(PRODUCERS[name], out, lse, query, key)


BLOCKS = re.findall(r"^```python\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)


def test_the_code_runs_and_the_step_before_is_the_step_after():
    before, after = BLOCKS
    names = {}
    exec(before, names)
    exec(after, names)
    out, lse = torch.zeros(2, 6, 5, 16), torch.full((2, 6, 5, 1), -1e30)
    state, of_state = out.clone(), torch.full((2, 6, 5, 1), -INF)
    for _ in range(3):
        block_out, block_lse = torch.randn(2, 6, 5, 16).to(BF16), torch.randn(2, 5, 6)
        out, lse = names["step"](out, lse, block_out, block_lse)
        update_state(state, of_state, block_out, block_lse.transpose(1, 2))
    torch.testing.assert_close(state, out)
    torch.testing.assert_close(of_state, lse)
