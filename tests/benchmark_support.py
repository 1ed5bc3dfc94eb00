"""What stands in for a GPU: its kernels and its timer, and a results file with made-up times."""

from types import SimpleNamespace

import torch

from benchmarks import cold, kernels, neighbours, ranks, states
from benchmarks.cases import GROUPS, is_compared_with_pytorch
from benchmarks.host import MODES
from benchmarks.results import Results
from benchmarks.states_cases import GROUPS as STATES
from benchmarks.timing import Timing

TREES = {"csrc": "c" * 40, "include": "d" * 40, "python": "e" * 40}

# Microseconds before the first byte and terabytes a second.
ADDED = {"limit": (1.2, 3.2), "ours": (1.4, 3.2), "vllm": (2.0, 3.1), "compile": (2.6, 2.4),
         "eager": (15.0, 0.3), "empty": (0.9, 20.0), "neighbours": (2.5, 2.0)}  # fmt: skip
COLD = {"limit": (1.0, 3.0), "ours": (1.0, 2.97), "vllm": (1.5, 2.9)}
MANY = {"limit": (1.2, 3.0), "ours": (1.4, 2.9), "pair": (1.5, 2.8), "chain": (8.0, 1.2),
        "flashinfer": (3.0, 2.0), "compile": (2.6, 1.4), "eager": (15.0, 0.6)}  # fmt: skip
ON_CPU = {"ours": (2.0, 0.021), "ours_ops": (5.0, 0.021), "eager": (25.0, 0.002),
          "add": (1.0, 0.02)}  # fmt: skip
ON_HOST = {"ours": 3.5, "ours_keyword": 3.6, "ours_ops": 6.3, "add": 5.6, "vllm": 7.3,
           "vllm_dispatcher": 8.6}  # fmt: skip

ACROSS_RANKS = {
    "merges": {"ours": 10.0, "ours in its buffer": 8.0, "ours collective": 30.0, "vllm": 34.0,
               "all-to-all": 25.0, "vLLM AG + RS": 60.0, "vLLM A2A": 50.0, "eager": 90.0},
    "layers": {"ours": 100.0, "PyTorch": 120.0},
}  # fmt: skip


def spread(us):
    """Three processes around it."""
    return [us, 0.98 * us, 1.03 * us]


def environment_of(gpu):
    return {"gpu": gpu, "driver": "580.00", "cpu": "A processor", "threads": 16, "torch": "2.13.0",
            "vllm": "0.33.0", "trees": TREES, "dirty": False}  # fmt: skip


def synthetic(gpu="NVIDIA H100 80GB HBM3"):
    results = Results(environment_of(gpu))
    run = {"date": "2026-01-02", "commit": "f" * 40, "missing": {},
           "clocks": {"clocks.sm": "1980 MHz", "clocks.mem": "2619 MHz"}}  # fmt: skip
    for group, models in (("neighbours", ADDED), ("cold", COLD), ("cpu", ON_CPU)):
        records = []
        for case in GROUPS[group]:
            us = {
                name: spread(latency + case.bytes() / rate / 1e6)
                for name, (latency, rate) in models.items()
                if name not in ("compile", "eager") or group == "cpu"
                or is_compared_with_pytorch(case)
            }  # fmt: skip
            refused = {}
            if case.kind == "heads first":
                del us["vllm"]
                refused["vllm"] = "not supported: a token's heads must follow one another"
            records.append(case.record() | {"limit": "256 threads", "us": us, "refused": refused})
        results.add(group, run, records)
    for group, models in (("states", MANY), ("cpu", ON_CPU)):
        records = results.select(group)
        for case in STATES[group]:
            refusing = {
                provider.name
                for provider in states.PROVIDERS
                if provider.refuses(SimpleNamespace(case=case))
            }
            us = {
                name: spread(latency + case.bytes() / rate / 1e6)
                for name, (latency, rate) in models.items()
                if name not in refusing
            }  # fmt: skip
            which = {"kernel": "vectorized", "variant": f"{case.parts} parts, 15 rows a block"}
            records.append(case.record() | which | {"us": us, "refused": {}})
        results.add(group, run, records)
    hosts = [
        {"case": f"{mode}, {regime}", "mode": mode, "regime": regime, "refused": {},
         "us": {name: spread(factor * us) for name, us in ON_HOST.items()}}
        for mode in MODES for regime, factor in (("tight", 1), ("swept", 4.5))
    ]  # fmt: skip
    results.add("host", run, hosts)
    return results


def synthetic_ranks(gpu="2 x NVIDIA H100 80GB HBM3"):
    results = Results(environment_of(gpu))
    records = []
    for case in ranks.CASES:
        regime = "layers" if case.kind.startswith("attention") else "merges"
        us = {name: spread(us) for name, us in ACROSS_RANKS[regime].items()}
        record = case.record() | {"regime": regime, "transport": "direct", "us": us, "refused": {}}
        records.append(record)
    run = {"date": "2026-01-02", "commit": "f" * 40, "missing": {}, "clocks": {}}
    results.add("ranks", run, records)
    return results


def stand_in_kernels(monkeypatch):
    """Let the producer write on the CPU, and a timer count: what each kernel was given is told."""
    given = {"produce": [], "plain": [], "plain_many": []}
    counted = []

    def filled(memory, source):
        memory.copy_(source.repeat(-(-len(memory) // len(source)))[: len(memory)])

    def produce(parts, lses, sources):
        counted.append("produce")
        given["produce"].append(parts)
        for memory, source in zip([*parts, *lses], [sources[0], *sources], strict=True):
            filled(memory, source)

    def plain(variant, buffers, packs, is_narrow):
        counted.append("plain")
        written = packs * kernels.PACK // (2 if is_narrow else 1)
        sizes = (packs * kernels.PACK, packs * kernels.PACK, written)
        assert all(len(memory) >= size for memory, size in zip(buffers, sizes, strict=True))
        given["plain"].append(sum(sizes))

    def plain_many(variant, parts, output):
        counted.append("plain")
        assert parts.is_contiguous()
        assert parts.nbytes == len(parts) * output.nbytes
        given["plain_many"].append(parts.nbytes + output.nbytes)

    def time(providers, rounds):
        """A microsecond for each kernel that a call launches; of a merge, which launches others."""
        times = {}
        for name, calls in providers.items():
            counted.clear()
            calls[0]()
            merges = name in ("ours", "vllm", "eager", "compile", "pair", "chain")
            times[name] = Timing(*[float(len(counted) + merges)] * 3)
        return times

    for name, made in {
        "produce": produce, "plain": plain, "plain_many": plain_many,
        "consume": lambda output, sink: counted.append("consume"),
        "nothing": lambda packs: counted.append("nothing"),
    }.items():  # fmt: skip
        monkeypatch.setattr(kernels, name, made)
    for module in (neighbours, cold, states):
        monkeypatch.setattr(module, "time_cuda", time)
    for module in (cold, states):
        monkeypatch.setattr(module, "buffer_sets", lambda size, device: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    return given
