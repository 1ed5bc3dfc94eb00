"""What the tests of several ranks run on each of them (ranks_support.py)."""

import datetime
import os
import random
import signal
import time

import pytest
import torch
import torch.distributed as dist
from states_support import States, compare
from support import BF16, E4M3, E5M2, F16, F32, F64, INF, NAN, assert_bits, bits, blank, place

from merge_attn_states import merge_states, update_state
from merge_attn_states.distributed import RankMerge

HEADS, SHORT = 6, datetime.timedelta(seconds=3)


def states_of_ranks(ranks, num_tokens, head_size, dtype, device):
    """Random states, the same on every rank; some rows have no keys, on one rank or on all."""
    lse_dtype = F64 if dtype == F64 else F32
    outputs = [torch.randn(num_tokens, HEADS, head_size).to(dtype) for _ in range(ranks)]
    lses = [3 * torch.randn(num_tokens, HEADS, dtype=lse_dtype) for _ in range(ranks)]
    for lse in lses:
        lse[torch.rand(num_tokens, HEADS) < 0.2] = -INF
        lse[torch.rand(num_tokens, HEADS) < 0.1] = INF
    if num_tokens > 1:
        for lse in lses:
            lse[1] = -INF
    return [x.to(device) for x in outputs], [x.to(device) for x in lses]


def emptied(ranks, num_tokens, device, kind):
    """What each rank gives as `empty`, and the mask that it means."""
    if kind == "none":
        return [None] * ranks, [torch.zeros(num_tokens, HEADS, dtype=torch.bool)] * ranks
    if kind == "mask":
        masks = [torch.rand(num_tokens, HEADS) < 0.3 for _ in range(ranks)]
        return [mask.to(device) for mask in masks], masks
    dtype = random.choice([torch.int32, torch.int64])
    # Requests of no rows among them; rows in front of the first and behind the last are nobody's.
    starts = sorted(random.choices(range(num_tokens + 1), k=4))
    lengths = [[random.choice([0, 0, 5]) for _ in starts[1:]] for _ in range(ranks)]
    masks = [torch.ones(num_tokens, HEADS, dtype=torch.bool) for _ in range(ranks)]
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
    device = merge.device
    outputs, lses = states_of_ranks(merge.ranks, num_tokens, merge.head_size, merge.dtype, device)
    given, masks = emptied(merge.ranks, num_tokens, device, kind)
    if num_tokens > 2:
        lses[-1][2, ::2] = NAN
    output, lse = outputs[merge.rank], lses[merge.rank]
    if is_strided:
        output = place(output, strides=(HEADS * merge.head_size + 16, merge.head_size, 1))
        lse = lse.T.contiguous().T
    before = output.clone(), lse.clone()
    out = out_lse = None
    if is_given:
        shape = (num_tokens, merge.merged_heads, merge.head_size)
        room = blank((num_tokens, HEADS + 1, merge.head_size), merge.dtype, device)
        out, out_lse = room[:, : shape[1]], torch.full(shape[:2], NAN, dtype=lse.dtype).to(device)
    result = merge(output, lse, empty=given[merge.rank], lse_base=base, nan_lse=nan_lse,
                   out=out, out_lse=out_lse)  # fmt: skip
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


# DTensors.


def shards(rank, ranks, device):
    """Each rank merges its own rows."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    mesh = init_device_mesh(device.type, (ranks,))
    torch.manual_seed(0)  # the same operands on every rank
    outputs = [torch.randn(5, 3, 8) for _ in range(3)]  # 5 tokens over 2 ranks: uneven
    lses = [torch.randn(5, 3) for _ in range(3)]
    sink, empty = torch.randn(3), [torch.rand(5, 3) < 0.3, None, None]
    wanted, wanted_lse = merge_states(outputs, lses, sink=sink, empty=empty)
    grad = torch.randn(5, 3, 8)

    def spread(x, placement):
        return None if x is None else distribute_tensor(x, mesh, [placement])

    whole = Replicate()
    for placement, of_sink in ((Shard(0), whole), (Shard(1), Shard(0)), (whole, whole)):
        mine = [spread(x, placement).requires_grad_() for x in outputs]
        out, lse = merge_states(
            mine,
            [spread(x, placement) for x in lses],
            empty=[spread(x, placement) for x in empty],
            sink=spread(sink, of_sink),
        )
        assert isinstance(out, DTensor)
        assert tuple(out.placements) == (placement,)
        assert torch.equal(out.full_tensor(), wanted)
        assert torch.equal(lse.full_tensor(), wanted_lse)
        out.backward(spread(grad, placement))
        plain = [x.clone().requires_grad_() for x in outputs]
        merge_states(plain, lses, sink=sink, empty=empty)[0].backward(grad)
        for a, b in zip(mine, plain, strict=True):
            assert torch.equal(a.grad.full_tensor(), b.grad)

        stacked, of_lses = torch.stack(outputs, 1), torch.stack(lses, 1)
        apart = Shard(2) if placement == Shard(1) else placement
        out, _ = merge_states(spread(stacked, apart), spread(of_lses, apart), dim=1)
        assert tuple(out.placements) == (placement,)
        assert torch.equal(out.full_tensor(), merge_states(outputs, lses)[0])

        state, state_lse = torch.zeros(5, 3, 8), torch.full((5, 3), -torch.inf)
        own, own_lse = spread(state, placement), spread(state_lse, placement)
        for block, block_lse in zip(outputs, lses, strict=True):
            update_state(own, own_lse, spread(block, placement), spread(block_lse, placement))
            update_state(state, state_lse, block, block_lse)
        assert torch.equal(own.full_tensor(), state)
        assert torch.equal(own_lse.full_tensor(), state_lse)


# PyTorch's context parallel.


def exact_attention(query, key, value, is_causal):
    """In float64, of all queries and keys, with its LSE."""
    scores = query.double() @ key.double().mT * query.shape[-1] ** -0.5
    if is_causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), -INF)
    return scores.softmax(-1) @ value.double(), scores.logsumexp(-1)


def ring(rank, ranks, device):
    """Its ring of attention blocks gives one attention, nearer than without us, in our launches."""
    from torch.distributed.tensor.experimental._context_parallel import _attention

    from merge_attn_states.integrations import context_parallel
    from merge_attn_states.integrations.pytorch import attention_with_lse

    steps = []

    def counted(*operands):
        steps.append(operands[0].shape[2])
        update_state(*operands)

    def attend(query, key, value, is_causal):
        return attention_with_lse(query, key, value, is_causal=is_causal)

    context_parallel.update_state = counted
    torch.manual_seed(0)  # the same operands on every rank
    size = 8 * ranks
    for is_causal, balances in ((False, False), (True, False), (True, True)):
        whole = [torch.randn(2, 3, size, 16).bfloat16() for _ in range(3)]
        due, due_lse = exact_attention(*whole, is_causal)
        # Balanced, a rank has one of the first chunks and one of the last: as much to do as others.
        places = torch.arange(size).chunk(2 * ranks)
        places = torch.cat(
            [places[rank], places[-1 - rank]] if balances else places[2 * rank : 2 * rank + 2]
        )
        query, key, value = (x[:, :, places].to(device) for x in whole)
        _attention._cp_options.enable_load_balance = balances
        errors = []
        for is_ours in (False, True):
            (context_parallel.enable if is_ours else context_parallel.disable)()
            assert context_parallel.is_enabled() == is_ours
            out, lse = _attention._templated_ring_attention(
                dist.group.WORLD, 2, attend, query, key, value, is_causal=is_causal
            )
            assert out.dtype == BF16
            torch.testing.assert_close(lse.cpu().double(), due_lse[:, :, places], rtol=0, atol=1e-3)
            errors.append((out.cpu().double() - due[:, :, places]).abs().max())
        assert errors[1] < 2e-2
        assert errors[1] <= 1.01 * errors[0]
        blocks = rank if is_causal and not balances else ranks - 1
        assert len(steps) == blocks
        steps.clear()
    context_parallel.disable()
