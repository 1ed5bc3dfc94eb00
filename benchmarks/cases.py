"""What is measured: cases in named groups.

A group is a list of comparisons; a comparison is one or more cases of one shape that are timed in
turn, on the same inputs, the first being what the others are compared with.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch

FP8 = "float8_e4m3fn"
SHORT = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", FP8: "e4m3"}


@dataclass(frozen=True)
class Case:
    """One shape and what is special about it."""

    tokens: int
    heads: int
    head_size: int
    dtype: str = "bfloat16"
    regime: str = "cold"  # cold: the inputs come from DRAM; warm: they lie in L2
    output_dtype: str = ""  # empty: the inputs'
    layout: str = "contiguous"  # how the [N, H, D] operands lie in memory: operands.py
    context_tokens: int | None = None  # prefill_tokens_with_context
    in_place: bool = False  # output is suffix_output, output_lse is suffix_lse
    lse_elsewhere: bool = False  # in place, but output_lse is memory of its own
    empty_blocks: bool = False  # half of the prefix rows are empty, in blocks of 256 tokens
    model: str = ""

    @property
    def shape(self) -> str:
        return f"{self.tokens}x{self.heads}x{self.head_size}"

    @property
    def name(self) -> str:
        """All but the regime."""
        special = [
            self.layout if self.layout != "contiguous" else "",
            f"{SHORT[self.output_dtype]} output" if self.output_dtype else "",
            "half the tokens have context" if self.context_tokens is not None else "",
            "in place" if self.in_place else "",
            "output_lse elsewhere" if self.lse_elsewhere else "",
            "half the prefix empty" if self.empty_blocks else "",
        ]
        return ", ".join([f"{self.shape} {SHORT[self.dtype]}", *filter(None, special)])

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    @property
    def torch_output_dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.output_dtype or self.dtype)
        return dtype

    @property
    def bytes(self) -> int:
        """What must move: three [N, H, D] operands and three LSEs once each.

        Rows past the context count need no prefix; in place nothing at all, or their LSE alone.
        """
        inputs, output = self.torch_dtype.itemsize, self.torch_output_dtype.itemsize
        part, merged = self.head_size * inputs + 4, self.head_size * output + 4
        count = self.tokens if self.context_tokens is None else self.context_tokens
        copied = part + merged
        if self.in_place:
            copied = 8 if self.lse_elsewhere else 0
        return self.heads * (count * (2 * part + merged) + (self.tokens - count) * copied)

    @property
    def footprint(self) -> int:
        """How much memory that traffic touches: in place, a part and the output are one."""
        return self.bytes * 2 // 3 if self.in_place else self.bytes

    def record(self) -> dict[str, Any]:
        """The case as JSON fields, defaults left out."""
        defaults = {field.name: field.default for field in fields(self)}
        special = {k: v for k, v in asdict(self).items() if v != defaults[k]}
        return {"case": self.name, "regime": self.regime, "bytes": self.bytes} | special


Comparison = tuple[Case, ...]

HEAD_SIZES = (32, 48, 64, 80, 96, 112, 128, 192, 256, 512, 576)
TOKENS_AND_HEADS = ((1024, 16), (2048, 16), (4096, 32), (8192, 16))
LEAST_SWEEP_BYTES = 12_000_000
PAIRED_SHAPES = ((2048, 16, 128), (8192, 16, 128), (8192, 128, 128))
WARM_BYTES = 40_000_000  # what still lies in the L2 of an H100 or H200 after the attention wrote it

MODELS = (  # name, heads on one GPU, head size
    ("DeepSeek-V3", 128, 128),
    ("DeepSeek-V3, absorbed", 128, 512),
    ("Kimi-K2", 64, 128),
    ("Llama-3 8B", 32, 128),
    ("Llama-3 405B, TP 8", 16, 128),
    ("Llama-3 70B, TP 8", 8, 128),
    ("gpt-oss-120b", 64, 64),
    ("Gemma-3 12B", 16, 256),
    ("Qwen3.5-397B", 32, 256),
    ("Phi-3-mini", 32, 96),
    ("Phi-2", 32, 80),
)
MODEL_TOKENS = (16, 128, 2048, 8192)  # decode, decode, and two sizes of a prefill's chunk


def _sweep() -> list[Comparison]:
    cases = [Case(n, h, d) for d in HEAD_SIZES for n, h in TOKENS_AND_HEADS]
    cases += [Case(8192, 128, d) for d in HEAD_SIZES] + [Case(8192, 64, d) for d in (64, 128)]
    cases += [Case(2048, 32, 64)]  # cold beside the one in `warm`
    cases += [Case(n, h, 128, "float16") for n, h in ((1024, 16), (8192, 16), (8192, 128))]
    cases += [Case(n, h, d, "float16") for n, h, d in ((2048, 32, 64), (4096, 32, 96))]
    # float32 at the same bytes: half the tokens.
    cases += [Case(n, h, 128, "float32") for n, h in ((512, 16), (4096, 16), (4096, 128))]
    cases += [Case(n, h, d, "float32") for n, h, d in ((1024, 32, 64), (2048, 32, 96))]
    return [(case,) for case in cases if case.bytes >= LEAST_SWEEP_BYTES]


def _warm() -> list[Comparison]:
    shapes = [(1024, 16, 128), (2048, 16, 128), (2048, 32, 64), (1024, 16, 256), (512, 16, 512)]
    shapes += [(2048, 16, 96), (1024, 16, 192)]  # 19 MB
    cases = [Case(*shape) for shape in shapes] + [Case(2048, 16, 128, "float16")]
    cases += [Case(1024, 16, 128, "float32"), Case(1024, 16, 96, "float32")]
    return [(replace(case, regime="warm"),) for case in cases]


def _small() -> list[Comparison]:
    shapes = [(1, 128, 128), (16, 16, 128), (64, 16, 128), (256, 16, 128)]
    shapes += [(512, 16, 128)]  # joins the curve to `sweep` and `warm`
    cases = [Case(*shape) for shape in shapes]
    cases += [Case(n, 16, 128, "float16") for n in (64, 256)]
    cases += [Case(n, 16, 128, "float32") for n in (32, 128)]
    return [(replace(case, regime=regime),) for case in cases for regime in ("cold", "warm")]


def _models() -> list[Comparison]:
    """Each in the regime that serving meets: warm while the parts fit into L2."""
    cases = [Case(n, h, d, model=model) for model, h, d in MODELS for n in MODEL_TOKENS]
    return [
        (replace(case, regime="warm" if case.bytes <= WARM_BYTES else "cold"),) for case in cases
    ]


def _context() -> list[Comparison]:
    return [
        (
            Case(n, h, d),
            Case(n, h, d, context_tokens=n // 2),
            Case(n, h, d, context_tokens=n // 2, in_place=True),
            Case(n, h, d, context_tokens=n // 2, in_place=True, lse_elsewhere=True),
        )
        for n, h, d in PAIRED_SHAPES
    ]


def _empties() -> list[Comparison]:
    return [(Case(*shape), Case(*shape, empty_blocks=True)) for shape in PAIRED_SHAPES]


def _layouts() -> list[Comparison]:
    cases = [
        Case(8192, 32, 128, layout="heads first"),
        Case(8192, 32, 128, layout="padded heads"),
        Case(8192, 32, 128, output_dtype=FP8),
        *(
            Case(n, 16, 128, output_dtype=FP8, layout=layout, regime=regime)
            for n in (256, 2048)
            for layout in ("contiguous", "padded heads")
            for regime in ("cold", "warm")
        ),
        # The generic kernel from here on.
        Case(8192, 32, 100),
        Case(8192, 32, 101),
        Case(8192, 32, 128, layout="8-byte aligned"),
        Case(8192, 32, 128, dtype=FP8),
    ]
    return [(case,) for case in cases]


def _cpu() -> list[Comparison]:
    large = {"float32": (1024, 64, 128), "bfloat16": (2048, 64, 128), "float16": (2048, 64, 128)}
    small = {"float32": (1, 5, 64), "bfloat16": (1, 5, 128), "float16": (1, 5, 128)}
    return [(Case(*shapes[d], d, "cpu"),) for shapes in (large, small) for d in shapes]


GROUPS: dict[str, list[Comparison]] = {
    "sweep": _sweep(),
    "warm": _warm(),
    "small": _small(),
    "models": _models(),
    "context": _context(),
    "empties": _empties(),
    "layouts": _layouts(),
    "cpu": _cpu(),
}
HOST_CASE = Case(4, 8, 128, regime="tight")
ALL_GROUPS = (*GROUPS, "host")

# torch.compile takes seconds a shape, so it is measured on these alone.
COMPILED = {
    ("sweep", "8192x16x128 bf16"),
    ("warm", "2048x16x128 bf16"),
    ("small", "256x16x128 bf16"),
}


def quick(comparisons: list[Comparison]) -> list[Comparison]:
    """The same kinds of cases in tiny shapes: shows that everything runs, measures nothing."""

    def shrunk(case: Case) -> Case:
        context = None if case.context_tokens is None else 4
        return replace(case, tokens=8, heads=min(case.heads, 4), context_tokens=context)

    return list(dict.fromkeys(tuple(shrunk(c) for c in comparison) for comparison in comparisons))
