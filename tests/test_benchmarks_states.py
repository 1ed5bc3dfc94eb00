"""The group of many parts: its answers are checked, and its cases are what they say."""

import sys
from argparse import Namespace
from dataclasses import replace

import pytest
import torch
from benchmark_support import stand_in_kernels

from benchmarks import process, states
from benchmarks.providers import Provider, prepare
from benchmarks.states_cases import GROUPS, StatesCase, make_states

CPU = torch.device("cpu")
BY_NAME = {provider.name: provider for provider in states.PROVIDERS}
KINDS = {case.kind: case for case in reversed(GROUPS["states"])}  # the first of each


def small(case: StatesCase) -> StatesCase:
    """More tokens than are compared, and of an index some runs of rows."""
    return replace(case, rows=(*case.rows[:-2], 256, 2), parts=min(case.parts, 5))


@pytest.fixture(autouse=True)
def _eager_in_place_of_compiled(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: function)


def spoiled(call, how):
    """A provider that calls, and then makes something of its answer."""

    def spoil():
        output, lse, *rest = call()
        output, lse = (
            [each.clone() for each in x] if isinstance(x, (list, tuple)) else x.clone()
            for x in (output, lse)
        )
        how(*(x[-1] if isinstance(x, list) else x for x in (output, lse)))  # of gradients the last
        return output, lse, *rest

    return spoil


WRONG = {
    "output not written": lambda output, lse: output.fill_(torch.nan),
    "LSE not written": lambda output, lse: lse.fill_(torch.nan),
    "NaN in a row past the sample": lambda output, lse: output[..., 1, :, :].fill_(torch.nan),
    "the last token off": lambda output, lse: output[..., -1, :, :].mul_(1.1).add_(0.1),
    "LSE off": lambda output, lse: lse.add_(0.01),
}


@pytest.mark.parametrize("how", WRONG)
@pytest.mark.parametrize("kind", KINDS)
def test_a_wrong_answer_is_seen(kind, how):
    (operands,) = make_states(small(KINDS[kind]), 1, CPU)
    right = BY_NAME["ours"].bind(operands)
    assert states.check_states(right, operands) == ""
    assert states.check_states(spoiled(right, WRONG[how]), operands) != ""


@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"ring step", "zigzag half", "backward"}))
def test_an_answer_of_the_call_before_is_not_taken_for_this_ones(kind):
    (operands,) = make_states(small(KINDS[kind]), 1, CPU)
    BY_NAME["ours"].bind(operands)()
    assert states.check_states(lambda: operands.merged, operands) == "NaN in the answer"


@pytest.mark.parametrize("kind", KINDS)
def test_everybody_agrees(kind):
    asked = [one for one in states.PROVIDERS if one.name != "flashinfer"]
    timed, refused = prepare(asked, make_states(small(KINDS[kind]), 2, CPU), states.check_states)
    assert all(why.startswith("not supported: ") for why in refused.values())
    others = {"list": {"pair", "eager", "compile"}, "stack": {"chain", "eager", "compile"},
              "base 2": {"pair"}, "index": set(), "backward": set()}  # fmt: skip
    assert set(timed) == {"ours"} | others.get(kind, {"eager", "compile"})


def test_flashinfers_operands_are_its_own(monkeypatch):
    """[tokens, parts, heads, size] and base 2; so is its answer."""

    class FlashInfer:
        @staticmethod
        def merge_states(outputs, lses):
            assert outputs.shape == (256, 4, 2, 128)
            assert outputs.is_contiguous()
            assert lses.is_contiguous()
            merged, lse = states.merge_many(
                outputs.transpose(0, 1), lses.transpose(0, 1) * states.LN2
            )
            return merged, lse / states.LN2

    monkeypatch.setitem(sys.modules, "flashinfer", FlashInfer)
    case = small(replace(KINDS["list"], parts=4))
    timed, refused = prepare(
        [BY_NAME["flashinfer"]], make_states(case, 1, CPU), states.check_states
    )
    assert refused == {}
    assert set(timed) == {"flashinfer"}


@pytest.mark.parametrize(
    ("kind", "parts", "rows", "moved"),
    [
        # 1,000 rows of 128 in bfloat16 and their LSEs: 260,000 bytes; in float32: 516,000.
        ("list", 4, (100, 10), 5 * 260_000),
        ("stack", 16, (100, 10), 17 * 260_000),
        ("split", 256, (100, 10), 257 * 260_000),
        ("base 2", 2, (100, 10), 3 * 260_000),
        ("index", 3, (100, 10), 3 * 130_000 + 260_000 + 3 * 400),
        ("ring step", 2, (1, 100, 10), 260_000 + 2 * 516_000),
        ("zigzag half", 2, (1, 100, 10), 130_000 + 516_000),
        ("backward", 2, (100, 10), 4 * 260_000 + 256_000),
    ],
)
def test_bytes(kind, parts, rows, moved):
    assert StatesCase(kind, parts, rows, "cold").bytes() == moved


def test_operands_are_as_large_as_their_bytes():
    for kind in ("list", "ring step", "zigzag half"):
        (o,) = make_states(small(KINDS[kind]), 1, CPU)
        tensors = [*o.merged, o.outputs, o.lses] + [*o.merged] * o.case.is_ring
        assert sum(x.numel() * x.element_size() for x in tensors) == o.case.bytes()
    for case in GROUPS["cpu"]:
        assert 99e6 < case.bytes() < 101e6


def test_names_differ():
    for cases in GROUPS.values():
        assert len({case.name for case in cases}) == len(cases)


@pytest.mark.parametrize("case", GROUPS["states"], ids=lambda case: f"{case.regime}, {case.name}")
def test_measures(case, monkeypatch):
    given = stand_in_kernels(monkeypatch)
    case = small(case)
    asked = [one for one in states.PROVIDERS if one.name != "flashinfer"]
    record = states.measure(case, asked, CPU, 1)
    assert {name: record[name] for name in ("case", "kind", "size", "parts", "regime")} == {
        "case": case.name, "kind": case.kind, "size": "256x2", "parts": case.parts,
        "regime": case.regime}  # fmt: skip
    assert record.get("kernel") == (None if case.kind == "backward" else "cpu")
    us = record["us"]
    assert "ours" in us
    limits = {name for name in us if name.startswith("plain, ")}
    if case.regime == "neighbours":
        assert us.pop("neighbours") == 2  # the producer and the consumer
        assert set(us.values()) == {1}  # what is added: a call of the stand-in timer
        assert len(limits) == 3
        assert set(given["plain_many"]) == {(case.parts + 1) * 256 * 2 * 256}  # no LSEs
    elif case.regime == "host":
        assert us["warm-up"] > 0
    elif case.kind in ("list", "stack"):
        assert len(limits) == 8
        size = case.bytes()  # to within 256 bytes a buffer
        assert all(abs(moved - size) <= 256 * (case.parts + 1) for moved in given["plain_many"])
    elif case.kind == "split":
        assert len(limits) == 1
    else:
        assert len(limits) == 12
        assert all(abs(moved - case.bytes()) <= 24 for moved in given["plain"])


def test_without_dependent_launches_the_limit_has_none(monkeypatch):
    stand_in_kernels(monkeypatch)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    for kind, count in (("stack", 4), ("ring step", 6)):
        case = replace(small(KINDS[kind]), regime="cold")
        record = states.measure(case, states.PROVIDERS[:1], CPU, 1)
        assert len(record["us"]) == 1 + count


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_on_a_cpu(dtype):
    case = StatesCase("list", 4, (16, 2), "cpu", dtype)
    record = states.measure(case, states.ON_A_CPU, CPU, 1)
    assert record["refused"] == {}
    assert set(record["us"]) == {"ours", "eager", "add"}


@pytest.mark.parametrize(
    ("group", "text", "missing", "asked"),
    [
        ("states", "ring step", {}, [*BY_NAME]),
        ("states", "8 x 64x16", {"flashinfer": "not installed"}, [*BY_NAME][:-1]),
        ("cpu", "4 x 1200x64", {}, ["ours", "eager"]),
    ],
)
def test_the_group(group, text, missing, asked, monkeypatch):
    seen = []

    def measure(case, providers, device, rounds):
        assert device == CPU
        assert [one.name for one in providers] == asked
        seen.append(case.name)
        return {}

    monkeypatch.setattr(states, "measure", measure)
    chosen = Namespace(device=CPU, rounds=1, case=text)
    process.measure_group(group, chosen, missing)
    assert seen == [case.name for case in GROUPS[group] if text in case.name]
    assert seen


def test_who_is_wrong_is_not_timed():
    wrong = Provider("wrong", lambda o: lambda: (o.out.zero_(), o.out_lse.zero_()))
    operands = make_states(small(KINDS["list"]), 1, CPU)
    timed, refused = prepare([BY_NAME["ours"], wrong], operands, states.check_states)
    assert set(timed) == {"ours"}
    assert refused["wrong"].startswith("wrong: Tensor-likes are not close!")
