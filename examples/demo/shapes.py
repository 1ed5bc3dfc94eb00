"""The demo's second half: attention in two parts at the head shapes of named models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

import merge_attn_states
from merge_attn_states.integrations.pytorch import (
    attention_kernel,
    attention_with_lse,
    token_layout,
)

from .report import REPEATS, fastest_microseconds, table

_SAMPLED_ROWS = 12
_SAMPLED_HEADS = 3


class Case(NamedTuple):
    """Heads are those of one GPU; the CPU has smaller numbers of tokens, nothing else differs."""

    model: str
    kind: str  # "chunked prefill" or "shared prefix"
    heads: int
    kv_heads: int
    head_size: int
    value_head_size: int
    context: int  # keys of the prefix
    tokens: int  # of the chunk; of the requests that share the prefix
    own: int = 0  # shared prefix: keys of each request's own


_MODELS = [  # name, kind, heads, KV heads, head size, value head size
    ("Llama-3 8B", "chunked prefill", 32, 8, 128, 128),
    ("DeepSeek-V3 TP8", "chunked prefill", 16, 16, 192, 128),
    ("Gemma-3 12B", "chunked prefill", 16, 8, 256, 256),
    ("Phi-3-mini", "chunked prefill", 32, 32, 96, 96),
    ("Qwen3-235B TP4", "shared prefix", 16, 1, 128, 128),
    ("Llama-3 70B TP8", "shared prefix", 8, 1, 128, 128),
    ("DeepSeek-V3 TP8, absorbed", "shared prefix", 16, 1, 576, 512),
]


def cases(device: torch.device) -> list[Case]:
    """What is run there; on two cores all of it takes half a minute."""
    on_gpu = device.type == "cuda"
    sizes = {
        "chunked prefill": (8192, 2048) if on_gpu else (4096, 512),
        "shared prefix": (8192, 256, 256) if on_gpu else (4096, 128, 128),
    }
    return [Case(*model, *sizes[model[1]]) for model in _MODELS]


def run(device: torch.device, dtype: torch.dtype, step: Callable[[str], None]) -> dict[str, Any]:
    """Every case, with its errors against float64 and the merge's time."""
    rows = []
    for number, case in enumerate(cases(device)):
        step(f"{case.model}, {case.kind}, {case.tokens} tokens behind {case.context} keys")
        random = torch.Generator(device).manual_seed(number)
        operands = _Operands(case, device, dtype, random)
        rows.append(_measure(case, operands, device, dtype))
    note = (
        "on a GPU: chunks of 2048 behind 8192 keys, 256 requests behind 8192; here as shown; heads "
        "are not shrunk"
    )
    failures = [
        f"{row['model']}, {row['kind']}: error {row['error']:.1e}, the bound is {row['bound']:.1e}"
        for row in rows
        if not row["ok"]
    ]
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "shrunk": "" if device.type == "cuda" else note,
        "rows": rows,
        "failures": failures,
    }


def text(result: dict[str, Any]) -> str:
    """The table for people."""
    headings = ["model", "kind", "tokens", "keys", "attention", "merge"]
    headings += ["error merged", "one pass", "bound", "us", "GB/s"]
    lines = [
        [
            row["model"],
            row["kind"],
            str(row["tokens"]),
            str(row["keys"]),
            row["attention_kernel"],
            row["merge_kernel"],
            f"{row['error']:.1e}",
            f"{row['one_pass_error']:.1e}",
            f"{row['bound']:.1e}",
            f"{row['microseconds']:.1f}",
            f"{row['gigabytes_per_second']:.1f}",
        ]
        for row in result["rows"]
    ]
    head = (
        f"Two parts at the head shapes of named models, {result['dtype']}; errors against float64 "
        f"on {_SAMPLED_ROWS} rows of {_SAMPLED_HEADS} heads;\n"
        f"us and GB/s of the merge alone, fastest of {REPEATS}"
    )
    shrunk = f"\n({result['shrunk']})" if result["shrunk"] else ""
    return f"{head}\n\n{table(headings, lines)}{shrunk}"


class _Operands:
    """Queries, the prefix that they share, and each one's own keys.

    A chunk is one sequence, [1, H, tokens, D], behind its context. Requests that share a prefix are
    the queries of one sequence to the prefix, and a batch of single queries, [tokens, H, 1, D], to
    their own keys.
    """

    def __init__(
        self, case: Case, device: torch.device, dtype: torch.dtype, random: torch.Generator
    ) -> None:
        def normal(*shape: int) -> torch.Tensor:
            # As a model's projections lie: [batch, tokens, heads, head_size], seen by heads.
            x = torch.randn(shape, generator=random, device=device, dtype=torch.float32)
            return x.to(dtype).transpose(1, 2)

        self.chunk = case.kind == "chunked prefill"
        batch, own = (1, case.tokens) if self.chunk else (case.tokens, case.own)
        self.query = normal(1, case.tokens, case.heads, case.head_size)
        self.prefix_key = normal(1, case.context, case.kv_heads, case.head_size)
        self.prefix_value = normal(1, case.context, case.kv_heads, case.value_head_size)
        self.suffix_key = normal(batch, own, case.kv_heads, case.head_size)
        self.suffix_value = normal(batch, own, case.kv_heads, case.value_head_size)
        self.suffix_query = self.query if self.chunk else self.query.permute(2, 1, 0, 3)
        # The head size before absorption: 128 + 64 for DeepSeek, whatever the width of the latent.
        self.scale = (192 if case.head_size == 576 else case.head_size) ** -0.5

    def prefix(self) -> tuple[torch.Tensor, ...]:
        return self.query, self.prefix_key, self.prefix_value

    def suffix(self) -> tuple[torch.Tensor, ...]:
        return self.suffix_query, self.suffix_key, self.suffix_value

    def whole(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values of one pass; requests other than `rows` are left out."""
        if self.chunk:
            key = torch.cat([self.prefix_key, self.suffix_key], 2)
            return self.query, key, torch.cat([self.prefix_value, self.suffix_value], 2)
        expand = (len(rows), -1, -1, -1)
        key = torch.cat([self.prefix_key.expand(expand), self.suffix_key[rows]], 2)
        value = torch.cat([self.prefix_value.expand(expand), self.suffix_value[rows]], 2)
        return self.suffix_query[rows], key, value


def _measure(
    case: Case, operands: _Operands, device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    scale, chunk = operands.scale, operands.chunk
    rows = torch.linspace(0, case.tokens - 1, _SAMPLED_ROWS, device=device).long()
    heads = torch.linspace(0, case.heads - 1, _SAMPLED_HEADS, device=device).long()

    prefix = token_layout(*attention_with_lse(*operands.prefix(), scale=scale))
    suffix = token_layout(*attention_with_lse(*operands.suffix(), is_causal=chunk, scale=scale))
    output = torch.empty(prefix[0].shape, dtype=dtype, device=device)
    output_lse = torch.empty(prefix[1].shape, dtype=prefix[1].dtype, device=device)
    arguments = (output, *prefix, *suffix, output_lse)
    merge_attn_states.merge_attn_states(*arguments)

    query, key, value = operands.whole(rows)
    one_pass, _ = token_layout(*attention_with_lse(query, key, value, is_causal=chunk, scale=scale))
    exact = _float64(case, query, key, value, rows, heads, scale)
    error = _largest(output[rows][:, heads].double() - exact)
    if chunk:
        one_pass = one_pass[rows]
    one_pass_error = _largest(one_pass[:, heads].double() - exact)
    # Each part brings the error of a pass of its own and half an ulp of its share in the result;
    # its float32 LSE is exact to an ulp, which is that much of its weight; the merge adds 8 float32
    # eps and half an ulp. (An early row of a chunk sees few keys of its own: its suffix is large
    # and its share small.)
    prefix_share, suffix_share = (
        (lse - output_lse).exp().T[..., None] * part.double().abs()
        for part, lse in (prefix, suffix)
    )
    share = _largest((prefix_share + suffix_share)[rows][:, heads])
    lse_ulps = 2 * _largest(output_lse)
    rounding = torch.finfo(dtype).eps + (8 + lse_ulps) * torch.finfo(torch.float32).eps
    bound = 2 * one_pass_error + rounding * share

    attention = {attention_kernel(*part) for part in (operands.prefix(), operands.suffix())}
    microseconds = fastest_microseconds(
        lambda: merge_attn_states.merge_attn_states(*arguments), device
    )
    moved = sum(x.numel() * x.element_size() for x in arguments)
    return {
        "model": case.model,
        "kind": case.kind,
        "tokens": case.tokens,
        "keys": case.context + (case.tokens if chunk else case.own),
        "heads": case.heads,
        "kv_heads": case.kv_heads,
        "head_size": case.head_size,
        "value_head_size": case.value_head_size,
        "attention_kernel": "+".join(sorted(attention)),
        "merge_kernel": merge_attn_states.selected_kernel(*arguments).kernel,
        "error": error,
        "one_pass_error": one_pass_error,
        "bound": bound,
        "microseconds": microseconds,
        "gigabytes_per_second": moved / microseconds / 1e3,
        "ok": error <= bound,  # False for a NaN
    }


def _float64(
    case: Case,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rows: torch.Tensor,
    heads: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Attention over all keys at the sampled rows and heads: [rows, heads, value_head_size]."""
    kv_heads = heads // (case.heads // case.kv_heads)
    wide_key, wide_value = key[:, kv_heads].double(), value[:, kv_heads].double()
    if case.kind == "chunked prefill":
        scores = query[:, heads][:, :, rows].double() @ wide_key.mT * scale
        position = torch.arange(key.shape[2], device=key.device)
        scores.masked_fill_(position > case.context + rows[:, None], -torch.inf)
        return (scores.softmax(-1) @ wide_value)[0].transpose(0, 1)
    scores = query[:, heads].double() @ wide_key.mT * scale
    return (scores.softmax(-1) @ wide_value)[:, :, 0]


def _largest(x: torch.Tensor) -> float:
    """The largest magnitude; NaN where there is one, which no bound admits."""
    return float(x.abs().max())
