"""DTensors: each rank merges its own rows. Two processes of gloo, and what is refused in one."""

import sys

import pytest
import ranks_support
import torch
import torch.distributed as dist
from support import run_command

from merge_attn_states import merge_states, update_state

pytest.importorskip("torch.distributed.tensor")
LEAVES_THREADS = True  # functional collectives: see ranks_support.py


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


def test_two_ranks(tmp_path, child_environment):
    ranks_support.run(shards, 2, tmp_path, child_environment)


@pytest.fixture
def mesh(tmp_path):
    from torch.distributed.device_mesh import init_device_mesh

    if dist.is_initialized():
        pytest.skip("another test has a process group")
    dist.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_what_is_sharded_otherwise_is_refused(mesh):
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    def spread(x, placement):
        return distribute_tensor(x, mesh, [placement])

    output, lse = torch.randn(4, 3, 8), torch.randn(4, 3)
    tokens, of_tokens = spread(output, Shard(0)), spread(lse, Shard(0))
    by_size, by_heads = spread(output, Shard(2)), spread(lse, Shard(1))
    whole, index = spread(output, Replicate()), {"index": [torch.zeros(4)]}
    refusals = [
        (r"outputs\[0\]: expected a DTensor that is sharded over rows", [by_size], [of_tokens], {}),
        (r"lses\[0\]: expected the placements .*redistribute it", [tokens], [by_heads], {}),
        (r"outputs\[1\]: expected the placements", [tokens, whole], [of_tokens] * 2, {}),
        (r"index: expected none for DTensors", [tokens], [of_tokens], index),
    ]
    for match, outputs, lses, options in refusals:
        with pytest.raises(ValueError, match=match):
            merge_states(outputs, lses, **options)
    with pytest.raises(TypeError, match=r"lses\[0\]: expected a DTensor as outputs\[0\] is"):
        merge_states([tokens], [lse])
    with pytest.raises(TypeError, match="out: expected a DTensor as others are"):
        update_state(output, lse, tokens, of_tokens)
    with pytest.raises(ValueError, match="index: expected none for DTensors"):
        update_state(tokens, of_tokens, tokens, of_tokens, index=torch.zeros(4))


def test_nothing_is_imported_to_find_out(child_environment):
    merge = (
        "import torch; from merge_attn_states import merge_states;"
        "merge_states([torch.zeros(2, 8)], [torch.zeros(2)])"
    )
    said = []
    for program in ("import torch", merge):
        asks = f"{program}; import sys; print('torch.distributed.tensor' in sys.modules)"
        environment = child_environment | {"MERGE_ATTN_STATES_FAST_PATH": "0"}
        said.append(run_command(sys.executable, "-c", asks, **environment))
    assert said[0] == said[1]
