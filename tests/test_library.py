"""The op as a citizen of PyTorch: schema, fakes, tracing, autograd, threads."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest
import torch
from support import BF16, E4M3, F32, F64, Call, Recording, bits, check, make_call
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import merge_attn_states
from merge_attn_states import merge_attn_states as merge

OP = torch.ops.merge_attn_states.merge_attn_states
SCHEMA = (
    "merge_attn_states::merge_attn_states(Tensor(a!) output, Tensor prefix_output, "
    "Tensor prefix_lse, Tensor suffix_output, Tensor suffix_lse, Tensor(b!)? output_lse=None, "
    "SymInt? prefill_tokens_with_context=None, Tensor? output_scale=None) -> ()"
)


def test_the_op_resolves_with_its_schema():
    assert str(OP.default._schema) == SCHEMA
    assert OP.overloads() == ["default"]


def test_kernels_are_registered():
    for key in ("CPU", "Meta"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(OP.default.name(), key)


OPCHECK = {
    "distinct operands": {},
    "no lse": {"output_lse": False},
    "a count": {"count": 2},
    "views": {"strides": {"output": (3, 30, 1), "prefix_output": (40, 13, 2),
                          "suffix_lse": (1, 3), "output_lse": (9, 2)}},
    "an FP8 output": {"output_dtype": E4M3, "scale": 0.5},
    "float64": {"dtype": F64},
}  # fmt: skip


@pytest.mark.parametrize("case", OPCHECK)
def test_opcheck(case, device):
    options = {"dtype": F32, **OPCHECK[case]}
    shape = (5, 3, 12) if case != "views" else (5, 3, 3)
    call = make_call(shape, device=device, empty=False, **options)
    utilities = [
        "test_schema",
        "test_autograd_registration",
        "test_faketensor",
        "test_aot_dispatch_dynamic",
    ]
    if call.output.dtype == E4M3:
        del utilities[0]  # it compares by arithmetic that PyTorch has not for FP8
    results = torch.library.opcheck(OP.default, call, test_utils=utilities)
    assert set(results.values()) == {"SUCCESS"}


def test_selected_kernel(device):
    call = make_call((5, 3, 64), BF16, device)
    chosen = merge_attn_states.selected_kernel(*call)
    assert chosen == merge_attn_states.selected_kernel(**call._asdict())
    assert chosen._fields == ("kernel", "variant")
    assert chosen.kernel == ("cpu" if device == "cpu" else "vectorized")
    assert chosen.variant
    assert isinstance(chosen.variant, str)
    assert call.output.isnan().all(), "it only tells"


def test_fake_tensors_take_every_legal_call():
    with FakeTensorMode() as mode:
        for options in (
            {},
            {"count": 2},
            {"output_lse": False},
            {"output_dtype": E4M3, "scale": 0.5},
        ):
            call = make_call((4, 2, 8), BF16, **options)
            fake = Call(*(mode.from_tensor(x) if type(x) is torch.Tensor else x for x in call))
            assert OP(*fake) is None
            assert merge(*fake) is None


@pytest.mark.parametrize("where", ["fake", "meta"])
@pytest.mark.parametrize(("changes", "message"), [
    ({"prefix_lse": (2, 4, 1)}, r"^prefix_lse: expected 2 dimensions"),
    ({"suffix_output": (4, 16)}, r"^suffix_output: expected 3 dimensions"),
    ({"output_lse": (8,)}, r"^output_lse: expected 2 dimensions"),
    ({"output": (1, 4, 2, 8)}, r"^output: expected 3 dimensions"),
])  # fmt: skip
def test_the_fake_refuses_wrong_ranks(changes, message, where, entry):
    shapes = {
        "output": (4, 2, 8), "prefix_output": (4, 2, 8), "prefix_lse": (2, 4),
        "suffix_output": (4, 2, 8), "suffix_lse": (2, 4), "output_lse": (2, 4),
    } | changes  # fmt: skip
    with FakeTensorMode() if where == "fake" else nullcontext():
        device = "meta" if where == "meta" else "cpu"
        operands = {name: torch.empty(shape, device=device) for name, shape in shapes.items()}
        with pytest.raises(ValueError, match=message):
            entry(**operands)


def test_the_fake_refuses_mixed_devices():
    with FakeTensorMode():
        call = [
            torch.empty(4, 2, 8),
            torch.empty(4, 2, 8, device="meta"),
            torch.empty(2, 4),
            torch.empty(4, 2, 8),
            torch.empty(2, 4),
        ]
        with pytest.raises(
            ValueError, match=r"^prefix_output: expected device cpu, the device of output, got meta"
        ):
            OP(*call)


@pytest.mark.parametrize("on_meta", [{"suffix_output"}, {"output"}, set(Call._fields)], ids=str)
def test_a_kernel_is_selected_for_tensors_with_memory(on_meta):
    call = make_call((4, 2, 8), BF16)._asdict()
    call |= {name: x.to("meta") for name, x in call.items() if name in on_meta and x is not None}
    with pytest.raises(ValueError, match=r"^\w+: expected (device|a tensor with memory)"):
        merge_attn_states.selected_kernel(**call)


# Tracing: the op must be in what was recorded, not have run beside it.


def test_make_fx_records_the_op():
    call = make_call((4, 2, 8), empty=False)
    graph = make_fx(lambda *args: merge(*args))(*call[:6])
    assert OP.default in [node.target for node in graph.graph.nodes]
    check(call, lambda *args: graph(*args[:6]))


def test_functionalize_is_refused(entry):
    """PyTorch refuses custom ops that write; it must not lose the write in silence."""
    call = make_call((4, 2, 8), empty=False)
    with pytest.raises(RuntimeError, match=r"^Found a custom \(non-ATen\) operator"):
        torch.func.functionalize(lambda *args: entry(*args))(*call)
    assert call.output.isnan().all()


def test_vmap_is_refused(entry):
    """No batching rule is written: nothing may be merged along the wrong dimension in silence."""
    calls = [make_call((4, 2, 8), empty=False, seed=i) for i in range(3)]
    batched = [torch.stack(operands) for operands in list(zip(*calls, strict=True))[:5]]
    with pytest.raises(RuntimeError, match=r"^Batching rule not implemented for merge_attn_states"):
        torch.vmap(lambda *args: entry(*args))(*batched)
    assert batched[0].isnan().all()


def test_jit_trace_records_the_op():
    call = make_call((4, 2, 8), empty=False)

    def step(output, prefix, prefix_lse, suffix, suffix_lse):
        merge(output, prefix, prefix_lse, suffix, suffix_lse)
        return output + 0

    traced = torch.jit.trace(step, call[:5], check_trace=False)
    assert "merge_attn_states" in str(traced.graph)


def test_a_dispatch_mode_sees_the_op():
    with Recording() as mode:
        merge(*make_call((4, 2, 8)))
    assert OP.default in mode.seen


def test_a_subclass_sees_the_op():
    seen = []

    class Wrapped(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            seen.append(func)
            return super().__torch_function__(func, types, args, kwargs or {})

    call = make_call((4, 2, 8))
    check(call, lambda *args: merge(*args[:3], args[3].as_subclass(Wrapped), *args[4:]))
    assert any(func in (OP, OP.default) for func in seen)


def test_a_parameter_under_no_grad():
    call = make_call((4, 2, 8), empty=False)
    with torch.no_grad():
        check(call, lambda *args: merge(args[0], torch.nn.Parameter(args[1]), *args[2:]))


@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad])
def test_the_version_counter_is_raised(context, device):
    call = make_call((4, 2, 8), device=device)
    before = {name: x._version for name, x in call._asdict().items() if x is not None}
    with context():
        merge(*call)
    for name, version in before.items():
        raised = getattr(call, name)._version > version
        assert raised == (name in ("output", "output_lse")), name


def test_backward_refuses_a_saved_tensor_that_was_overwritten(device):
    call = make_call((4, 2, 8), device=device, empty=False)
    weight = torch.ones((4, 2, 8), device=device, requires_grad=True)
    loss = (weight * call.output).sum()  # saves output
    with torch.no_grad():
        merge(*call)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_inference_mode(device):
    ordinary = make_call((4, 2, 8), device=device)
    with torch.inference_mode():
        check(ordinary)
        inside = make_call((4, 2, 8), device=device)
        assert inside.output.is_inference()
        check(inside)


def test_threads_do_not_meet(device):
    calls = [make_call((37 + i, 3, 64 + i), BF16, device, seed=i) for i in range(24)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda call: merge(*call), calls))
    for i, call in enumerate(calls):
        alone = check(make_call((37 + i, 3, 64 + i), BF16, device, seed=i))
        assert torch.equal(bits(call.output), bits(alone.output))


def test_pytorch_imports_the_package_while_it_is_imported_itself(tmp_path, child_environment):
    """A device backend of another package may need this one; a thread here would wait for ever."""
    (tmp_path / "backend.py").write_text(
        "import merge_attn_states\nloaded = lambda: print(merge_attn_states.__version__)\n"
    )
    metadata = tmp_path / "backend-1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: backend\nVersion: 1\n")
    (metadata / "entry_points.txt").write_text("[torch.backends]\nbackend = backend:loaded\n")
    path = os.pathsep.join([str(tmp_path), child_environment["PYTHONPATH"]])
    ran = subprocess.run(
        [sys.executable, "-c", "import torch"],
        env=child_environment | {"PYTHONPATH": path, "TORCH_DEVICE_BACKEND_AUTOLOAD": "1"},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert ran.stdout == f"{merge_attn_states.__version__}\n"
