"""Operands that are more or less than memory with strides."""

import pytest
import torch
from support import (
    E4M3,
    F32,
    LSES,
    OLDER_THAN_2_14,
    ROWS,
    Call,
    assert_bits,
    check,
    cloned,
    make_call,
    needs_bounds,
    refusal_of,
    refuses,
)

from merge_attn_states import merge_attn_states as merge
from merge_attn_states import selected_kernel
from merge_attn_states._library import fast_path

N, H, D = 4, 2, 64


NEGATED = {  # how memory comes by the other sign; the second kind has the strides of any tensor
    "an imaginary part": lambda x: torch.complex(x, -x).conj().imag,
    "a view": lambda x: torch._neg_view(-x),
}


def sees_sign(way, kind) -> None:
    """Skip where the way does not ask: the fast path, of a tensor with a stride of 1."""
    if kind == "a view" and way is merge:
        pytest.skip("the fast path takes a contiguous tensor for a positive one")


@pytest.mark.parametrize("kind", NEGATED)
@pytest.mark.parametrize("name", ["output", "output_lse"])
def test_a_negated_view_is_no_output(name, kind, device, way):
    """It is memory with the sign still to be turned: written as it is, it is wrong.

    Under no_grad: compiled in grad mode, the Python function copies into its outputs, which turns
    the sign.
    """
    sees_sign(way.merge if way.backend is None else None, kind)
    call = make_call((N, H, D), F32, device)
    negated = NEGATED[kind](torch.ones_like(getattr(call, name)))
    assert negated.is_neg()
    refused = pytest.raises(way.refusal, match=rf"{name}: expected .*negative bit")
    with torch.no_grad(), refused:
        way.run(lambda *args: way.merge(*args))(*call._replace(**{name: negated})[:6])
    assert (negated == 1).all()


@pytest.mark.parametrize("name", ["output", "output_lse"])
def test_no_kernel_is_selected_for_a_negated_output(name, device):
    call = make_call((N, H, D), F32, device)
    negated = NEGATED["an imaginary part"](torch.ones_like(getattr(call, name)))
    with pytest.raises(ValueError, match=rf"^{name}: expected .*negative bit"):
        selected_kernel(*call._replace(**{name: negated}))


@pytest.mark.parametrize("kind", NEGATED)
@pytest.mark.parametrize("name", ["prefix_output", "suffix_output", "prefix_lse", "suffix_lse"])
def test_a_negated_view_is_read_with_its_sign(name, kind, device, way):
    sees_sign(way.merge if way.backend is None else None, kind)
    if way.backend == "inductor":
        pytest.skip("Inductor forgets the bit, for every operator")
    call = make_call((N, H, D), F32, device, empty=False)
    negated = NEGATED[kind](getattr(call, name))
    assert negated.is_neg()
    plain = check(call).output.clone()
    way.run(lambda *args: way.merge(*args))(*call._replace(**{name: negated})[:6])
    torch.testing.assert_close(call.output, plain, rtol=0, atol=0)


# Copy-on-write clones.


@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_inputs_stay_lazy_and_outputs_do_not(context, device, entry):
    """A lazy input of 64 MB would be copied to be read."""
    with context():
        sources = make_call((N, H, D), F32, device, empty=False)[:6]
        before, expected = cloned(sources), cloned(sources)
        merge(*expected)
        call = Call(*(x._lazy_clone() for x in sources))
        entry(*call)
        lazy = [torch._C._is_cow_tensor(x) for x in call[:6]]
    reads = has_const_pointers(entry)
    assert lazy == [False, reads, reads, reads, reads, False]
    assert_bits(call.output, expected.output)
    assert_bits(call.output_lse, expected.output_lse)
    for source, old in zip(sources, before, strict=False):
        assert_bits(source, old)


def has_const_pointers(way) -> bool:
    """Before 2.14 the fast path describes a tensor by DLPack, which copies a lazy one."""
    return way is not merge or not OLDER_THAN_2_14 or fast_path()[0] is None


def test_a_lazy_clone_merged_in_place(device, entry):
    """The input has to be the memory that the output becomes."""
    call = make_call((N, H, D), F32, device, empty=False)
    source, source_lse = call.prefix_output.clone(), call.prefix_lse.clone()
    lazy, lazy_lse = source._lazy_clone(), source_lse._lazy_clone()
    expected = check(call)
    entry(*call._replace(output=lazy, prefix_output=lazy, prefix_lse=lazy_lse, output_lse=lazy_lse))
    assert_bits(lazy, expected.output)
    assert_bits(lazy_lse, expected.output_lse)
    assert_bits(source, call.prefix_output)
    assert_bits(source_lse, call.prefix_lse)


@pytest.mark.parametrize("name", ["output", "prefix_output", "suffix_lse", "output_lse"])
def test_mixed_devices(name, device, entry):
    """A meta operand among real ones would otherwise return and do nothing."""
    call = make_call((N, H, D), F32, device)
    there = str(call.output.device)
    # The other operands are held against output's device.
    named, expected, got = (
        ("prefix_output", "meta", there) if name == "output" else (name, there, "meta")
    )
    message = rf"^{named}: expected device {expected}, the device of output, got {got}"
    with pytest.raises(ValueError, match=message):
        entry(*call._replace(**{name: getattr(call, name).to("meta")}))
    assert call.output.isnan().all()


@pytest.mark.parametrize("name", [*ROWS, *LSES])
def test_a_cpu_operand_among_cuda_ones(name, cuda, entry):
    call = make_call((N, H, D), F32, cuda)
    named, expected, got = (
        ("prefix_output", "cpu", "cuda:0") if name == "output" else (name, "cuda:0", "cpu")
    )
    message = rf"^{named}: expected device {expected}, the device of output, got {got}"
    with pytest.raises(refusal_of(entry), match=message):
        entry(*call._replace(**{name: getattr(call, name).cpu()}))
    assert call.output.isnan().all()


def test_a_scale_on_another_device(cuda, entry):
    call = make_call((N, H, D), F32, cuda, output_dtype=E4M3, scale=0.5)
    message = r"^output_scale: expected device cuda:0, .*, got cpu"
    with pytest.raises(refusal_of(entry), match=message):
        entry(*call._replace(output_scale=call.output_scale.cpu()))


@pytest.mark.parametrize("make", [torch.Tensor.to_sparse, torch.Tensor.to_mkldnn], ids=repr)
@pytest.mark.parametrize("name", ["output", "prefix_output", "suffix_output"])
def test_layouts_without_strides(name, make, entry):
    """PyTorch's dispatcher finds no kernel for them."""
    call = make_call((N, H, D), F32, "cpu", empty=False)
    other = make(torch.ones((N, H, D)))
    with pytest.raises(NotImplementedError, match=r"^Could not run 'merge_attn_states::"):
        entry(*call._replace(**{name: other}))
    assert call.output.isnan().all()


@pytest.mark.parametrize("name", [*ROWS, *LSES])
@pytest.mark.parametrize("left", [0, 16])  # bytes: all is gone, and too little is left
def test_a_storage_that_was_taken_away(left, name, entry):
    if left:
        needs_bounds(entry)
    call = make_call((N, H, D), F32, "cpu", empty=False)
    operand = getattr(call, name).clone()
    operand.untyped_storage().resize_(left)
    message = "memory, got a null data pointer" if left == 0 else "elements inside its memory of 16"
    with refuses(refusal_of(entry), rf"^{name}: expected {message}"):
        entry(*call._replace(**{name: operand}))
    assert call.output.isnan().all()


@pytest.mark.parametrize("name", [*ROWS, *LSES])
def test_a_storage_taken_away_from_behind_an_offset(name, entry):
    """Its pointer is not null but as far from it as the offset."""
    call = make_call((N, H, D), F32, "cpu", empty=False)
    operand = torch.stack([getattr(call, name)] * 2)[1]
    operand.untyped_storage().resize_(0)
    with refuses(refusal_of(entry), rf"^{name}: expected memory, got a null data pointer"):
        entry(*call._replace(**{name: operand}))
    assert call.output.isnan().all()


@pytest.mark.parametrize("name", [*ROWS, *LSES])
def test_an_address_inside_an_element(name, entry):
    call = make_call((N, H, D), F32, "cpu", empty=False)
    own = getattr(call, name)
    memory = torch.full((own.numel() * 4 + 4,), 0xFF, dtype=torch.uint8).numpy()
    odd = torch.frombuffer(memory, dtype=F32, offset=1, count=own.numel()).view(own.shape)
    message = rf"^{name}: expected an address that is a multiple of 4"
    with pytest.raises(refusal_of(entry), match=message):
        entry(*call._replace(**{name: odd}))
    assert (memory == 0xFF).all()
    assert call.output.isnan().all()
