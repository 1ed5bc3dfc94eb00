"""What the tests of many parts stand on: a call as a value, parts in any memory, one comparison.

As in support.py memory starts as NaN, and everything that is no part of a result must be what it
was.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from support import (
    F32,
    F64,
    FP8,
    INF,
    NAN,
    assert_bits,
    assert_within,
    bits,
    half_ulp,
    place,
)

from merge_attn_states import merge_states
from merge_attn_states.reference import merge_states_reference

LN2 = math.log(2)


class States(NamedTuple):
    """The arguments of merge_states by their names."""

    outputs: list[torch.Tensor] | torch.Tensor
    lses: list[torch.Tensor] | torch.Tensor
    dim: int | None = None
    index: list[torch.Tensor | None] | None = None
    empty: list[torch.Tensor | None] | None = None
    sink: torch.Tensor | None = None
    lse_base: str | Sequence[str] = "e"
    out_lse_base: str | None = None
    out: torch.Tensor | None = None
    out_lse: torch.Tensor | None = None
    out_dtype: torch.dtype | None = None
    out_scale: torch.Tensor | None = None
    return_lse: bool = True

    @property
    def parts(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        if self.dim is None:
            return self.outputs, self.lses
        return list(self.outputs.unbind(self.dim)), list(self.lses.unbind(self.dim))

    @property
    def bases(self) -> list[str]:
        count = len(self.parts[0])
        return list(self.lse_base) if len(self.lse_base) > 1 else [self.lse_base[0]] * count

    def run(self, function=merge_states):
        outputs, lses, *_ = self
        return function(
            outputs,
            lses,
            **{k: v for k, v in self._asdict().items() if k[:7] not in ("outputs", "lses")},
        )

    def clone(self) -> "States":
        return States(*map(_cloned, self))


def operator_args(states: States) -> tuple:
    """In the order of merge_states as an operator; merge_states_out has two more in front."""
    lists = [[x] if torch.is_tensor(x) else x for x in states[:2]]
    per_part = [states.index or [], states.empty or []]
    bases = "".join(states.lse_base)
    return (*lists, *per_part, states.dim, states.sink, bases, states.out_lse_base)


def _cloned(value):
    if isinstance(value, list):
        return [_cloned(each) for each in value]
    return value.clone() if isinstance(value, torch.Tensor) else value


def of_parts(values, count: int) -> list:
    return list(values) if isinstance(values, (list, tuple)) else [values] * count


def make_states(
    rows: tuple[int, ...],
    head_size: int,
    count: int,
    dtype=F32,
    device="cpu",
    *,
    base="e",
    empty=True,
    spread=3.0,
    center=2.0,
    seed=0,
    **options,
) -> States:
    """Random parts, dtypes and bases of all or of each; among the rows empty ones of all kinds.

    The values of an empty part are NaN: whoever uses them is found out.
    """
    random = torch.Generator().manual_seed(seed)
    dtypes, bases = of_parts(dtype, count), of_parts(base, count)
    outputs, lses = [], []
    num_rows = math.prod(rows)
    for k in range(count):
        values = torch.randn(*rows, head_size, generator=random, dtype=F64)
        lse = center + spread * torch.randn(rows, generator=random, dtype=F64)
        if empty and num_rows >= 4:
            flat = lse.view(-1)
            flat[0] = INF if k % 2 else -INF  # all are empty
            flat[1 + k % 2] = -INF if k % 2 else INF
            if k != count // 2:
                flat[3] = INF  # one alone is not
        values[lse.isinf()] = NAN
        lse = lse / LN2 if bases[k] == "2" else lse
        outputs.append(place(values.to(dtypes[k]), device))
        lses.append(place(lse.to(F64 if dtypes[k] == F64 else F32), device))
    if len(set(bases)) == 1:
        return States(outputs, lses, lse_base=bases[0], **options)
    return States(outputs, lses, lse_base=bases, **options)


def parts(device="cpu", **options) -> States:
    """Three small parts with nothing special about them."""
    return make_states((4, 2), 8, 3, F32, device, empty=False, **options)


def everything(device="cpu") -> States:
    """A call that has every operand there is."""
    return parts(device)._replace(
        index=[None, torch.tensor([3, -1, 0, 0], device=device), None],
        empty=[None, None, torch.rand(4, 2, device=device) < 0.5],
        sink=torch.zeros(2, device=device),
    )


def compare(states: States, out: torch.Tensor, out_lse: torch.Tensor | None) -> None:
    """The one tolerance rule of many parts. `states` holds the operands as they were before."""
    states = States(*map(_on_cpu, states))
    outputs, lses = states.parts
    count, bases = len(outputs), states.bases
    out = out.cpu()
    wide = outputs[0].dtype == F64
    expected, expected_lse = merge_states_reference(
        outputs,
        lses,
        index=states.index,
        empty=states.empty,
        sink=states.sink,
        lse_base=bases,
        out_lse_base=states.out_lse_base,
    )
    scale = states.out_scale
    if scale is not None:
        expected = expected / scale.to(F64).reshape(())
    eps = torch.finfo(F64 if wide else F32).eps

    values, absent = [], []
    for k in range(count):
        one, gone = _rows(states, k)
        values.append(one.to(F64).abs().masked_fill(gone[..., None], 0))
        absent.append(gone)
    largest = torch.stack(values).amax(0)
    largest = torch.where(torch.stack(values).isnan().any(0), NAN, largest)
    if scale is not None:
        largest = largest / scale.to(F64).abs().reshape(())
    largest[~largest.isfinite()] = 0
    absent = torch.stack(absent)
    nobody = absent.all(0)
    alone = (~absent).sum(0) == 1
    if states.sink is not None:
        alone = alone & states.sink.isinf()
    if out.dtype in FP8:
        limit = torch.finfo(out.dtype).max
        raw = alone if scale is None and outputs[0].dtype == out.dtype else torch.zeros_like(alone)
        expected = torch.where(raw[..., None], expected, expected.clamp(-limit, limit))
    factor = 8
    mixed = len(set(bases)) > 1 or (
        states.sink is not None and states.out_lse_base not in (None, bases[0])
    )
    if wide and mixed:  # in float64 the reference itself knows ln 2 times an LSE to its last digit
        factor += max(
            float(lse[lse.isfinite()].abs().max()) for lse in lses if lse.isfinite().any()
        )
    bound = factor * eps * largest
    bound = bound + half_ulp(expected.abs() + bound, out.dtype)
    assert_within(out, expected, bound)
    assert (bits(out)[nobody & ~expected_lse.isnan()] == 0).all(), "no part: zeros"
    for k in range(count):
        if outputs[k].dtype == out.dtype and scale is None:
            rows, _ = _rows(states, k)
            only = alone & ~absent[k] & ~expected_lse.isnan()
            assert_bits(out[only], rows[only])
    if out_lse is not None:
        lse = out_lse.cpu().reshape(out.shape[:-1])
        assert_within(lse, expected_lse, 4 * eps * expected_lse.abs().clamp(min=1))
        if set(bases) == {states.out_lse_base or bases[0]}:
            for k in range(count):
                only = alone & ~absent[k] & ~expected_lse.isnan()
                assert_bits(
                    lse[only],
                    _gathered(states, k, lses[k].reshape(lses[k].shape[: out.dim() - 1]))[only],
                )


def _on_cpu(value):
    if isinstance(value, list):
        return [_on_cpu(each) for each in value]
    return value.cpu() if isinstance(value, torch.Tensor) else value


def _gathered(states: States, k: int, rows: torch.Tensor) -> torch.Tensor:
    if states.index is None or states.index[k] is None:
        return rows
    index = states.index[k].long()
    index = torch.where((index < 0) | (index >= len(rows)), 0, index)
    return rows[index] if len(rows) else rows.new_zeros(len(index), *rows.shape[1:])


def _rows(states: States, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A part's values in each row of the result, and where it is absent."""
    outputs, lses = states.parts
    lse = lses[k].reshape(outputs[k].shape[:-1])
    gone = lse.isinf()
    if states.empty is not None and states.empty[k] is not None:
        gone = gone | states.empty[k].reshape(gone.shape)
    values, gone = _gathered(states, k, outputs[k]), _gathered(states, k, gone)
    if states.index is not None and states.index[k] is not None:
        index = states.index[k].long()
        outside = (index < 0) | (index >= outputs[k].shape[0])
        gone = gone | outside.reshape(-1, *[1] * (gone.dim() - 1))
    return values, gone


def check(states: States, run=merge_states) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Runs the call and compares everything with the reference; inputs must be what they were."""
    before = states.clone()
    out, lse = states.run(run)
    written = [x for x in (states.out, states.out_lse) if x is not None]
    for now, was in zip(_tensors(states), _tensors(before), strict=True):
        if not any(now is one or _same_memory(now, one) for one in written):
            assert_bits_or_equal(now, was)
    compare(before, out, lse)
    return out, lse


def _same_memory(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def _tensors(states: States):
    for value in states:
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, torch.Tensor):
                yield each


def assert_bits_or_equal(now, was):
    if now.dtype.is_floating_point:
        assert_bits(now, was)
    else:
        assert torch.equal(now, was)
