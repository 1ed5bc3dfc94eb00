"""Between neighbours: what a merge adds between a kernel that writes both parts and one that reads
the output, as an attention kernel and a projection stand around it.

The time of (producer, merge, consumer) less that of (producer, consumer), by CUDA graph replays of
many of them, everybody in turn in one process. Of the same bytes, beside it: the plain kernel in
128, 256 and 512 threads, whose best is the limit, and an empty kernel, the floor of any launch.
"""

from collections.abc import Sequence
from functools import partial

import torch

import merge_attn_states

from . import kernels
from .cases import Case
from .operands import Operands, make_operands
from .providers import Provider, prepare
from .results import Record
from .timing import Call, medians, time_cuda

Neighbours = tuple[Call, Call]  # the producer and the consumer


def measure(case: Case, providers: Sequence[Provider], device: torch.device, rounds: int) -> Record:
    """One case: microseconds added, by provider, and of the two neighbours alone."""
    (operands,) = make_operands(case, 1, device)
    around = neighbours(operands)
    around[0]()  # so that answers are checked on what is timed
    timed, refused = prepare(providers, [operands])
    middles = {name: calls[0] for name, calls in timed.items()} | limits(case, operands)
    kernel = merge_attn_states.selected_kernel(*operands)._asdict()
    return case.record() | kernel | {"us": added(around, middles, rounds), "refused": refused}


def added(around: Neighbours, middles: dict[str, Call], rounds: int) -> dict[str, float]:
    """Microseconds that each adds between its neighbours; "neighbours": what these take alone."""
    produce, consume = around

    def between(middle: Call) -> Call:
        def call() -> None:
            produce()
            middle()
            consume()

        return call

    sequences = {name: [between(middle)] for name, middle in middles.items()}
    times = medians(time_cuda(sequences | {"neighbours": [between(lambda: None)]}, rounds))
    alone = times.pop("neighbours")
    return {name: us - alone for name, us in times.items()} | {"neighbours": alone}


def neighbours(operands: Operands) -> Neighbours:
    """The producer and the consumer of these operands' whole memory, whatever lies in it."""
    parts = [whole(operands.prefix_output), whole(operands.suffix_output)]
    lses = [whole(operands.prefix_lse), whole(operands.suffix_lse)]
    return neighbours_of(parts, lses, whole(operands.output))


def neighbours_of(
    parts: Sequence[torch.Tensor], lses: Sequence[torch.Tensor], output: torch.Tensor
) -> Neighbours:
    """The same of two halves of the parts' bytes, two of the LSEs' and the output's bytes."""
    sizes = (kernels.SOURCE * kernels.PACK, kernels.SOURCE * 4, kernels.SOURCE * 4)
    sources = [
        memory.repeat(-(-size // memory.numel()))[:size].clone()  # its first bytes, again and again
        for memory, size in zip((parts[0], *lses), sizes, strict=True)
    ]
    sink = torch.empty(kernels.PACK, dtype=torch.uint8, device=output.device)
    produce = partial(kernels.produce, parts, lses, sources)
    return produce, partial(kernels.consume, output, sink)


def limits(case: Case, operands: Operands) -> dict[str, Call]:
    """The plain kernels, on what the producer wrote and the consumer reads, and the empty one."""
    narrow = case.has_narrow_output
    packs = kernels.packs_moved(case.bytes(lse=0), narrow)
    memory = [whole(one) for one in (operands[1], operands[3], operands.output)]
    plain: dict[str, Call] = {
        f"plain, {name}": partial(kernels.plain, variant, memory, packs, narrow)
        for name, variant in kernels.BETWEEN_NEIGHBOURS.items()
    }
    return plain | {"empty": partial(kernels.nothing, packs)}


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor's whole storage, as bytes."""
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())
