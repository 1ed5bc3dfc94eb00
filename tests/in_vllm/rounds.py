"""What rounds of an engine's answers come to: who takes which, and how two of them differ."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from .scenarios import Answers

ROUNDS = 10  # timed, for each
Round = dict[str, Any]  # each step's microseconds, and each call's by what it is called


def differences(ours: Answers, theirs: Answers) -> dict[str, Any]:
    """How many tokens are the same, and how far the log-probabilities are apart until one is not.

    After the first other token, two answers are answers to two questions.
    """
    same, compared, tokens, largest = 0, 0, 0, 0.0
    for one, other in zip(ours, theirs, strict=True):
        tokens += len(one)
        same += sum(a[0] == b[0] for a, b in zip(one, other, strict=True))
        for (token, logprob), (their_token, their_logprob) in zip(one, other, strict=True):
            if token != their_token:
                break
            compared += 1
            largest = max(largest, abs(logprob - their_logprob))
    return {
        "tokens": tokens,
        "same_tokens": same,
        "compared_logprobs": compared,
        "largest_logprob_difference": largest,
    }


def compared(ours: list[float], theirs: list[float], rounding: float = 0.0) -> dict[str, Any]:
    """Ours is further off where it is so by more than a rounding."""
    excess = [a - b for a, b in zip(ours, theirs, strict=True) if a > b + rounding]
    return {
        "calls": len(ours),
        "ours": max(ours),
        "vllm": max(theirs),
        "further_off": len(excess),
        "largest_excess": max(excess, default=0.0),
    }


def in_turn(
    providers: Iterable[str], timed: Callable[[str], tuple[Round, Answers]]
) -> tuple[dict[str, list[Round]], dict[str, list[Answers]]]:
    """Each provider's rounds, and its answers in each."""
    rounds: dict[str, list[Round]] = {name: [] for name in providers}
    answers: dict[str, list[Answers]] = {name: [] for name in rounds}
    for index in range(1 + ROUNDS):  # the first warms up
        for name in sorted(rounds, reverse=bool(index % 2)):
            one, answer = timed(name)
            if index:
                rounds[name].append(one)
                answers[name].append(answer)
    return rounds, answers


def all_differences(
    answers: dict[str, list[Answers]], exact: Answers, first: Answers, checked: Answers
) -> dict[str, dict[str, Any]]:
    ours, theirs = answers["ours"], answers["vllm"]
    return {
        "with the plugin, and without": differences(ours[0], theirs[0]),
        "with the plugin, and a float64 merge": differences(ours[0], exact),
        "without it, and a float64 merge": differences(theirs[0], exact),
        "with the plugin, twice": differences(ours[0], ours[-1]),
        "without it, twice": differences(theirs[0], theirs[-1]),
        "with the plugin, watched and not": differences(first, checked),
    }
