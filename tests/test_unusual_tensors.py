"""Operands that are more or less than memory with strides."""

import pytest
import torch
from support import E4M3, F32, LSES, ROWS, check, make_call, refuses

from merge_attn_states import merge_attn_states as merge

N, H, D = 4, 2, 64


@pytest.mark.parametrize("name", [*ROWS, *LSES])
def test_no_gradient_is_promised(name, device):
    call = make_call((N, H, D), F32, device)
    getattr(call, name).requires_grad_()
    with pytest.raises(ValueError, match=rf"^{name}: .*grad"):
        merge(*call)
    assert call.output.isnan().all()
    with torch.no_grad():
        check(call)


def test_a_negated_view_is_no_output(device):
    """`.conj().imag` is memory with the sign still to be turned: written as it is, it is wrong."""
    memory = torch.zeros((N, H, D), dtype=torch.complex64, device=device)
    negated = memory.conj().imag
    assert negated.is_neg()
    with pytest.raises(ValueError, match=r"^output: .*negative"):
        merge(*make_call((N, H, D), F32, device)._replace(output=negated))
    lse = torch.zeros((H, N), dtype=torch.complex64, device=device).conj().imag
    with pytest.raises(ValueError, match=r"^output_lse: .*negative"):
        merge(*make_call((N, H, D), F32, device)._replace(output_lse=lse))
    assert (memory == 0).all()


@pytest.mark.parametrize("name", ["prefix_output", "suffix_output", "prefix_lse", "suffix_lse"])
def test_a_negated_view_is_read_with_its_sign(name, device, entry):
    call = make_call((N, H, D), F32, device, empty=False)
    values = getattr(call, name).clone()
    negated = torch.complex(values, -values).conj().imag
    assert negated.is_neg()
    plain = check(call).output.clone()
    entry(*call._replace(**{name: negated}))
    torch.testing.assert_close(call.output, plain, rtol=0, atol=0)


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
    with pytest.raises(ValueError, match=message):
        entry(*call._replace(**{name: getattr(call, name).cpu()}))
    assert call.output.isnan().all()


def test_a_scale_on_another_device(cuda, entry):
    call = make_call((N, H, D), F32, cuda, output_dtype=E4M3, scale=0.5)
    with pytest.raises(ValueError, match=r"^output_scale: expected device cuda:0, .*, got cpu"):
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
    call = make_call((N, H, D), F32, "cpu", empty=False)
    operand = getattr(call, name).clone()
    operand.untyped_storage().resize_(left)
    message = "memory, got a null data pointer" if left == 0 else "elements inside its memory of 16"
    with refuses(ValueError, rf"^{name}: expected {message}"):
        entry(*call._replace(**{name: operand}))
    assert call.output.isnan().all()


@pytest.mark.parametrize("name", [*ROWS, *LSES])
def test_a_storage_taken_away_from_behind_an_offset(name, entry):
    """Its pointer is not null but as far from it as the offset."""
    call = make_call((N, H, D), F32, "cpu", empty=False)
    operand = torch.stack([getattr(call, name)] * 2)[1]
    operand.untyped_storage().resize_(0)
    with refuses(ValueError, rf"^{name}: expected memory, got a null data pointer"):
        entry(*call._replace(**{name: operand}))
    assert call.output.isnan().all()


@pytest.mark.parametrize("name", [*ROWS, *LSES])
def test_an_address_inside_an_element(name, entry):
    call = make_call((N, H, D), F32, "cpu", empty=False)
    own = getattr(call, name)
    memory = torch.full((own.numel() * 4 + 4,), 0xFF, dtype=torch.uint8).numpy()
    odd = torch.frombuffer(memory, dtype=F32, offset=1, count=own.numel()).view(own.shape)
    with pytest.raises(ValueError, match=rf"^{name}: expected an address that is a multiple of 4"):
        entry(*call._replace(**{name: odd}))
    assert (memory == 0xFF).all()
    assert call.output.isnan().all()
