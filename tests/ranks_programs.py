"""What test_distributed.py runs on every rank."""

import datetime
import os
import random
import signal
import time

import pytest
import torch
import torch.distributed as dist
from ranks_support import leave
from states_support import States, compare
from support import BF16, E4M3, E5M2, F16, F32, F64, INF, NAN, assert_bits, bits, blank, place

from merge_attn_states import _collective, _direct, merge_states
from merge_attn_states.distributed import RankMerge

HEADS, SHORT = 6, datetime.timedelta(seconds=3)


def states_of_ranks(ranks, num_tokens, head_size, dtype, device, heads=HEADS):
    """Random states, the same on every rank; some rows have no keys, on one rank or on all."""
    lse_dtype = F64 if dtype == F64 else F32
    outputs = [torch.randn(num_tokens, heads, head_size).to(dtype) for _ in range(ranks)]
    lses = [3 * torch.randn(num_tokens, heads, dtype=lse_dtype) for _ in range(ranks)]
    for lse in lses:
        lse[torch.rand(num_tokens, heads) < 0.2] = -INF
        lse[torch.rand(num_tokens, heads) < 0.1] = INF
    if num_tokens > 1:
        for lse in lses:
            lse[1] = -INF
    return [x.to(device) for x in outputs], [x.to(device) for x in lses]


def emptied(ranks, num_tokens, heads, device, kind):
    """What each rank gives as `empty`, and the mask that it means."""
    if kind == "none":
        return [None] * ranks, [torch.zeros(num_tokens, heads, dtype=torch.bool)] * ranks
    if kind == "mask":
        masks = [torch.rand(num_tokens, heads) < 0.3 for _ in range(ranks)]
        return [mask.to(device) for mask in masks], masks
    dtype = random.choice([torch.int32, torch.int64])
    # Requests of no rows among them; rows in front of the first and behind the last are nobody's.
    starts = sorted(random.choices(range(num_tokens + 1), k=4))
    lengths = [[random.choice([0, 0, 5]) for _ in starts[1:]] for _ in range(ranks)]
    masks = [torch.ones(num_tokens, heads, dtype=torch.bool) for _ in range(ranks)]
    for of_rank, mask in zip(lengths, masks, strict=True):
        for length, begin, end in zip(of_rank, starts[:-1], starts[1:], strict=True):
            mask[begin:end] = length == 0
    at = torch.tensor(starts, dtype=dtype, device=device)
    return [(torch.tensor(x, dtype=dtype, device=device), at) for x in lengths], masks


def mine_of(tensor, merge):
    """Of a tensor of all heads those that this rank gets."""
    first = merge.rank * merge.merged_heads if merge.scatter else 0
    return tensor[:, first : first + merge.merged_heads]


def call_and_compare(merge, num_tokens, options):
    """One call of random operands: the bits of merge_states, which is within its bound."""
    base, nan_lse, kind, is_given, is_strided = options
    device, heads = merge.device, merge.num_heads
    sizes = merge.head_size, merge.dtype, device, heads
    outputs, lses = states_of_ranks(merge.ranks, num_tokens, *sizes)
    given, masks = emptied(merge.ranks, num_tokens, heads, device, kind)
    if num_tokens > 2:
        lses[-1][2, ::2] = NAN
    output, lse = outputs[merge.rank], lses[merge.rank]
    if is_strided:
        output = place(output, strides=(heads * merge.head_size + 16, merge.head_size, 1))
        lse = lse.T.contiguous().T
    before = output.clone(), lse.clone()
    out = out_lse = None
    if is_given:
        shape = (num_tokens, merge.merged_heads, merge.head_size)
        room = blank((num_tokens, heads + 1, merge.head_size), merge.dtype, device)
        out, out_lse = room[:, : shape[1]], torch.full(shape[:2], NAN, dtype=lse.dtype).to(device)
    how = {"empty": given[merge.rank], "lse_base": base, "nan_lse": nan_lse}
    result = merge(output, lse, **how, out=out, out_lse=out_lse)
    if not is_given:
        alone, no_lse = merge(output, lse, **how, return_lse=False)
        assert no_lse is None
        assert_bits(alone, result[0])
    assert_bits(output, before[0])
    assert_bits(lse, before[1])
    if is_given:
        assert result[0] is out
        assert result[1] is out_lse
        assert_bits(room[:, shape[1] :], blank(room[:, shape[1] :].shape, merge.dtype, device))
    if nan_lse == "empty":
        lses = [x.nan_to_num(nan=-INF, posinf=INF, neginf=-INF) for x in lses]
    masks = [mine_of(mask, merge).to(device) for mask in masks]
    states = States([mine_of(x, merge) for x in outputs], [mine_of(x, merge) for x in lses],
                    empty=masks, lse_base=base)  # fmt: skip
    if num_tokens:
        due = merge_states(states.outputs, states.lses, empty=masks, lse_base=base)
        for got, wanted in zip((x.cpu() for x in result), (x.cpu() for x in due), strict=True):
            both_nan = got.float().isnan() & wanted.float().isnan()  # of either sign
            assert bool(((bits(got) == bits(wanted)) | both_nan).all())
        compare(states, *result)
    else:
        assert result[0].shape == (0, merge.merged_heads, merge.head_size)
        assert result[1].shape == (0, merge.merged_heads)


def values(rank, ranks, device):
    """Every dtype, both ways, any number of tokens in any order, two objects in turn."""
    seed = 0
    for dtype, head_size in ((F32, 24), (F16, 64), (BF16, 128), (F64, 8), (E4M3, 32), (E5M2, 5)):
        both = [
            RankMerge(max_tokens=9, num_heads=HEADS, head_size=head_size, dtype=dtype,
                      device=device, scatter=scatter)
            for scatter in ("heads", None)
        ]  # fmt: skip
        for call in range(16):
            seed += 1
            random.seed(seed)
            torch.manual_seed(seed)
            num_tokens = [9, 0, 1][call] if call < 3 else random.randrange(10)
            options = (
                random.choice("e2"),
                random.choice(["visible", "empty"]),
                random.choice(["none", "mask", "requests"]),
                *(random.random() < 0.5 for _ in range(2)),
            )
            call_and_compare(both[call % 2], num_tokens, options)


def subgroup(rank, ranks, device):
    """Two of three ranks; the third has no business there."""
    pair = dist.new_group([0, 2])
    how = {"max_tokens": 4, "num_heads": HEADS, "head_size": 16, "dtype": F32, "device": device}
    if rank == 1:
        with pytest.raises(ValueError, match="group: expected one that this process belongs to"):
            RankMerge(pair, **how)
        return
    merge = RankMerge(pair, **how)
    assert (merge.rank, merge.ranks, merge.merged_heads) == (rank // 2, 2, 3)
    torch.manual_seed(0)
    call_and_compare(merge, 4, ("e", "visible", "none", False, False))


def whole_on_every_rank(rank, ranks, device):
    """scatter=None: bits do not depend on the rank."""
    merge = RankMerge(max_tokens=8, num_heads=HEADS, head_size=40, dtype=BF16, device=device,
                      scatter=None)  # fmt: skip
    torch.manual_seed(rank)
    output, lse = merge(
        torch.randn(8, HEADS, 40).to(device, BF16), torch.randn(8, HEADS).to(device)
    )
    raw = torch.cat([output.flatten().view(torch.uint8), lse.flatten().view(torch.uint8)])
    others = [torch.empty_like(raw) for _ in range(ranks)]
    dist.all_gather(others, raw)
    assert all(torch.equal(raw, other) for other in others)


def compiled(rank, ranks, device):
    """Inside a compiled function: the graph breaks there, and nothing else does."""
    merge = RankMerge(max_tokens=4, num_heads=HEADS, head_size=16, dtype=F32, device=device)
    torch.manual_seed(0)
    outputs, lses = states_of_ranks(ranks, 4, 16, F32, device)

    def layer(output, lse):
        merged, merged_lse = merge(2 * output, lse)
        return merged + 1, merged_lse

    due = layer(outputs[rank], lses[rank])
    for got, wanted in zip(torch.compile(layer)(outputs[rank], lses[rank]), due, strict=True):
        assert_bits(got, wanted)


def check_fast_path(merge):
    """A call with plain tensors takes it, if there is one here."""
    taken, path = [], _direct._fast_merge
    if path is None:
        return

    def watched(*args):
        taken.append(path(*args))
        return taken[-1]

    _direct._fast_merge = watched
    call_and_compare(merge, 2, ("e", "visible", "requests", False, False))
    _direct._fast_merge = path
    assert taken == [True, True]  # and the same without its LSE


def directly(rank, ranks, device):
    """As lines and in bulk; in a graph that is replayed with other calls in between."""
    longest = RankMerge(max_tokens=3, num_heads=HEADS, head_size=2048, dtype=F32, device=device)
    for seed in range(4):  # rows of more threads than a block of lines has else
        torch.manual_seed(seed)
        call_and_compare(longest, 3, ("e", "visible", "none", False, False))
    how = {"num_heads": HEADS, "head_size": 1024, "dtype": BF16, "device": device}
    merge = RankMerge(max_tokens=1500, **how)  # more chunks than blocks
    assert merge.transport == "direct"
    border = merge._direct.tokens_in_bulk
    assert 1 < border < merge._direct._tokens_read <= 300
    sizes = [1, border - 1, border, 300, 7, 1500, border, 1]
    for seed, num_tokens in enumerate(sizes * 3):
        random.seed(seed)
        torch.manual_seed(seed)
        kind = random.choice(["none", "mask", "requests"])
        call_and_compare(merge, num_tokens, ("e2"[seed % 2], "empty", kind, seed % 3 == 0, False))
    check_fast_path(merge)
    captured = []
    merge.output_buffer(1)  # before a capture
    for num_tokens, reads in ((3, False), (border + 1, False), (3, True), (300, True)):
        outputs, lses = states_of_ranks(ranks, num_tokens, 1024, BF16, device)
        mine = outputs[rank]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            if reads:
                mine = merge.output_buffer(num_tokens)
                mine.copy_(outputs[rank])
            results = merge(mine, lses[rank])
        captured.append((graph, outputs, lses, results))
    for seed in range(6):
        torch.manual_seed(seed)
        for graph, outputs, lses, results in captured:
            for tensor in (*outputs, *lses):
                tensor.copy_(torch.randn(tensor.shape))
            graph.replay()
            call_and_compare(merge, 1 + seed, ("e", "visible", "none", False, False))
            due = merge_states(outputs, lses)
            for got, wanted in zip(results, due, strict=True):
                assert_bits(got, mine_of(wanted, merge))


def several_on_a_gpu(rank, ranks, device):
    """Direct merges of more ranks than there are GPUs, which take turns on each."""

    def gather(self, numbers):  # gloo has it for CPUs alone
        gathered = [None] * ranks
        dist.all_gather_object(gathered, numbers)
        return gathered

    _collective.Collective.gather = gather
    for seed, (dtype, head_size, scatter) in enumerate(
        [(BF16, 128, "heads"), (F32, 64, None), (BF16, 2048, None)]
    ):
        merge = RankMerge(max_tokens=300, num_heads=HEADS * ranks, head_size=head_size,
                          dtype=dtype, device=device, scatter=scatter)  # fmt: skip
        assert merge.transport == "direct"
        merge.output_buffer(1)
        for call in range(20):
            random.seed(20 * seed + call)
            torch.manual_seed(call)
            num_tokens = random.choice([1, random.randint(1, 300), 300])
            kind = random.choice(["none", "mask", "requests"])
            call_and_compare(merge, num_tokens, ("e2"[call % 2], "empty", kind, False, False))
        outputs, lses = states_of_ranks(ranks, 300, head_size, dtype, device, merge.num_heads)
        due = [mine_of(whole, merge) for whole in merge_states(outputs, lses)]
        result = merge(merge.output_buffer(300).copy_(outputs[rank]), lses[rank])
        for got, wanted in zip(result, due, strict=True):
            assert_bits(got, wanted)


def random_calls(rank, ranks, device):
    """Sizes and delays at random, of two objects, each on a stream of its own."""
    calls = int(os.environ.get("SOAK_CALLS", 100_000)) // (1 if device.type == "cuda" else 200)
    objects = []
    for head_size, scatter in ((64, "heads"), (1024, None)):
        merge = RankMerge(max_tokens=300, num_heads=HEADS, head_size=head_size, dtype=BF16,
                          device=device, scatter=scatter)  # fmt: skip
        merge.output_buffer(1)
        torch.manual_seed(head_size)
        outputs, lses = states_of_ranks(ranks, 300, head_size, BF16, device)
        due = [mine_of(whole, merge) for whole in merge_states(outputs, lses)]
        wrong = torch.zeros((), dtype=torch.bool, device=device)
        stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        objects.append((merge, outputs[rank], lses[rank], due, wrong, stream))
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    same, own = random.Random(0), random.Random(rank)
    for call in range(calls):
        merge, output, lse, due, wrong, stream = same.choice(objects)
        num_tokens = same.choice([1, same.randint(1, 8), same.randint(1, 300)])
        first = same.randint(0, 300 - num_tokens)
        rows, fills_buffer = slice(first, first + num_tokens), same.random() < 0.3
        if own.random() < 0.02:
            time.sleep(2e-3 * own.random())
        with torch.cuda.stream(stream):
            mine = output[rows]
            if fills_buffer:
                mine = merge.output_buffer(num_tokens).copy_(mine)
            for got, whole in zip(merge(mine, lse[rows]), due, strict=True):
                wrong |= (got != whole[rows]).any()
        if call % 1000 == 0 or call == calls - 1:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            assert not any(wrong for *_, wrong, _ in objects)
            assert not any(merge._direct and merge._direct._reports[0] for merge, *_ in objects)


# What ranks disagree about.


def other_objects(rank, ranks, device):
    """Every rank hears of it, and the group can be used on."""
    same = {"max_tokens": 4, "num_heads": HEADS, "head_size": 16, "dtype": F32, "scatter": None}
    differing = [
        ("num_heads", 12, "got 6 on rank 0 and 12 on rank 1"),
        ("dtype", BF16, "got torch.float32 on rank 0 and torch.bfloat16 on rank 1"),
        ("scatter", "heads", "got None on rank 0 and 'heads' on rank 1"),
        ("max_tokens", 5, "got 4 on rank 0 and 5 on rank 1"),
    ]
    for name, value, said in differing:
        how = same | {name: value} if rank == 1 else same
        with pytest.raises(ValueError, match=f"^{name}: expected the same on every rank, {said}$"):
            RankMerge(device=device, **how)
    said = "num_heads: expected a multiple of the group's 2 ranks, got 7"
    with pytest.raises(ValueError, match=said):
        RankMerge(device=device, **same | {"num_heads": 7, "scatter": "heads"})
    # One that is wrong by itself: its rank says why, the others that it does.
    said = "num_heads: expected 1 or more, got 0" if rank == 1 else "rank 1 of the group refuses"
    with pytest.raises(ValueError, match=said):
        RankMerge(device=device, **same | ({"num_heads": 0} if rank == 1 else {}))
    RankMerge(device=device, **same)


def other_calls(rank, ranks, device):
    """With check=True; and a call in which they agree is right afterwards."""
    merge = RankMerge(max_tokens=4, num_heads=HEADS, head_size=16, dtype=F32, device=device,
                      check=True)  # fmt: skip
    output, lse = torch.zeros(4, HEADS, 16, device=device), torch.zeros(4, HEADS, device=device)
    fewer = 4 - (rank == 1)
    said = r"^num_tokens: expected the same on every rank, got 4 on rank 0 and 3 on rank 1$"
    with pytest.raises(ValueError, match=said):
        merge(output[:fewer], lse[:fewer])
    none = 0 if rank == 1 else 4
    with pytest.raises(ValueError, match="got 4 on rank 0 and 0 on rank 1"):
        merge(output[:none], lse[:none])
    # Another object of the same kind.
    other = RankMerge(max_tokens=4, num_heads=HEADS, head_size=16, dtype=F32, device=device,
                      check=True)  # fmt: skip
    with pytest.raises(ValueError, match=r"^object: expected the same on every rank"):
        (merge if rank == 1 else other)(output, lse)
    with pytest.raises(ValueError, match=r"^lse_base: .* got 'e' on rank 0 and '2' on rank 1$"):
        merge(output, lse, lse_base="2" if rank == 1 else "e")
    # A mistake of one rank's is heard of on all.
    said = "output: expected at most max_tokens = 4 tokens" if rank == 1 else "rank 1 of the group"
    times = 2 if rank == 1 else 1
    with pytest.raises(ValueError, match=said):
        merge(output.repeat(times, 1, 1), lse.repeat(times, 1))
    for num_tokens in (4, 0, 2):
        torch.manual_seed(num_tokens)
        call_and_compare(merge, num_tokens, ("2", "visible", "mask", True, True))


# Ranks that do not come.


def short_of_time(device):
    return RankMerge(max_tokens=4, num_heads=HEADS, head_size=16, dtype=F32, device=device,
                     timeout=SHORT)  # fmt: skip


def late(rank, ranks, device):
    """The others give up in time and say so at once from then on; so does the late one."""
    merge = short_of_time(device)
    operands = torch.zeros(4, HEADS, 16), torch.zeros(4, HEADS)
    merge(*operands)
    if rank == 1:
        time.sleep(2 * SHORT.total_seconds())
        with pytest.raises(RuntimeError, match="the exchange with the group's other ranks failed"):
            for _ in range(2):  # what they had sent before may still have come
                merge(*operands)
    else:
        out = torch.full((4, HEADS // ranks, 16), NAN)
        begin = time.monotonic()
        with pytest.raises(RuntimeError, match="the exchange with the group's other ranks failed"):
            merge(*operands, out=out)
        took = time.monotonic() - begin
        assert SHORT.total_seconds() <= took < 3 * SHORT.total_seconds()
        assert bool(out.isnan().all())  # nothing is written
    begin = time.monotonic()
    with pytest.raises(RuntimeError, match=r"failed before \(.*\), so that the ranks no longer"):
        merge(*operands)
    assert time.monotonic() - begin < SHORT.total_seconds() / 2


def late_directly(rank, ranks, device):
    """The kernels of the others give up in time, in a graph too, and no later one waits."""
    merge = short_of_time(device)
    assert merge.transport == "direct"
    operands = torch.zeros(4, HEADS, 16, device=device), torch.zeros(4, HEADS, device=device)
    merge(*operands)
    layers = torch.cuda.CUDAGraph()
    with torch.cuda.graph(layers):
        for _ in range(61):
            merge(*operands)
    torch.cuda.synchronize()
    if rank == 1:
        time.sleep(2 * SHORT.total_seconds())
    said = "another rank of the group gave up"
    if rank != 1:  # the first of them says whom it waited for
        said += "|rank 1 of the group did not come"
    ends_soon(layers.replay)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=said):
            merge(*operands)
    ends_soon(layers.replay)


def ends_soon(call):
    begin = time.monotonic()
    call()
    torch.cuda.synchronize()
    assert time.monotonic() - begin < 1.5 * SHORT.total_seconds()


def killed_directly(rank, ranks, device):
    """The last rank dies in the middle; the others' kernels end, and the next call says why."""
    merge = short_of_time(device)
    assert merge.transport == "direct"
    operands = torch.zeros(4, HEADS, 16, device=device), torch.zeros(4, HEADS, device=device)
    merge(*operands)
    torch.cuda.synchronize()
    if rank == ranks - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    ends_soon(lambda: merge(*operands))
    with pytest.raises(RuntimeError, match=f"rank {ranks - 1} of the group did not come|gave up"):
        merge(*operands)
    leave()  # to destroy a group of NCCL may wait for the one that is gone


def other_numbers_directly(rank, ranks, device):
    """Without check, at the next call."""
    how = {"num_heads": HEADS, "head_size": 16, "dtype": F32, "device": device}
    merge = RankMerge(max_tokens=4, **how)
    output, lse = torch.zeros(4, HEADS, 16, device=device), torch.zeros(4, HEADS, device=device)
    fewer = 4 - (rank == 1)
    merge(output[:fewer], lse[:fewer])
    torch.cuda.synchronize()
    said = r"rank \d of the group had a call of [34] tokens to base e|gave up"
    with pytest.raises(RuntimeError, match=said):
        merge(output, lse)


def killed(rank, ranks, device):
    """The last rank dies in the middle; the others hear of it and end in order."""
    merge = short_of_time(device)
    operands = torch.zeros(4, HEADS, 16), torch.zeros(4, HEADS)
    merge(*operands)
    if rank == ranks - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    with pytest.raises(RuntimeError, match="the exchange with the group's other ranks failed"):
        merge(*operands)
    with pytest.raises(RuntimeError, match="failed before"):
        merge(*operands)


def gone_group(rank, ranks, device):
    """In any order."""
    group = dist.new_group()
    first = short_of_time(device)
    second = RankMerge(group, max_tokens=4, num_heads=HEADS, head_size=16, dtype=F32, device=device)
    operands = torch.zeros(4, HEADS, 16, device=device), torch.zeros(4, HEADS, device=device)
    second(*operands)
    dist.destroy_process_group(group)
    del second
    first(*operands)
