"""Every producer's layout: strides of every operand by itself and alignment."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import (
    BF16,
    E4M3,
    E5M2,
    F16,
    F32,
    F64,
    LSES,
    ROWS,
    check,
    make_call,
    place,
)

import merge_attn_states

N, H, D = 19, 3, 64  # no multiple of a tile's tokens or heads

ROW_STRIDES = {
    "heads first, [H, N, D]": (D, N * D, 1),
    "padded heads, 192 wide": (H * 192, 192, 1),
    "head slice of 7 heads": (7 * D, D, 1),
    "every third token": (3 * H * D, D, 1),
    "odd token stride": (H * D + 1, D, 1),
    "odd head stride": (H * (D + 3), D + 3, 1),
    "element stride 2": (H * 2 * D, 2 * D, 2),
    "elements outermost, [D, N, H]": (H, 1, N * H),
    "tokens innermost, [H, D, N]": (1, D * N, N),
}
LSE_STRIDES = {
    "[N, H] storage": (1, H),
    "slice of a longer buffer": (N + 5, 1),
    "every second token": (2 * N, 2),
    "both strided": (3 * N + 1, 3),
    "[N, H] storage of 7 heads": (1, 7),
}
ONE_OPERAND = [(name, layout) for name in ROWS for layout in ROW_STRIDES] + [
    (name, layout) for name in LSES for layout in LSE_STRIDES
]


@pytest.mark.parametrize("dtype", [F32, BF16, F64, E4M3], ids=str)
@pytest.mark.parametrize(("name", "layout"), ONE_OPERAND)
def test_one_operand_in_another_layout(name, layout, dtype, device, entry):
    strides = (ROW_STRIDES if name in ROWS else LSE_STRIDES)[layout]
    check(make_call((N, H, D), dtype, device, strides={name: strides}, count=17), entry)


@pytest.mark.parametrize("dtype", [F32, F16, BF16, F64], ids=str)
@pytest.mark.parametrize("shift", range(9))
def test_every_operand_in_its_own_layout(shift, dtype, device):
    rows, lses = list(ROW_STRIDES.values()), list(LSE_STRIDES.values())
    strides = {name: rows[(i * 4 + shift) % len(rows)] for i, name in enumerate(ROWS)}
    strides |= {name: lses[(i * 2 + shift) % len(lses)] for i, name in enumerate(LSES)}
    check(make_call((N, H, D), dtype, device, strides=strides, count=17))


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_token_and_head_strides_are_free_on_the_vectorized_kernel(dtype, cuda):
    for layout in list(ROW_STRIDES.values())[:4]:
        call = make_call((N, H, D), dtype, cuda, strides=dict.fromkeys(ROWS, layout))
        assert merge_attn_states.selected_kernel(*call).kernel == "vectorized"
        check(call)


def test_padded_heads_of_one_producer_only(device):
    """128 used of 192, prefix and output as they are: the suffix has a head stride of its own."""
    padded = place(torch.full((N, H, 192), float("nan"), dtype=BF16), device)
    call = make_call((N, H, 128), BF16, device)
    padded[..., :128] = call.suffix_output
    check(call._replace(suffix_output=padded[..., :128]))


@pytest.mark.parametrize("dtype", [F32, F16, F64, E5M2], ids=str)
@pytest.mark.parametrize("name", [*ROWS, *LSES])
def test_every_alignment(name, dtype, device):
    # All offsets inside 16 bytes; at D = 64 only the offset decides about the kernel.
    width = (F64 if dtype == F64 else F32) if name in LSES else dtype
    for offset in range(16 // width.itemsize):
        check(make_call((5, 2, 64), dtype, device, offsets={name: offset}))


@pytest.mark.parametrize("output_dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize(("name", "layout"), [pair for pair in ONE_OPERAND if pair[0] in ROWS])
def test_a_wider_output_of_fp8_inputs_in_another_layout(name, layout, output_dtype, device, entry):
    strides = {name: ROW_STRIDES[layout]}
    check(
        make_call((N, H, D), E4M3, device, output_dtype=output_dtype, strides=strides, count=17),
        entry,
    )


@pytest.mark.parametrize("output_dtype", [F32, F16], ids=str)
@pytest.mark.parametrize("name", ROWS)
def test_every_alignment_of_a_wider_output_of_fp8_inputs(name, output_dtype, device):
    width = output_dtype if name == "output" else E5M2
    for offset in range(16 // width.itemsize):
        check(
            make_call((5, 2, 64), E5M2, device, output_dtype=output_dtype, offsets={name: offset})
        )


@pytest.mark.parametrize("input_dtype", [F32, BF16], ids=str)
def test_every_alignment_of_an_fp8_output(input_dtype, device):
    for offset in range(17):  # its pack is 8 bytes, 4 with float32 inputs
        check(
            make_call(
                (5, 2, 64),
                input_dtype,
                device,
                output_dtype=E4M3,
                scale=0.5,
                offsets={"output": offset},
            )
        )


@pytest.mark.parametrize("name", ["prefix_output", "suffix_output"])
@pytest.mark.parametrize("axes", [(0,), (1,), (2,), (0, 1), (0, 1, 2)], ids=str)
def test_expanded_values(axes, name, device):
    call = make_call((N, H, D), BF16, device)
    index = tuple(slice(0, 1) if axis in axes else slice(None) for axis in range(3))
    one = torch.randn(getattr(call, name)[index].shape).to(BF16)
    check(call._replace(**{name: place(one, device).expand(N, H, D)}))


@pytest.mark.parametrize("name", ["prefix_lse", "suffix_lse"])
@pytest.mark.parametrize("axes", [(0,), (1,), (0, 1)], ids=str)
def test_expanded_lse(axes, name, device):
    call = make_call((N, H, D), BF16, device, empty=False)
    index = tuple(slice(0, 1) if axis in axes else slice(None) for axis in range(2))
    one = torch.randn(getattr(call, name)[index].shape)
    check(call._replace(**{name: place(one, device).expand(H, N)}))


def test_one_tensor_for_both_parts(device):
    call = make_call((N, H, D), F32, device, empty=False)
    check(call._replace(suffix_output=call.prefix_output, suffix_lse=call.prefix_lse))


# A stride that means nothing may be anything: zero, one, odd, or past every address.
@pytest.mark.parametrize("stride", [0, 1, 7, 2**40, 2**62])
@pytest.mark.parametrize("shape", [(1, 4, 64), (4, 1, 64), (4, 4, 1), (1, 1, 64), (1, 1, 1)])
def test_size_one_dimensions(shape, stride, device, entry):
    call = make_call(shape, F32, device, empty=False)
    usual = check(call)

    def odd(tensor):
        strides = [
            stride if size == 1 else step
            for size, step in zip(tensor.shape, tensor.stride(), strict=True)
        ]
        return tensor.as_strided(tensor.shape, strides, tensor.storage_offset())

    for names in ([*ROWS, *LSES], ["prefix_output", "suffix_lse"], ["output"]):
        views = {name: odd(getattr(call, name)) for name in names}
        call.output.fill_(float("nan"))
        again = call._replace(**views)
        assert merge_attn_states.selected_kernel(*again) == merge_attn_states.selected_kernel(
            *usual
        )
        check(again, entry)
    # In place: the same memory, though its meaningless strides differ.
    check(call._replace(output=odd(call.prefix_output), output_lse=odd(call.suffix_lse)), entry)


@given(data=st.data())
@settings(max_examples=60)
def test_any_strides_and_offsets(data):
    """Every operand with an order of axes, gaps and an offset of its own, on the CPU."""
    shape = data.draw(st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(1, 40)))
    dtypes = [(dtype, dtype) for dtype in (F32, F16, BF16, F64, E4M3)] + [(E4M3, F16), (E5M2, F32)]
    dtype, output_dtype = data.draw(st.sampled_from(dtypes))
    count = data.draw(st.none() | st.integers(0, shape[0]))
    strides, offsets = {}, {}
    for name in (*ROWS, *LSES):
        sizes = shape if name in ROWS else (shape[1], shape[0])
        step, own = 1, [0] * len(sizes)
        for axis in data.draw(st.permutations(range(len(sizes)))):
            own[axis] = step * data.draw(st.integers(1, 2))
            step = own[axis] * sizes[axis] + data.draw(st.integers(0, 3))
        strides[name], offsets[name] = tuple(own), data.draw(st.integers(0, 8))
    options = {"count": count, "strides": strides, "offsets": offsets}
    check(make_call(shape, dtype, output_dtype=output_dtype, **options))


def test_strides_without_an_element_mean_nothing(device):
    """head_size 0: the LSEs are merged, and no address is computed from strides near 2^62."""
    call = make_call((4, 2, 8), F32, device, empty=False)
    wild = torch.empty(0, device=device).as_strided((4, 2, 0), (2**62, 2**61, 3))
    rows = dict.fromkeys(("output", "prefix_output", "suffix_output"), wild)
    merge_attn_states.merge_attn_states(*call._replace(**rows))
    expected = torch.logaddexp(call.prefix_lse, call.suffix_lse)
    torch.testing.assert_close(call.output_lse, expected)
