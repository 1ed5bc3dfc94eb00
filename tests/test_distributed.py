"""Merges across ranks: values, disagreement and absence in real processes; refusals in one.

The programs stand in ranks_programs.py. Three ranks, besides two, since with two many an order is
right by chance.
"""

import datetime

import pytest
import ranks_programs as programs
import ranks_support
import torch
import torch.distributed as dist
from support import BF16, E4M3, F32, F64

from merge_attn_states import _direct
from merge_attn_states.distributed import RankMerge

HEADS, SIZE = 6, 16


# On GPUs as NCCL has it, or directly.
@pytest.fixture(
    params=["cpu", *(pytest.param(way, marks=pytest.mark.alone) for way in ("cuda", "direct"))]
)
def where(request):
    return request.param


def run(program, ranks, where, tmp_path, environment, killed=()):
    if where != "cpu" and torch.cuda.device_count() < ranks:
        pytest.skip(f"needs {ranks} GPUs")
    environment = environment | {"MERGE_ATTN_STATES_DIRECT": str(int(where == "direct"))}
    device = "cpu" if where == "cpu" else "cuda"
    ranks_support.run(program, ranks, tmp_path, environment, device, killed)


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("program", [programs.values, programs.whole_on_every_rank])
def test_values(program, ranks, where, tmp_path, child_environment):
    run(program, ranks, where, tmp_path, child_environment)


@pytest.mark.parametrize(
    "program",
    [programs.other_objects, programs.other_calls, programs.gone_group, programs.compiled],
)
def test_two_ranks(program, where, tmp_path, child_environment):
    run(program, 2, where, tmp_path, child_environment)


@pytest.mark.alone
@pytest.mark.parametrize(
    "program", [programs.directly, programs.late_directly, programs.other_numbers_directly]
)
@pytest.mark.parametrize("ranks", [2, 3])
def test_directly(program, ranks, tmp_path, child_environment):
    run(program, ranks, "direct", tmp_path, child_environment)


@pytest.mark.alone
@pytest.mark.parametrize("ranks", [3, 4])
def test_more_ranks_than_gpus(ranks, tmp_path, child_environment):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    environment = child_environment | {"TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES": "1"}
    shared = ranks_support.SHARED
    ranks_support.run(programs.several_on_a_gpu, ranks, tmp_path, environment, shared)


@pytest.mark.parametrize("ranks", [2, 3])
def test_random_calls(ranks, where, tmp_path, child_environment):
    run(programs.random_calls, ranks, where, tmp_path, child_environment)


def test_some_of_the_ranks(where, tmp_path, child_environment):
    run(programs.subgroup, 3, where, tmp_path, child_environment)


# A GPU's stream waits, and not the processor: there the group's watchdog rules.


def test_a_late_rank(tmp_path, child_environment):
    ranks_support.run(programs.late, 3, tmp_path, child_environment)


def test_a_killed_rank(tmp_path, child_environment):
    ranks_support.run(programs.killed, 3, tmp_path, child_environment, killed={2})


@pytest.mark.alone
@pytest.mark.parametrize("ranks", [2, 3])
def test_a_rank_that_is_killed_when_all_are_direct(ranks, tmp_path, child_environment):
    run(programs.killed_directly, ranks, "direct", tmp_path, child_environment, {ranks - 1})


# In one process.

HOW = {"max_tokens": 4, "num_heads": HEADS, "head_size": SIZE, "dtype": F32, "device": "cpu"}


@pytest.fixture(scope="module")
def alone():
    """A group of this process alone."""
    if dist.is_initialized():
        pytest.skip("another test has a process group")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_without_a_group():
    if dist.is_initialized():
        pytest.skip("another test has a process group")
    with pytest.raises(ValueError, match="group: expected one, or a default group"):
        RankMerge(**HOW)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"max_tokens": 0}, "max_tokens: expected 1 or more, got 0"),
        ({"num_heads": -1}, "num_heads: expected 1 or more, got -1"),
        ({"head_size": 0}, "head_size: expected 1 or more, got 0"),
        ({"max_tokens": 4.5}, "max_tokens: expected an int, got float"),
        ({"check": 1}, "check: expected a bool, got int"),
        ({"timeout": 5}, "timeout: expected a timedelta, got int"),
        ({"timeout": datetime.timedelta(0)}, "timeout: expected a millisecond or more, got 0:00"),
        ({"dtype": torch.int32}, r"dtype: expected one of torch\.float32, .*, got torch\.int32"),
        ({"scatter": "tokens"}, "scatter: expected 'heads' or None, got 'tokens'"),
    ],
)
def test_a_wrong_object(wrong, said, alone):
    with pytest.raises((TypeError, ValueError), match=said):
        RankMerge(**HOW | wrong)


def wrong_calls():
    output, lse = torch.zeros(3, HEADS, SIZE), torch.zeros(3, HEADS)
    mask, two = torch.zeros(3, HEADS, dtype=torch.bool), torch.zeros(2, dtype=torch.int32)
    three = torch.zeros(3, dtype=torch.int32)
    yield TypeError, "output: expected a tensor, got list", ([], lse), {}
    yield ValueError, r"output: expected torch\.float32, got", (output.to(BF16), lse), {}
    shape = rf"output: expected shape \[num_tokens, {HEADS}, {SIZE}\], got \[3, 5, {SIZE}\]"
    yield ValueError, shape, (output[:, :5], lse), {}
    yield ValueError, r"output: expected shape .*, got \[3, 6\]", (output[..., 0], lse), {}
    many = output.repeat(2, 1, 1), lse.repeat(2, 1)
    yield ValueError, "output: expected at most max_tokens = 4 tokens, got 6", many, {}
    yield (
        ValueError,
        r"output: expected a dense tensor on cpu, got .* on meta",
        (output.to("meta"), lse),
        {},
    )
    yield ValueError, r"lse: expected shape \[3, 6\], got \[6, 3\]", (output, lse.T), {}
    yield ValueError, r"lse: expected torch\.float32, got torch\.float64", (output, lse.to(F64)), {}
    right = output, lse
    yield TypeError, "out: expected a tensor", right, {"out": 1}
    yield ValueError, "out: expected shape", right, {"out": output[:2]}
    yield ValueError, r"out_lse: expected shape \[3, 6\]", right, {"out_lse": lse.T}
    yield ValueError, "out: expected torch", right, {"out": output.to(E4M3)}
    yield ValueError, r"empty: expected torch\.bool", right, {"empty": lse}
    yield ValueError, r"empty: expected shape \[3, 6\], got \[2, 6\]", right, {"empty": mask[:2]}
    yield TypeError, r"empty: expected bools or \(lengths, starts\), got list", right, {"empty": []}
    starts = r"empty\[1\]: expected the starts of requests, int32 or int64, got"
    yield ValueError, rf"{starts} list", right, {"empty": (two, [0, 1, 2])}
    yield ValueError, rf"{starts} torch\.float32", right, {"empty": (two, three.float())}
    yield ValueError, r"empty\[0\]: expected torch\.int32", right, {"empty": (two.long(), three)}
    shape = r"empty\[1\]: expected shape \[3\], got \[2\]"
    yield ValueError, shape, right, {"empty": (two, two)}
    yield ValueError, "lse_base: expected 'e' or '2', got '10'", right, {"lse_base": "10"}
    yield ValueError, "nan_lse: expected 'visible' or 'empty'", right, {"nan_lse": "no"}
    unwanted = {"out_lse": lse.clone(), "return_lse": False}
    yield ValueError, "out_lse: expected none where return_lse is False", right, unwanted
    grad = output.clone().requires_grad_(), lse
    said = "expected a tensor that does not require grad, since a merge across ranks"
    yield ValueError, f"output: {said}", grad, {}
    grad = output, lse.clone().requires_grad_()
    yield ValueError, f"lse: {said}", grad, {}
    yield ValueError, f"out: {said}", right, {"out": output.clone().requires_grad_()}
    # What only a kernel's own checks can tell.
    yield ValueError, "out: ", right, {"out": torch.zeros(1, HEADS, SIZE).expand(3, -1, -1)}
    memory = torch.zeros(3 * HEADS * SIZE)
    overlapping = {"out": memory.view(3, HEADS, SIZE), "out_lse": memory[: 3 * HEADS].view(3, -1)}
    yield ValueError, "out", right, overlapping
    negative = torch.zeros(3, HEADS, SIZE, dtype=torch.complex64).conj().imag
    yield ValueError, "out: expected a tensor without the negative bit", right, {"out": negative}
    yield ValueError, "expected a dense tensor on cpu", (output.to_sparse(), lse), {}


@pytest.mark.parametrize(("error", "said", "operands", "options"), [*wrong_calls()])
def test_a_wrong_call_sends_nothing(error, said, operands, options, alone, monkeypatch):
    merge = RankMerge(**HOW)
    monkeypatch.setattr(dist, "all_to_all_single", None)
    with pytest.raises(error, match=said):
        merge(*operands, **options)


def test_dtensors_are_refused_by_name(alone):
    distribute = pytest.importorskip("torch.distributed.tensor").distribute_tensor
    mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
    output, lse = torch.zeros(3, HEADS, SIZE), torch.zeros(3, HEADS)
    with pytest.raises(ValueError, match="lse: expected this rank's own tensor, got a DTensor"):
        RankMerge(**HOW)(output, distribute(lse, mesh))


def test_an_lse_may_have_a_trailing_1(alone):
    merge, output, lse = RankMerge(**HOW), torch.randn(3, HEADS, SIZE), torch.randn(3, HEADS)
    due = merge(output, lse)
    out_lse = torch.empty(3, HEADS, 1)
    merged, merged_lse = merge(output, lse[..., None], out_lse=out_lse)
    assert merged_lse is out_lse
    assert torch.equal(merged, due[0])
    assert torch.equal(merged_lse[..., 0], due[1])


def test_an_interrupt_is_remembered(alone, monkeypatch):
    """The others wait for a call that will not come again."""

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    merge, operands = RankMerge(**HOW), (torch.zeros(3, HEADS, SIZE), torch.zeros(3, HEADS))
    monkeypatch.setattr(dist, "all_to_all_single", interrupt)
    with pytest.raises(KeyboardInterrupt):
        merge(*operands)
    monkeypatch.undo()
    with pytest.raises(RuntimeError, match=r"failed before \(KeyboardInterrupt\)"):
        merge(*operands)


def test_operands_that_require_grad_are_taken_where_none_is_recorded(alone):
    output, lse = torch.ones(3, HEADS, SIZE, requires_grad=True), torch.zeros(3, HEADS)
    with torch.no_grad():
        merged, _ = RankMerge(**HOW)(output, lse)
    assert torch.equal(merged, output)


def test_it_says_how_states_travel(alone):
    assert RankMerge(**HOW).transport == "collective"


@pytest.mark.parametrize(
    ("ranks", "dtype", "shape", "said"),
    [
        (2, BF16, (512, 128, 512), ""),
        (16, F32, (512, 128, 2048), ""),
        (1, BF16, (512, 128, 512), "2 to 16 ranks are direct, not 1"),
        (17, BF16, (512, 128, 512), "2 to 16 ranks are direct, not 17"),
        (2, F64, (512, 128, 512), "float32, float16 and bfloat16 are direct, not torch.float64"),
        (2, BF16, (4, 2, 12), "rows of 16 to 8192 bytes, in steps of 16, are direct, not 24"),
        (2, F32, (4, 2, 2052), "rows of 16 to 8192 bytes, in steps of 16, are direct, not 8208"),
        (2, BF16, (2**25, 64, 8), "fewer than 2^31 rows are direct, not 2147483648"),
    ],
)
def test_which_states_travel_directly(ranks, dtype, shape, said):
    assert _direct.unfit(ranks, dtype, shape) == said


def test_one_line_says_why_states_do_not_travel_directly(alone, monkeypatch, caplog):
    monkeypatch.delenv("MERGE_ATTN_STATES_DIRECT", raising=False)
    device, shape = torch.device("cuda"), (4, HEADS, SIZE)
    given = (alone, device, F32, shape, True, None)

    def gather(numbers):
        return [numbers, numbers]

    def elsewhere(numbers):
        return [numbers, [*numbers[:-1], numbers[-1] + 1]]

    def without_it(numbers):
        return [numbers, [0, 0, numbers[-1]]]

    def said(gather):
        caplog.clear()
        assert _direct.make_direct(gather, *given) is None
        return [record.getMessage() for record in caplog.records]

    assert said(gather) == []  # a rank alone sends nothing
    monkeypatch.setattr(dist, "get_world_size", lambda _: 17)
    assert said(gather) == ["states travel by collectives: 2 to 16 ranks are direct, not 17"]
    monkeypatch.setattr(dist, "get_world_size", lambda _: 2)
    (line,) = said(elsewhere)
    assert line.endswith("the ranks are on several machines")
    (line,) = said(without_it)
    assert line.endswith("a rank has MERGE_ATTN_STATES_DIRECT=0")

    def refuse(*_):
        raise RuntimeError("no access\nfrom GPU 0 to GPU 1")

    monkeypatch.setattr(_direct, "Direct", refuse)
    (line,) = said(gather)
    assert line.endswith("collectives: no access")
    monkeypatch.setenv("MERGE_ATTN_STATES_DIRECT", "0")
    assert said(gather) == []  # on every rank


def test_a_step_of_all_ranks_is_taken_by_all_or_none():
    direct, heard = object.__new__(_direct.Direct), []

    def gather(numbers, of_another=1):
        heard.append(numbers)
        return [numbers, [of_another]]

    def fail():
        raise ImportError("no such module")

    direct._gather = gather
    assert direct._together(lambda: "made") == "made"
    with pytest.raises(RuntimeError, match="ImportError: no such module"):
        direct._together(fail)
    assert heard == [[1], [0]]
    direct._gather = lambda numbers: gather(numbers, 0)
    with pytest.raises(RuntimeError, match="another rank cannot"):
        direct._together(lambda: "made")


def test_the_time_limit_is_the_groups(alone):
    limit = datetime.timedelta(minutes=7)
    group = dist.new_group(timeout=limit)
    assert _direct._limit_of(group, torch.device("cpu")) == limit
    assert _direct._limit_of(None, torch.device("cpu")) == datetime.timedelta(minutes=10)


def test_the_operator_refuses_what_requires_grad():
    output = torch.zeros(3, HEADS, SIZE, requires_grad=True)
    fixed, peers = output.detach(), torch.zeros(9, dtype=torch.int64)
    given = (None, None, None, False, False, False, peers)
    with pytest.raises(ValueError, match="output: expected a tensor that does not require grad"):
        torch.ops.merge_attn_states.merge_ranks(fixed, fixed[..., 0], output, fixed[..., 0], *given)


def test_a_buffer_for_the_output(alone):
    merge = RankMerge(**HOW)
    output = merge.output_buffer(3)
    assert output.shape == (3, HEADS, SIZE)
    assert merge.output_buffer(4).data_ptr() == output.data_ptr()
    output.copy_(torch.randn(output.shape))
    assert torch.equal(merge(output, torch.zeros(3, HEADS))[0], output)
    for wrong in (-1, 5):
        said = f"num_tokens: expected 0 to max_tokens = 4, got {wrong}"
        with pytest.raises(ValueError, match=said):
            merge.output_buffer(wrong)
