"""Many parts and running states: what is measured of them, in which regime, and its operands."""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .cases import SHORT

LIST, STACK, SPLIT, BASE_2, INDEX = "list", "stack", "split", "base 2", "index"
STEP, HALF, BACKWARD = "ring step", "zigzag half", "backward"
HEAD_SIZE, LSE = 128, 4  # elements, bytes


@dataclass(frozen=True)
class StatesCase:
    """`parts` of [*rows, 128]; a ring's are its block and its state, which is in float32."""

    kind: str
    parts: int
    rows: tuple[int, ...]  # [tokens, heads] or [batch, tokens, heads]
    regime: str
    dtype: str = "bfloat16"

    @property
    def size(self) -> str:
        return "x".join(map(str, self.rows[-2:]))

    @property
    def name(self) -> str:
        parts = "" if self.is_ring else f"{self.parts} x "
        name = f"{parts}{self.size}x{HEAD_SIZE} {SHORT[self.dtype]}, {self.kind}"
        return f"{name}, host" if self.regime == "host" else name

    @property
    def torch_dtype(self) -> torch.dtype:
        found: torch.dtype = getattr(torch, self.dtype)
        return found

    @property
    def is_ring(self) -> bool:
        return self.kind in (STEP, HALF)

    @property
    def is_stacked(self) -> bool:
        """Whether the parts are given as one tensor."""
        return self.kind in (STACK, SPLIT)

    def bytes(self) -> int:
        """What must move, each once: parts and LSEs, and what is written."""
        rows, part = math.prod(self.rows), HEAD_SIZE * self.torch_dtype.itemsize
        if self.is_ring:
            rows //= 1 + (self.kind == HALF)
            return rows * (2 * (HEAD_SIZE * 4 + LSE) + part + LSE)
        if self.kind == BACKWARD:  # the output's gradient too; its LSE has none
            return rows * (2 * self.parts * (part + LSE) + part)
        if self.kind == INDEX:  # half of each part's rows; 4 bytes an index a token
            halves = rows * self.parts * (part + LSE) // 2
            return halves + rows * (part + LSE) + self.rows[-2] * self.parts * 4
        return rows * (self.parts + 1) * (part + LSE)

    def record(self) -> dict[str, Any]:
        """The case as JSON fields."""
        fields = {name: getattr(self, name) for name in ("dtype", "kind", "size", "parts")}
        fields |= {"regime": self.regime, "bytes": self.bytes()}
        return {"case": self.name, "head_size": HEAD_SIZE} | fields


def _on_a_gpu() -> list[StatesCase]:
    near = [(k, n, h) for k in (2, 4, 8, 16) for n, h in ((1, 128), (64, 16))]
    near += [(8, 512, 16), (4, 2048, 16)]
    cases = [StatesCase(LIST, k, (n, h), "neighbours") for k, n, h in near]
    cases += [StatesCase(STACK, 8, (64, 16), "neighbours")]
    cases += [StatesCase(BASE_2, 2, (256, 16), "neighbours")]
    cases += [StatesCase(k, n, (8192, 32), "cold") for n in (2, 4, 8, 16) for k in (LIST, STACK)]
    cases += [StatesCase(SPLIT, 256, (8, 8), "cold"), StatesCase(INDEX, 3, (8192, 24), "cold")]
    rings = ((1, 4608, 24), (1, 32768, 10))
    cases += [StatesCase(kind, 2, rows, "cold") for rows in rings for kind in (STEP, HALF)]
    cases += [StatesCase(BACKWARD, k, (8192, 32), "cold") for k in (2, 8)]
    return [*cases, StatesCase(STEP, 2, (1, 64, 8), "host")]


def _on_a_cpu() -> list[StatesCase]:
    tokens = {dtype: 600 if dtype == "float32" else 1200 for dtype in SHORT}  # 100 MB
    return [StatesCase(LIST, 4, (n, 64), "cpu", dtype) for dtype, n in tokens.items()]


GROUPS = {"states": _on_a_gpu(), "cpu": _on_a_cpu()}


class States(NamedTuple):
    """The operands of a case."""

    case: StatesCase
    outputs: Tensor  # [parts, *rows, 128]; of a ring the block alone, [*rows, 128]
    lses: Tensor
    out: Tensor
    out_lse: Tensor
    rows_of: list[Tensor] | None = None  # an index a part
    grad: Tensor | None = None  # of the output

    @property
    def options(self) -> dict[str, Any]:
        if self.case.kind == BASE_2:
            return {"lse_base": "2", "out_lse_base": "e"}
        return {"index": self.rows_of} if self.rows_of else {}

    @property
    def merged(self) -> tuple[Tensor, Tensor]:
        return self.out, self.out_lse

    @property
    def parts(self) -> tuple[list[Tensor], list[Tensor]]:
        """As two lists; of a ring the state and its block."""
        if self.case.is_ring:
            return [self.out, self.outputs], [self.out_lse, self.lses]
        return list(self.outputs.unbind()), list(self.lses.unbind())


def make_states(case: StatesCase, sets: int, device: torch.device) -> list[States]:
    """Random operands, a tuple a set."""
    with device:
        return [(_ring if case.is_ring else _parts)(case) for _ in range(sets)]


def _ring(case: StatesCase) -> States:
    """FlashAttention's [B, H, S] beside [B, S, H, D]."""
    batch, tokens, heads = case.rows
    dtypes = (case.torch_dtype, torch.float32)
    block, state = (torch.randn(*case.rows, HEAD_SIZE, dtype=dtype) for dtype in dtypes)
    lses = (3 * torch.randn(2, batch, heads, tokens)).transpose(2, 3)
    half = slice(tokens // 2 if case.kind == HALF else 0, None)
    out, out_lse = state[:, half], lses[1][:, half]
    return States(case, block[:, half], lses[0][:, half], out, out_lse)


def _parts(case: StatesCase) -> States:
    outputs = torch.randn(case.parts, *case.rows, HEAD_SIZE, dtype=case.torch_dtype)
    lses = 3 * torch.randn(case.parts, *case.rows)
    made = States(case, outputs, lses, torch.empty_like(outputs[0]), lses[0].clone())
    if case.kind == INDEX:
        return made._replace(rows_of=_indices(case))
    return made._replace(grad=torch.randn_like(outputs[0])) if case.kind == BACKWARD else made


def _indices(case: StatesCase) -> list[Tensor]:
    """Of each part every second row, as an engine's requests lie: runs of 64, in turn absent."""
    rows = torch.arange(case.rows[0], dtype=torch.int32)
    return [
        torch.where(((rows // 64 + k) % 2).bool(), rows // 128 * 64 + rows % 64, -1).int()
        for k in range(case.parts)
    ]
