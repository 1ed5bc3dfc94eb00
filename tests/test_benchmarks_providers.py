"""Who is measured: vLLM's op by its schema, and nobody whose answer is wrong."""

import math
import sys
import types
from dataclasses import replace

import pytest
import torch
from benchmark_support import environment

from benchmarks import check, run, vllm
from benchmarks.cases import FP8, Case
from benchmarks.measure import measure
from benchmarks.operands import Operands, make_operands, vary
from benchmarks.providers import Bound, Provider, providers
from benchmarks.results import Results
from merge_attn_states.reference import merge_attn_states_reference

CPU = torch.device("cpu")


TODAY = """merge_attn_states(Tensor(a!) output, Tensor(b!)? output_lse, Tensor prefix_output,
    Tensor prefix_lse, Tensor suffix_output, Tensor suffix_lse,
    int? prefill_tokens_with_context, Tensor? output_scale=None) -> ()"""
OLDER = """merge_attn_states(Tensor(a!) output, Tensor(b!)? output_lse, Tensor prefix_output,
    Tensor prefix_lse, Tensor suffix_output, Tensor suffix_lse) -> ()"""


@pytest.fixture
def vllm_op():
    """Registers an op in the place of vLLM's, of a given schema, that computes `answer`."""
    if hasattr(torch.ops._C, "merge_attn_states"):
        pytest.skip("vLLM's own op is registered in this process")
    library = torch.library.Library("_C", "FRAGMENT")

    def register(schema, error=0.0):
        def op(output, output_lse, prefix_output, prefix_lse, suffix_output, suffix_lse, *more):
            parts = (prefix_output, prefix_lse, suffix_output, suffix_lse)
            merged, lse = merge_attn_states_reference(*parts, *more)
            output.copy_(merged + error)
            output_lse.copy_(lse)

        library.define(schema)
        library.impl("merge_attn_states", op, "CompositeExplicitAutograd")

    yield register
    library._destroy()
    if "merge_attn_states" in vars(torch.ops._C):
        delattr(torch.ops._C, "merge_attn_states")


def measured_on_cpu(case):
    chosen = [one for one in providers({}) if one.name in ("ours", "vllm")]
    records = measure("small", (case,), chosen, CPU, rounds=1)
    return {record["provider"]: record for record in records}


@pytest.mark.parametrize("schema", [TODAY, OLDER], ids=["today", "older"])
def test_vllm_arguments_by_schema(schema, vllm_op):
    vllm_op(schema)
    names = vllm.argument_names()
    assert names[:3] == ["output", "output_lse", "prefix_output"]
    operands = Operands(*"abcdef", 7, "h")
    assert vllm.arguments(operands) == tuple("afbcde") + (7, "h")[: len(names) - 6]
    assert (vllm.dispatcher() is None) == (schema is OLDER)

    records = measured_on_cpu(Case(8, 2, 16))
    assert records["vllm"]["median_us"] > 0
    with_context = measured_on_cpu(Case(8, 2, 16, context_tokens=3))["vllm"]
    if schema is OLDER:
        assert with_context["status"] == "not supported"
        assert with_context["reason"] == "this release has no prefill_tokens_with_context"
    else:
        assert with_context["median_us"] > 0
    odd = measured_on_cpu(Case(8, 2, 20))["vllm"]
    assert odd["reason"] == "head size 20 is no multiple of 16 bytes"


def test_flashinfer_is_given_its_own_layout_and_base(monkeypatch):
    """merge_state takes [N, H] LSEs in base 2 and makes new outputs."""

    def merge_state(v_a, s_a, v_b, s_b):
        assert s_a.shape == s_b.shape == v_a.shape[:2]
        assert s_a.is_contiguous()
        assert s_b.is_contiguous()
        v, s = merge_attn_states_reference(v_a, s_a.T * math.log(2), v_b, s_b.T * math.log(2))
        return v.to(v_a.dtype), (s.T / math.log(2)).float()

    stub = types.ModuleType("flashinfer")
    stub.merge_state = merge_state
    monkeypatch.setitem(sys.modules, "flashinfer", stub)
    (flashinfer,) = (one for one in providers({}) if one.name == "flashinfer")

    def measured(case):
        records = measure("small", (case,), [flashinfer], CPU, rounds=1)
        return next(one for one in records if one["provider"] == "flashinfer")

    assert measured(Case(8, 2, 16))["median_us"] > 0
    assert measured(Case(8, 2, 16, "float32"))["reason"] == "no float32"
    for refused in (
        Case(8, 2, 16, context_tokens=3),
        Case(8, 2, 16, in_place=True),
        Case(8, 2, 16, output_dtype=FP8),
        Case(8, 2, 16, layout="padded heads"),
        Case(8, 128, 128),
    ):
        assert measured(refused)["status"] == "not supported"
    stub.merge_state = lambda *parts: merge_state(*parts[:3], parts[1])
    assert measured(Case(8, 2, 16))["status"] == "wrong"


def test_a_wrong_answer_is_reported_and_not_timed(vllm_op, tmp_path):
    vllm_op(TODAY, error=0.1)
    records = measured_on_cpu(Case(8, 2, 16))
    assert records["vllm"]["status"] == "wrong"
    assert "median_us" not in records["vllm"]
    assert records["ours"]["median_us"] > 0
    results = Results(environment("H100"))
    results.add("small", results.environment, {}, list(records.values()))
    assert results.speed_up(records["ours"], "vllm") is None
    assert run.report_failures(results, ["small"]) == 0  # another's mistake
    records["ours"] |= {"status": "wrong", "reason": "for the test"}
    assert run.report_failures(results, ["small"]) == 1


def test_a_provider_that_raises_is_reported():
    def bind(operands):
        raise RuntimeError("no such kernel\nand more")

    broken = Provider("flashinfer", lambda case, operands: "", bind)
    record = measure("small", (Case(8, 2, 16),), [broken], CPU, rounds=1)[0]
    assert (record["status"], record["reason"]) == ("failed", "RuntimeError: no such kernel")


WRONG = {
    # An answer that was right in the call before is not taken for this one's.
    "output not written": lambda o: providers({})[0].bind(o._replace(output=o.output.clone())),
    "LSE not written": lambda o: providers({})[0].bind(o._replace(output_lse=None)),
    "NaN in one row past the sample": lambda o: o.output[1].fill_(torch.nan),
    "NaN in one LSE past the sample": lambda o: o.output_lse[0, 1].fill_(torch.nan),
    "LSE of the maximum": lambda o: torch.maximum(o.prefix_lse, o.suffix_lse, out=o.output_lse),
    "a row off by a percent": lambda o: o.output[0].mul_(1.01).add_(0.01),
    "suffix alone": lambda o: o.output.copy_(o.suffix_output),
}


@pytest.mark.parametrize("how", WRONG)
def test_check_sees(how):
    case = Case(200, 2, 16, "float32")  # more tokens than are compared: the 2nd is searched only
    operands = make_operands(case, 1, CPU)[0]
    right = providers({})[0].bind(operands)

    def call():
        if how.endswith("not written"):
            WRONG[how](operands).call()
        else:
            right.call()
            WRONG[how](operands)

    assert check.check(right, operands) == ""
    assert check.check(Bound(call, right.answer), operands) != ""


@pytest.mark.parametrize("lse_elsewhere", [False, True])
def test_check_in_place(lse_elsewhere):
    case = Case(8, 2, 16, context_tokens=4, in_place=True, lse_elsewhere=lse_elsewhere)
    shared = make_operands(replace(case, in_place=False, context_tokens=None), 1, CPU)[0]
    operands = vary(shared, case)
    bound = providers({})[0].bind(operands)
    assert check.check(bound, operands) == ""
    assert check.check(Bound(lambda: None, bound.answer), operands) != ""
