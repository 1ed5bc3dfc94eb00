"""The operators of many parts as citizens of PyTorch: schemas, fakes, tracing, modes, threads."""

import re
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from states_support import States, check, make_states, operator_args
from support import BF16, E4M3, F16, F32, F64, Recording, assert_bits
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_map

from merge_attn_states import merge_states, update_state

OPS = torch.ops.merge_attn_states
N, H, D = 5, 3, 12
PARTS = (
    "Tensor[] outputs, Tensor[] lses, Tensor?[] index, Tensor?[] empty, int? dim=None, "
    'Tensor? sink=None, str lse_base="e", str? out_lse_base=None, '
)
SCHEMAS = {
    "merge_states": f"({PARTS}ScalarType? out_dtype=None, Tensor? out_scale=None, "
    "bool return_lse=True, bool invert_empty=False) -> (Tensor, Tensor)",
    "merge_states_out": f"(Tensor(a!) out, Tensor(b!)? out_lse, {PARTS}Tensor? out_scale=None, "
    "bool invert_empty=False) -> ()",
    "update_state": "(Tensor(a!) out, Tensor(b!) lse, Tensor block_out, Tensor block_lse, "
    'Tensor? index=None, Tensor? empty=None, str lse_base="e", bool invert_empty=False) -> ()',
}


@pytest.mark.parametrize("name", SCHEMAS)
def test_an_op_resolves_with_its_schema(name):
    op = getattr(OPS, name)
    assert str(op.default._schema) == f"merge_attn_states::{name}{SCHEMAS[name]}"
    assert op.overloads() == ["default"]
    for key in ("CPU", "Meta", "Negative"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(op.default.name(), key)


def parts(dtype=F32, device="cpu", count=3, rows=(N, H), **options) -> States:
    return make_states(rows, D, count, dtype, device, empty=False, **options)


def masks(device, rows=(N, H)):
    return [None, torch.rand(rows, device=device) < 0.5, None]


def gathered(device) -> dict:
    """For each part rows by an index: in the first one, and one of its own in the last."""
    first = torch.tensor([3, -1, 0, 0], device=device)
    return {"index": [first, first.flip(0).to(torch.int32), first]}


OPERANDS = {  # what a call has beside its outputs and lses
    "plain": lambda device: {},
    "one part": lambda device: {"count": 1},
    "float64": lambda device: {"dtype": F64},
    "mixed dtypes": lambda device: {"dtype": (BF16, F32, F16)},
    "masks": lambda device: {"empty": masks(device)},
    "indices": gathered,
    "a sink and bases": lambda device: {
        "sink": torch.zeros(H, device=device), "base": ["e", "2", "e"], "out_lse_base": "2",
    },
    "another dtype": lambda device: {"out_dtype": BF16},
    "an FP8 result": lambda device: {
        "out_dtype": E4M3, "out_scale": torch.tensor(0.5, device=device),
    },
    "no lse": lambda device: {"return_lse": False},
    "four row dimensions": lambda device: {"rows": (2, 1, N, H)},
}  # fmt: skip


def call_of(case, device, stacked=False) -> States:
    options = dict(OPERANDS[case](device))
    own = {name: options.pop(name) for name in list(options) if name in States._fields[3:6]}
    states = parts(device=device, **options)._replace(**own)
    if stacked:
        outputs, lses = torch.stack(states.outputs, 1), torch.stack(states.lses, 1)
        states = states._replace(outputs=outputs, lses=lses, dim=1)
    return states


CASES = [(case, False) for case in OPERANDS] + [
    (case, True) for case in ("plain", "masks", "indices", "no lse", "four row dimensions")
]
UTILITIES = [
    "test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic",
]  # fmt: skip


def opcheck(op, args) -> None:
    utilities = UTILITIES
    if any(torch.is_tensor(x) and x.dtype == E4M3 for x in args) or E4M3 in args:
        utilities = UTILITIES[1:]  # it compares by arithmetic that PyTorch has not for FP8
    results = torch.library.opcheck(op, args, test_utils=utilities)
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize(("case", "stacked"), CASES)
def test_opcheck_of_a_merge(case, stacked, device):
    states = call_of(case, device, stacked)
    further = (states.out_dtype, states.out_scale, states.return_lse)
    opcheck(OPS.merge_states.default, (*operator_args(states), *further))
    out, lse = states.run()
    opcheck(
        OPS.merge_states_out.default,
        (torch.zeros_like(out), lse, *operator_args(states), states.out_scale),
    )


@pytest.mark.parametrize("index", [None, [3, -1, 0, 4]])
@pytest.mark.parametrize("dtypes", [(F32, F32), (F32, BF16), (F64, F64)], ids=str)
def test_opcheck_of_an_update(dtypes, index, device):
    states = parts(dtypes, device, 2)
    out, lse = states.outputs[0].contiguous(), states.lses[0].contiguous()
    block, block_lse = states.outputs[1], states.lses[1]
    mask = masks(device)[1]
    if index:
        block, block_lse, mask = block[:4], block_lse[:4], mask[:4]
        index = torch.tensor(index, device=device)
    opcheck(OPS.update_state.default, (out, lse, block, block_lse, index, mask, "2"))


# Fakes.


@pytest.mark.parametrize(("case", "stacked"), CASES)
def test_a_fake_is_like_the_result(case, stacked, device):
    states = call_of(case, device, stacked)
    real = states.run()
    with FakeTensorMode() as mode:
        own = tree_map(lambda x: mode.from_tensor(x) if torch.is_tensor(x) else x, tuple(states))
        fake = States(*own).run()
    on_meta = States(
        *tree_map(lambda x: x.to("meta") if torch.is_tensor(x) else x, tuple(states))
    ).run()
    for result, *others in zip(real, fake, on_meta, strict=True):
        for other in others:
            if result is None:
                assert other is None
                continue
            assert other.shape == result.shape
            assert other.dtype == result.dtype
            assert other.stride() == result.stride()
    assert fake[0].device == real[0].device
    bare = OPS.merge_states(*operator_args(states), *states[10:13])
    assert bare[1].shape == ((0,) if real[1] is None else real[1].shape)


@pytest.mark.parametrize("where", ["fake", "meta"])
@pytest.mark.parametrize(("name", "shape"), [
    ("lses[1]", (4, 2, 1, 1)), ("lses[0]", (8,)), ("outputs[1]", (4, 16)), ("outputs[0]", (64,)),
    ("out", (1, 4, 2, 8)), ("out_lse", (8,)),
])  # fmt: skip
def test_a_fake_refuses_wrong_ranks(name, shape, where):
    """As that of the pair does: what is wrong is said while compiling, not when it runs."""
    shapes = {
        "outputs[0]": (4, 2, 8), "outputs[1]": (4, 2, 8), "lses[0]": (4, 2), "lses[1]": (4, 2),
        "out": (4, 2, 8), "out_lse": (4, 2), name: shape,
    }  # fmt: skip
    with FakeTensorMode():
        device = "meta" if where == "meta" else "cpu"
        x = {name: torch.empty(shape, device=device) for name, shape in shapes.items()}
        outputs, lses = [x["outputs[0]"], x["outputs[1]"]], [x["lses[0]"], x["lses[1]"]]
        with pytest.raises(ValueError, match=rf"^{re.escape(name)}: expected "):
            merge_states(outputs, lses, out=x["out"], out_lse=x["out_lse"])


# Tracing: the op must be in what was recorded, not have run beside it.


def targets(graph):
    return [node.target for node in graph.graph.nodes if node.op.startswith("call")]


def test_make_fx_records_the_ops():
    states = parts(count=2)
    graph = make_fx(lambda *args: merge_states(args[:2], args[2:]))(*states.outputs, *states.lses)
    assert OPS.merge_states.default in targets(graph)
    check(states, lambda outputs, lses, **_: graph(*outputs, *lses))

    def update(*args):
        update_state(*args)

    call = [x.clone() for x in (*states.outputs, *states.lses)]
    call[1], call[2] = call[2], call[1]
    graph = make_fx(update)(*call)
    assert OPS.update_state.default in targets(graph)


def test_a_mode_sees_each_op_once():
    states = parts()
    with Recording() as mode:
        states.run()
        states._replace(out=states.outputs[1], out_lse=states.lses[0]).run()
        update_state(states.outputs[0], states.lses[0], states.outputs[1], states.lses[1])
    names = ("merge_states", "merge_states_out", "update_state")
    assert [str(op) for op in mode.seen] == [f"merge_attn_states.{name}.default" for name in names]


def test_functionalize():
    """The functional form runs; what writes is refused by PyTorch and not lost in silence."""
    states = parts(count=2)
    outputs, lses = states.outputs, states.lses
    expected, _ = states.run()
    merged = torch.func.functionalize(lambda *x: merge_states(x[:2], x[2:])[0])(*outputs, *lses)
    assert_bits(merged, expected)
    before = outputs[0].clone()
    with pytest.raises(RuntimeError, match=r"^Found a custom \(non-ATen\) operator"):
        torch.func.functionalize(lambda *x: update_state(*x))(
            outputs[0], lses[0], outputs[1], lses[1]
        )
    assert_bits(outputs[0], before)


def test_inference_mode(device):
    states = parts(device=device)
    with torch.inference_mode():
        check(states)
        out, lse = states.outputs[0].clone(), states.lses[0].clone()
        update_state(out, lse, states.outputs[1], states.lses[1])
        assert out.is_inference()
    again = states.outputs[0].clone()
    update_state(again, states.lses[0].clone(), states.outputs[1], states.lses[1])
    assert_bits(again, out)
    update_state(out, lse, states.outputs[1], states.lses[1])  # outside of inference mode


def test_threads_do_not_meet(device):
    calls = [make_states((37 + i, 3), 64 + i, 2 + i, BF16, device, seed=i) for i in range(16)]
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda states: states.run(), calls))
    for states, (out, lse) in zip(calls, results, strict=True):
        alone, alone_lse = check(states)
        assert_bits(out, alone)
        assert_bits(lse, alone_lse)
