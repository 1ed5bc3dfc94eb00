"""How vLLM's callers call its merge: shapes, strides and aliasing, a pattern each.

Read from the backends of vLLM 0.26 to 0.33.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from benchmarks.operands import Operands

FP8 = torch.float8_e4m3fn
HEADS, HEAD_SIZE = 16, 128
QUERY_WIDTH = 192  # of MLA: 128 and 64 for the position; values are padded to it
TOKENS = (16, 128, 2048)  # two decode batches and a prefill's chunk


class Pattern(NamedTuple):
    """`make` gives the arguments for a number of tokens; `by_keyword` is how they are passed."""

    name: str
    make: Callable[[int, torch.device], Operands]
    by_keyword: bool = False
    goes_to_triton: bool = False  # in vLLM's dispatcher, on a GPU

    def call(self, merge: Callable[..., object], operands: Operands) -> None:
        """Call as the caller does: what is None at the end is not passed at all."""
        if self.by_keyword:
            named = operands._asdict().items()
            merge(**{name: value for name, value in named if value is not None})
            return
        given = list(operands)
        while given[-1] is None:
            given.pop()
        merge(*given)


def _rows(n: int, device: torch.device, width: int = HEAD_SIZE) -> torch.Tensor:
    return torch.randn(n, HEADS, width, device=device, dtype=torch.bfloat16)


def _lse(n: int, device: torch.device) -> torch.Tensor:
    return 3 * torch.randn(HEADS, n, device=device)


def _transposed_lse(n: int, device: torch.device) -> torch.Tensor:
    """Of a backend whose LSE is [N, H], brought over as vLLM does."""
    return (3 * torch.randn(n, HEADS, device=device)).transpose(0, 1).contiguous()


def _plain(n: int, device: torch.device) -> Operands:
    parts = _rows(n, device), _lse(n, device), _rows(n, device), _lse(n, device)
    return Operands(torch.full_like(parts[0], torch.nan), *parts, None)  # type: ignore[arg-type]


def _onto_suffix(n: int, device: torch.device) -> Operands:
    made = _plain(n, device)._replace(
        prefix_lse=_transposed_lse(n, device), suffix_lse=_transposed_lse(n, device)
    )
    return made._replace(output=made.suffix_output)


def _running_buffer(n: int, device: torch.device) -> Operands:
    """Slices [a:b] of buffers for more tokens: the LSE's rows are as far apart as before."""
    first, total = n // 4, 2 * n
    output, output_lse = _rows(total, device), _lse(total, device)
    running = output[first : first + n], output_lse[:, first : first + n]
    chunk = _rows(total, device)[:n], _lse(total, device)[:, :n]
    return Operands(running[0], *running, *chunk, running[1])


def _ping_pong(n: int, device: torch.device) -> Operands:
    made = _plain(n, device)
    return made._replace(output_lse=torch.full_like(made.prefix_lse, torch.nan))


def _padded(n: int, device: torch.device) -> Operands:
    return _plain(n, device)._replace(
        prefix_output=_rows(n, device, QUERY_WIDTH)[..., :HEAD_SIZE],
        suffix_output=_rows(n, device, QUERY_WIDTH)[..., :HEAD_SIZE],
    )


def _with_context(n: int, device: torch.device) -> Operands:
    return _padded(n, device)._replace(prefill_tokens_with_context=n - n // 4)


def _fp8_output(n: int, device: torch.device) -> Operands:
    output = torch.full((n, HEADS, HEAD_SIZE), torch.nan, device=device).to(FP8)
    return _padded(n, device)._replace(output=output, output_scale=torch.tensor(0.5, device=device))


def _fp8_inputs(n: int, device: torch.device) -> Operands:
    made = _ping_pong(n, device)
    parts = made.prefix_output.to(FP8), made.suffix_output.to(FP8)
    return made._replace(
        output=torch.full_like(made.prefix_output, torch.nan).to(FP8),
        prefix_output=parts[0],
        suffix_output=parts[1],
        output_scale=torch.ones((), device=device),  # its dispatcher asks for one
    )


def _odd_head_size(n: int, device: torch.device) -> Operands:
    made = _ping_pong(n, device)
    rows = [torch.randn(n, HEADS, 100, device=device, dtype=torch.bfloat16) for _ in range(3)]
    return made._replace(output=rows[0], prefix_output=rows[1], suffix_output=rows[2])


PATTERNS = (
    Pattern("cascade", _plain),  # flash_attn.py, flashinfer.py
    Pattern("decode-context-parallel, output = suffix", _onto_suffix),  # flash_attn.py
    Pattern("MLA running buffer, in place", _running_buffer, True),  # mla_attention.py
    Pattern("MLA ping-pong buffers", _ping_pong, True),  # mla_attention.py before 0.33
    Pattern("MLA final merge, 128 of 192 wide", _padded, True),  # mla_attention.py
    Pattern("MLA final merge, context count", _with_context, True),  # mla_attention.py, 0.26
    # What the dispatcher takes, and no backend of these releases asks for.
    Pattern("FP8 output", _fp8_output, True),
    Pattern("FP8 inputs", _fp8_inputs, goes_to_triton=True),
    Pattern("head size 100", _odd_head_size, goes_to_triton=True),
)
