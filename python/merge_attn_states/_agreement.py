"""What ranks must agree about: each tells the others its numbers, or that it refuses."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

__all__ = ["Gather", "agree", "caught", "failed_before", "first_line"]

_Result = TypeVar("_Result")
Gather = Callable[[list[int]], list[list[int]]]  # every rank's numbers, of one's own


def caught(
    check: Callable[..., _Result], *given: Any
) -> tuple[_Result, None] | tuple[None, Exception]:
    """What a check returns or refuses with: the other ranks hear of that first."""
    try:
        return check(*given), None
    except (TypeError, ValueError) as error:
        return None, error


def agree(
    gather: Gather,
    refusal: Exception | None,
    numbers: Mapping[str, int],
    meanings: Mapping[str, Sequence[Any]],
) -> None:
    """Raise on every rank where one refuses, or has another number than rank 0.

    Ranks that refuse give as many numbers as the others. `meanings` has what a number stands for.
    """
    of_ranks = gather([int(refusal is not None), *numbers.values()])
    if refusal:
        raise refusal
    for rank, there in enumerate(of_ranks):
        if there[0]:
            raise ValueError(f"rank {rank} of the group refuses its arguments, and says why")
    for i, name in enumerate(numbers, 1):
        for rank, there in enumerate(of_ranks):
            if there[i] != of_ranks[0][i]:
                one, other = (
                    repr(meanings[name][x[i]]) if name in meanings else x[i]
                    for x in (of_ranks[0], there)
                )
                raise ValueError(
                    f"{name}: expected the same on every rank, got {one} on rank 0 and {other} on "
                    f"rank {rank}"
                )


def failed_before(why: str) -> RuntimeError:
    """What every call is after one that failed when ranks had sent something."""
    return RuntimeError(
        f"an exchange of this RankMerge failed before ({why}), so that the ranks no longer agree "
        "which call is theirs: make a new group, and a new one of it"
    )


def first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
