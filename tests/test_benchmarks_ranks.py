"""The group of merges across ranks: all ranks measure together, and wrong answers are seen."""

import functools
import os
import re
import sys
from types import ModuleType, SimpleNamespace

import pytest
import ranks_support
import torch
import torch.distributed as dist
from benchmark_support import synthetic, synthetic_ranks
from torch.distributed import _symmetric_memory as symmetric

from benchmarks import layers, options, ranks, report, run, timing, vllm
from benchmarks.cases import ATTENTION, EAGERLY, TRAINING, Case
from benchmarks.environment import ROOT
from benchmarks.providers import Provider, prepare
from benchmarks.results import Results
from benchmarks.tables import group_tables
from benchmarks.targets import TARGETS, targets_table
from merge_attn_states.integrations import context_parallel

CPU = torch.device("cpu")
SMALL = Case(200, 6, 16, kind=EAGERLY)
BY_NAME = {provider.name: provider for provider in ranks.PROVIDERS}
LEAVES_THREADS = True  # functional collectives: see ranks_support.py


largest_of_ranks = functools.partial(ranks.largest_of_ranks, CPU)


@pytest.fixture
def alone():
    """A group of one rank."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def environment(child_environment):
    paths = os.pathsep.join([child_environment["PYTHONPATH"], str(ROOT)])
    return child_environment | {"PYTHONPATH": paths}


# Answers.


def spoiled(how):
    """A provider of whose right answer something is made."""

    def bind(o):
        def call():
            output, lse = o.collective(o.output, o.lse)
            return how(o, output, lse)

        return call

    return Provider("wrong", bind)


def on_the_last_rank(o, output, lse):
    return output.mul_(1 + (o.rank == o.ranks - 1)), lse


WRONG = {
    "nothing is written": lambda o, output, lse: (torch.empty_like(output), torch.empty_like(lse)),
    "NaN in one token": lambda o, output, lse: (output[1].fill_(torch.nan), output, lse)[1:],
    "the last token off": lambda o, output, lse: (output[-1].mul_(1.1).add_(0.1), output, lse)[1:],
    "LSE off": lambda o, output, lse: (output, lse.add_(0.01)),
    "its own part alone": lambda o, output, lse: o.shares()[0][o.rank],
    "another rank's heads": lambda o, output, lse: output.roll(1, 1),
    "right on all ranks but one": on_the_last_rank,
}


def answers(rank, count, device):
    """Everybody that a CPU has agrees; who is wrong on one rank is timed on none."""
    check = functools.partial(ranks.check_ranks, largest=largest_of_ranks)
    o = ranks.Ranks(SMALL, device)
    assert (o.rank, o.ranks) == (rank, count)
    timed, refused = prepare(ranks.PROVIDERS[:4], [o], check)
    assert set(timed) == {"ours collective", "eager"}
    why = "not supported: states travel by collective here"
    assert refused == {"ours": why, "ours in its buffer": why}
    for name in refused:  # by collectives those two are right as well
        assert check(BY_NAME[name].bind(o), o) == ""
    o.buffer.zero_()
    assert check(BY_NAME["ours in its buffer"].bind(o), o) != ""  # it is read there
    for name, how in WRONG.items():
        timed, refused = prepare([spoiled(how)], [o], check)
        assert not timed, name
        assert refused["wrong"].startswith("wrong: "), name
    kept = o.collective(o.output, o.lse)  # an answer of the call before, where a new one should lie
    timed, refused = prepare([Provider("stale", lambda o: lambda: kept)], [o], check)
    assert refused == {"stale": "wrong: NaN in the answer"}
    # Who writes into what it is given has something that the others do not see.
    writes = Provider(
        "writes", lambda o: lambda: (*o.collective(o.scratch, o.lse), o.scratch.zero_())
    )
    assert prepare([writes], [o], check)[1] == {}
    assert o.output.count_nonzero() > 0

    record = ranks.measure_merge(ranks.PROVIDERS[:4], SMALL, device, 2, largest_of_ranks)
    assert set(record["us"]) == {"ours collective", "eager", "all-to-all"}
    every_rank = [None] * count
    dist.all_gather_object(every_rank, record)
    assert every_rank == [record] * count  # the slowest rank's, on all of them


@pytest.mark.parametrize("count", [2, 3])
def test_answers(count, tmp_path, environment):
    ranks_support.run(answers, count, tmp_path, environment)


# vLLM's, by stand-ins that have its signatures.

SCHEMA = """direct_dcp_a2a_lse_reduce(Tensor partial_output, Tensor partial_lse, Tensor? seq_lens,
    Tensor? query_start_loc, Tensor peer_output_ptrs, Tensor peer_lse_ptrs,
    Tensor peer_signal_ptrs, Tensor(a!) received_output, Tensor(b!) received_lse,
    Tensor(c!) received_signal, Tensor(d!) epoch, Tensor(e!) combined_output, int world_size,
    int rank, int max_num_tokens, bool is_lse_base_on_e) -> ()"""


def test_vllms_op_gets_what_its_workspace_gives(alone, monkeypatch):
    if hasattr(torch.ops._C, "direct_dcp_a2a_lse_reduce"):
        pytest.skip("vLLM's own op is registered in this process")
    seen = []

    def rendezvous(memory, group_name):
        assert group_name == dist.group.WORLD.group_name
        assert not memory.any()
        return SimpleNamespace(
            barrier=lambda: seen.append("barrier"),
            get_buffer=lambda peer, shape, dtype, offset: memory.view(dtype).view(shape)[offset:],
        )

    def op(output, lse, lengths, starts, *given):
        pointers, received, (epoch, merged), numbers = given[:3], given[3:6], given[6:8], given[8:]
        assert lengths is None
        assert starts is None
        shapes = [tuple(memory.shape) for memory in received]
        assert shapes == [(2, 1, 200, 6, 16), (2, 1, 200, 6), (2, 1)]
        assert [x.dtype for x in received] == [torch.bfloat16, torch.float32, torch.int32]
        assert [x.tolist() for x in pointers] == [[x.data_ptr()] for x in received]
        assert {x.dtype for x in pointers} == {epoch.dtype} == {torch.int64}
        assert (tuple(epoch.shape), tuple(lse.shape)) == ((1,), (200, 6))
        assert numbers == (1, 0, 200, True)
        seen.append("call")
        merged.copy_(output)

    monkeypatch.setattr(symmetric, "empty", torch.empty)
    monkeypatch.setattr(symmetric, "rendezvous", rendezvous)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: seen.append("synchronize"))
    library = torch.library.Library("_C", "FRAGMENT")
    library.define(SCHEMA)
    library.impl("direct_dcp_a2a_lse_reduce", op, "CompositeExplicitAutograd")
    try:
        check = functools.partial(ranks.check_ranks, largest=list)
        timed, refused = prepare([BY_NAME["vllm"]], [ranks.Ranks(SMALL, CPU)], check)
    finally:
        library._destroy()
        vars(torch.ops._C).pop("direct_dcp_a2a_lse_reduce", None)  # the namespace remembers it
    assert refused == {}
    assert list(timed) == ["vllm"]
    assert seen == ["synchronize", "barrier"] * 3 + ["call"] * 4  # the check is made twice


def test_vllms_functions_get_its_group(alone, monkeypatch):
    class Communicator:
        def __init__(self, cpu_group, device=None, device_group=None):
            assert (cpu_group, device) == (dist.group.WORLD, CPU)
            self.device_group = device_group

    def merge(output, lse, group):
        """Writes into what it is given, as vLLM's does."""
        assert isinstance(group, Communicator)
        assert group.device_group is dist.group.WORLD
        merged = output.clone()
        output.zero_()
        return merged

    functions = {"cp_lse_ag_out_rs": merge, "dcp_a2a_lse_reduce": merge}
    made = {vllm.RANKS: functions, vllm.COMMUNICATOR: {"DeviceCommunicatorBase": Communicator}}
    for name, content in made.items():
        module = ModuleType(name)
        vars(module).update(content)
        for parent in ("vllm", *(name.rpartition(".")[:1])):
            monkeypatch.setitem(sys.modules, parent, ModuleType(parent))
        monkeypatch.setitem(sys.modules, name, module)
    asked = [BY_NAME["vLLM AG + RS"], BY_NAME["vLLM A2A"]]
    check = functools.partial(ranks.check_ranks, largest=list)
    timed, refused = prepare(asked, [ranks.Ranks(SMALL, CPU)], check)
    assert refused == {}
    assert len(timed) == 2


def test_a_package_that_is_not_there_is_a_reason(alone, monkeypatch):
    monkeypatch.setitem(sys.modules, vllm.RANKS, None)
    check = functools.partial(ranks.check_ranks, largest=list)
    timed, refused = prepare([BY_NAME["vLLM A2A"]], [ranks.Ranks(SMALL, CPU)], check)
    assert timed == {}
    assert refused["vLLM A2A"].startswith("failed: ModuleNotFoundError: ")


# The timer, with ranks that stand in for others.


def test_on_the_host_the_slowest_rank_counts():
    order = []

    def largest(values):
        order.append(len(values))
        return [2 * value for value in values]  # another rank takes twice as long

    def timed(calls):
        order.append("a")
        return 1e-6 * calls

    before = functools.partial(order.append, "before")
    found = timing.time_host({"a": timed}, {"a": 10}, 3, before, largest)
    assert found["a"] == pytest.approx((2, 2, 2))
    # Each row of calls, of those that warm up too, begins on all ranks at once.
    assert order == ["before", 0, "a"] * 5 + [3]


def test_on_gpus_the_slowest_rank_counts_and_all_call_as_often(monkeypatch):
    order, captured = [], []

    class Event:
        def record(self):
            order.append("event")

        def synchronize(self):
            pass

        def elapsed_time(self, end):
            return 0.05  # 50 us for a lead of 4 calls: 80 make a millisecond

    class Graph:
        replay = staticmethod(lambda: order.append("replay"))
        pool = staticmethod(lambda: None)

    def capture(calls, repeats, pool):
        captured.append(repeats * len(calls))
        return Graph()

    def largest(values):
        order.append(len(values))
        return [
            1.5 * value for value in values
        ]  # another rank was faster at first, and then slower

    monkeypatch.setattr(timing, "_events", lambda: [Event(), Event()])
    monkeypatch.setattr(timing._Replays, "_capture", staticmethod(capture))
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: order.append("sleep"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: order.append("synchronize"))
    found = timing.time_cuda({"a": [lambda: None]}, 3, largest)
    assert captured == [4, 120]
    assert found["a"] == pytest.approx((1.5 * 50 / 120,) * 3)
    first = order.index("sleep") - 1
    # A round begins when all ranks have come, of whom none has work left over.
    a_round = [0, "sleep", "replay", "event", "replay", "event", "synchronize"]
    assert order[first:] == a_round * 5 + [3]


# A layer of attention under context parallel.


def scaled_dot_product_attention(query, key, value, is_causal):
    """What PyTorch's context parallel makes of attention on a GPU, of its DTensors."""
    from torch.distributed.tensor import DTensor, Shard
    from torch.distributed.tensor.experimental._context_parallel import _attention

    def attend(query, key, value, is_causal):
        merges.append(context_parallel.is_enabled())
        scores = (query @ key.mT).float() / query.shape[-1] ** 0.5
        if is_causal:
            scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -torch.inf)
        return (scores.softmax(-1).to(value.dtype) @ value).contiguous(), scores.logsumexp(-1)

    assert _attention._cp_options.enable_load_balance
    if refusals:
        raise NotImplementedError(*refusals)
    local = [x.to_local() for x in (query, key, value)]
    group, options = dist.group.WORLD, {"is_causal": is_causal}
    out, _ = _attention._templated_ring_attention(group, 2, attend, *local, **options)
    return DTensor.from_local(out, query.device_mesh, [Shard(2)])


merges = []  # whether each block is merged by ours
refusals = []  # what attention says instead of an answer


def layer(rank, count, device):
    """Both ways are timed, each by its own merge, and ours is refused where it is wrong."""
    torch.nn.functional.scaled_dot_product_attention = scaled_dot_product_attention
    case = Case(8, 2, 16, kind=ATTENTION)
    record = layers.measure(case, device, 1, largest_of_ranks)
    assert set(record["us"]) == {"ours", "PyTorch"}
    assert record["refused"] == {}
    # A call each to be compared, and two for each round: one is timed and two warm up.
    assert merges.count(True) == merges.count(False) == count * (1 + 2 * 3)
    assert not context_parallel.is_enabled()

    record = layers.measure(Case(8, 2, 16, kind=TRAINING), device, 1, largest_of_ranks)
    assert set(record["us"]) == {"ours", "PyTorch"}

    update_state = context_parallel.update_state
    if rank == 1:  # but the other says so too
        context_parallel.update_state = lambda out, lse, *block: out.zero_()
    record = layers.measure(case, device, 1, largest_of_ranks)
    assert set(record["us"]) == {"PyTorch"}
    assert record["refused"]["ours"].startswith("wrong: ")
    context_parallel.update_state = None
    record = layers.measure(case, device, 1, largest_of_ranks)
    assert record["us"] == {}
    assert record["refused"] == {"ours": "failed: TypeError: 'NoneType' object is not callable"}
    assert not context_parallel.is_enabled()
    context_parallel.update_state = update_state

    refusals.append("not here")  # PyTorch's own part of it fails
    record = layers.measure(case, device, 1, largest_of_ranks)
    assert record["us"] == {}
    assert record["refused"] == {"PyTorch": "failed: NotImplementedError: not here"}


def layer_of_gpus(rank, count, device):
    for kind in (ATTENTION, TRAINING):
        case = Case(256, 2, 64, kind=kind)
        largest = functools.partial(ranks.largest_of_ranks, device)
        assert set(layers.measure(case, device, 1, largest)["us"]) == {"ours", "PyTorch"}


def test_a_layer(tmp_path, environment):
    pytest.importorskip("torch.distributed.tensor.experimental._context_parallel._attention")
    ranks_support.run(layer, 2, tmp_path, environment)


# The command, and what is published.


def test_the_command_measures(capfd):
    asked = ["--device", "cpu", "--only", "ranks", "--case", "8x16", "--rounds", "1"]
    assert run.main([*asked, "--processes", "1"]) == 0
    said = capfd.readouterr().out
    number = r"\d+(\.\d+)?"
    absent = r"not supported \| not supported"
    row = rf"\| 8x16x128 bf16, eager calls \| {absent} \| {number} \| - \| - \| {number} \| - "
    assert re.search(rf"{row}\| - \| - \| - \| - \| {number} \|\n", said), said
    assert "across two GPUs" not in said


@pytest.mark.alone
def test_the_command_measures_on_gpus(capfd):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    asked = ["--only", "ranks", "--case", "64x32x128", "--rounds", "1", "--processes", "1"]
    assert run.main(asked) == 0
    said = capfd.readouterr().out
    for case in ("64x32x128 bf16", "64x32x128 bf16, eager calls"):
        row = rf"\| {case} \| [^|]* \| [^|]* \| \d+"  # whether there is a direct way or not
        assert re.search(row, said), said


@pytest.mark.alone
def test_a_layer_of_two_gpus(tmp_path, environment):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    ranks_support.run(layer_of_gpus, 2, tmp_path, environment, "cuda")


@pytest.mark.parametrize(
    ("arguments", "gpus"),
    [(["--only", "ranks", "cpu"], 2), (["--only", "ranks"], 1)],
    ids=["others beside it", "one GPU"],
)
def test_ranks_are_measured_alone_and_by_two(arguments, gpus, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    chosen = run.parser().parse_args(["--device", "cpu", *arguments])
    chosen.device = torch.device("cuda")
    with pytest.raises(SystemExit, match="ranks: measured alone, on two GPUs or more or a CPU"):
        options.groups(chosen)
    assert "ranks" not in options.groups(run.parser().parse_args(["--device", "cpu"]))


def test_a_file_of_ranks_names_all_its_gpus(monkeypatch, tmp_path):
    monkeypatch.setattr(run.environment, "identity", lambda *_: {"gpu": "NVIDIA H100 80GB HBM3"})
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    chosen = run.parser().parse_args(["--device", "cpu", "--only", "ranks"])
    chosen.device = torch.device("cuda")
    assert run.open_results(chosen)[0].gpu == "4 x H100"
    monkeypatch.setattr(run.environment, "sources", lambda _: {"dirty": False, "commit": ""})
    chosen.output = tmp_path / "h100.json"
    synthetic().save(chosen.output)  # of one
    with pytest.raises(SystemExit, match="holds other results: gpu is '4 x NVIDIA H100"):
        run.open_results(chosen)


def test_targets_of_two_gpus():
    results = synthetic_ranks()
    rows = {row[0]: row[1:] for row in targets_table(results)[1]}
    assert {row.partition(",")[0] for row in rows} == {"across two GPUs"}
    text = "across two GPUs, time of vLLM's direct op over ours, 1x128x512"
    assert rows[text] == [">= 3.2", "3.400", "met", "1x128x512 bf16"]
    (record,) = results.select("ranks", kind="contiguous", size="1x128x512")
    record["us"]["vllm"] = [3.1 * us for us in record["us"]["ours"]]
    rows = {row[0]: row[1:] for row in targets_table(results)[1]}
    assert rows[text][1:3] == ["3.100", "missed"]
    # Where there is no direct way its targets are missed; that of the collective is not.
    del record["us"]["ours"]
    record["refused"]["ours"] = "not supported: states travel by collective here"
    rows = {row[0]: row[1:] for row in targets_table(results)[1]}
    assert rows[text][1:3] == ["-", "missed"]
    collective = "across two GPUs, time of vLLM's gather and reduce-scatter over our collective way"
    assert rows[collective][2] == "met"
    record["refused"]["ours collective"] = "wrong: NaN in the answer"
    rows = {row[0]: row[1:] for row in targets_table(results)[1]}
    assert rows[collective][2] == "missed"


def test_report_of_ranks(tmp_path):
    for name in ("README.md", "docs/benchmarks.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text((ROOT / name).read_text("utf-8"), "utf-8")
    files = {"h100.json": synthetic(), "ranks-h100.json": synthetic_ranks()}
    before, after = (
        {path.name: text for path, text in report.pages(machines, tmp_path)}
        for machines in ([synthetic()], [*files.values()])
    )
    for file, results in files.items():
        results.save(tmp_path / file)
        assert vars(Results.load(tmp_path / file)) == vars(results)
    # Nothing else is another one for it.
    assert [name for name in before if before[name] != after[name]] == ["benchmarks.md"]
    ours = after["benchmarks.md"].partition("### 2 x H100")[2]
    there = before["benchmarks.md"].partition(report.END)[0].rstrip()
    assert after["benchmarks.md"].startswith(there)
    line = "| 64x128x512 bf16 | 10.0 (9.80-10.3) | 8.00 (7.84-8.24) | 30.0 (29.4-30.9) |"
    assert f"{line} 34.0 (33.3-35.0) | 3.40x | 25.0 (24.5-25.8) | 2.50x | 1.25x |" in ours
    assert "| 8192x16x128 bf16, attention | 100 (98.0-103) | 120 (118-124) | 1.20x |" in ours
    assert "| 8x16x128 bf16, eager calls |" in ours
    assert "not measured" not in ours


def test_nothing_is_shown_where_there_are_no_results():
    assert list(group_tables(Results({"gpu": "2 x NVIDIA H100"}), "ranks")) == []
    assert "across two GPUs" not in str(targets_table(synthetic()))


def test_cases_are_those_of_the_targets():
    sizes = [case.size for case in ranks.CASES if case.kind == "contiguous"]
    asked = [target["at_least"] for target in TARGETS if target["group"] == "ranks"]
    assert [list(bounds) for bounds in asked[:2]] == [sizes, sizes]
    assert len({case.name for case in ranks.CASES}) == len(ranks.CASES)
