"""What is measured: the cases of each group.

A case is a shape, a dtype and one kind of operands (KINDS). `size` names the bfloat16 shape of head
size 128 that has as many bytes, so that targets and tables can set one beside the other.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch

PLAIN = "contiguous"
NEIGHBOUR_KINDS = (  # docs/benchmarks.md describes them
    *("padded heads", "heads first", "row-strided LSE", "tokens-first LSE", "onto prefix"),
    *("onto suffix", "half context", "half context, onto suffix", "half empty", "FP8 output"),
)
COLD_KINDS = (
    *("padded heads", "heads first", "half context", "half context, onto suffix"),
    *("half context, output onto suffix", "half empty", "FP8 output"),
)
GENERIC_KINDS = ("FP8 inputs", "8-byte aligned")
ACROSS_RANKS = EAGERLY, ATTENTION, TRAINING = "eager calls", "attention", "attention, backward"
SHORT = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


@dataclass(frozen=True)
class Case:
    """One shape and what is special about it."""

    tokens: int
    heads: int
    head_size: int
    dtype: str = "bfloat16"
    kind: str = PLAIN
    size: str = ""

    def __post_init__(self) -> None:
        known = {PLAIN, *NEIGHBOUR_KINDS, *COLD_KINDS, *GENERIC_KINDS, *ACROSS_RANKS}
        if self.kind not in known:
            raise ValueError(f"kind: expected one of {known}, got {self.kind!r}")

    @property
    def name(self) -> str:
        shape = f"{self.tokens}x{self.heads}x{self.head_size} {SHORT[self.dtype]}"
        return shape if self.kind == PLAIN else f"{shape}, {self.kind}"

    @property
    def input_dtype(self) -> torch.dtype:
        fp8 = self.kind == "FP8 inputs"
        return torch.float8_e4m3fn if fp8 else getattr(torch, self.dtype)

    @property
    def output_dtype(self) -> torch.dtype:
        return torch.float8_e4m3fn if self.kind == "FP8 output" else self.input_dtype

    @property
    def has_narrow_output(self) -> bool:
        return self.output_dtype.itemsize < self.input_dtype.itemsize

    @property
    def context_tokens(self) -> int:
        return self.tokens // 2 if self.kind.startswith("half context") else self.tokens

    def bytes(self, lse: int = 4) -> int:
        """What must move: the three [N, H, D] operands and the three LSEs once each.

        A row past the context count needs no prefix; onto the suffix it needs nothing, or its LSE.
        `lse` is what an LSE counts: 0 leaves them out.
        """
        part = self.head_size * self.input_dtype.itemsize + lse
        merged = self.head_size * self.output_dtype.itemsize + lse
        copied = {
            "half context, onto suffix": 0,
            "half context, output onto suffix": 2 * lse,
        }.get(self.kind, part + merged)
        count = self.context_tokens
        return self.heads * (count * (2 * part + merged) + (self.tokens - count) * copied)

    def record(self) -> dict[str, Any]:
        """The case as JSON fields."""
        fields = {"case": self.name, "head_size": self.head_size, "dtype": self.dtype}
        return fields | {"kind": self.kind, "size": self.size, "bytes": self.bytes()}


# Tokens and heads of each size: decode, and chunks of a prefill.
SIZES = {"1x128": (1, 128)} | {f"{n}x16": (n, 16) for n in (16, 64, 256, 1024, 2048, 8192)}
LAYOUT_SIZES = ("64x16", "256x16", "2048x16", "8192x16")


def _same_bytes(size: str, head_size: int, itemsize: int = 2) -> tuple[int, int, int]:
    """A shape with as many bytes as the size has in bfloat16 at head size 128."""
    tokens, heads = SIZES[size]
    if heads == 128 or (tokens * 256) % (head_size * itemsize):  # one token stays one token
        return tokens, heads * 256 // (head_size * itemsize), head_size
    return tokens * 256 // (head_size * itemsize), heads, head_size


def _neighbours() -> list[Case]:
    cases = [Case(*SIZES[size], 128, size=size) for size in SIZES]
    cases += [replace(case, dtype="float16") for case in cases]
    for size in SIZES:
        cases += [Case(*_same_bytes(size, d), size=size) for d in (64, 512)]
        cases.append(Case(*_same_bytes(size, 64, 4), "float32", size=size))
    for size in LAYOUT_SIZES:
        cases += [Case(*SIZES[size], 128, kind=kind, size=size) for kind in NEIGHBOUR_KINDS]
    return cases


HEAD_SIZES = (32, 48, 64, 80, 96, 112, 128, 192, 256, 512, 576)
UNEVEN_HEAD_SIZES = (100, 101)  # no whole packs of 16 bytes: the generic kernel
LEAST_COLD_BYTES = 12_000_000


def _cold() -> list[Case]:
    shapes = [(n, 16, d) for d in HEAD_SIZES for n in (2048, 8192)]
    shapes += [(1024, 16, 128), (4096, 32, 128), (8192, 64, 64)]
    shapes += [(8192, 128, d) for d in (64, 128, 512)]
    cases = [Case(*shape, size="x".join(map(str, shape[:2]))) for shape in shapes]
    cases += [Case(n, 16, 128, "float16") for n in (2048, 8192)]
    cases += [Case(n, 16, 128, "float32") for n in (1024, 4096)]
    for n, h in ((2048, 16), (8192, 16), (8192, 128)):
        cases += [Case(n, h, 128, kind=kind, size=f"{n}x{h}") for kind in COLD_KINDS]
    cases += [Case(8192, 32, d) for d in UNEVEN_HEAD_SIZES]
    cases += [Case(8192, 32, 128, kind=kind) for kind in GENERIC_KINDS]
    return [case for case in cases if case.bytes() >= LEAST_COLD_BYTES]


def _cpu() -> list[Case]:
    cases = []
    for dtype in SHORT:
        tokens, head_size = (1024, 64) if dtype == "float32" else (2048, 128)
        large = Case(tokens, 64, 128, dtype, size="100 MB")
        cases += [large, Case(1, 5, head_size, dtype, size="4 KB")]
    return cases


GROUPS: dict[str, list[Case]] = {"neighbours": _neighbours(), "cold": _cold(), "cpu": _cpu()}
HOST_CASE = Case(4, 8, 128)
# The host first: nothing else has run yet.
GPU_GROUPS = ("host", "neighbours", "cold", "states", "cpu")
CPU_GROUPS = ("host", "cpu")
RANKS = "ranks"  # measured alone, into a file of its own: it takes every GPU
ALL_GROUPS = (*GPU_GROUPS, RANKS)


def is_compared_with_pytorch(case: Case) -> bool:
    """Whether PyTorch's own ways run too: each shape costs torch.compile seconds."""
    return case.kind == PLAIN and case.dtype == "bfloat16" and case.head_size == 128
