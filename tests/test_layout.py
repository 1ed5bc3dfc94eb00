"""Every producer's layout: strides of every operand by itself, alignment, and borders of 2^31."""

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
    Call,
    assert_bits,
    blank,
    check,
    cloned,
    compare,
    expected_kernel,
    make_call,
    place,
)

import merge_attn_states
from merge_attn_states import merge_attn_states as merge

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


def far_apart(call, name, border, device) -> Call:
    """`name` stored anew: three rows so far apart that the second and third lie past the border."""
    own = getattr(call, name)
    length = 2 * border + 2 * max(own.shape)
    try:
        memory = torch.empty(length, dtype=own.dtype, device=device)
    except (RuntimeError, torch.OutOfMemoryError):
        pytest.skip(f"{length * own.element_size() >> 30} GiB for one operand are not there")
    strides = [border if size == 3 else max(own.shape) for size in own.shape]
    strides[2:] = [1] * (own.dim() - 2)  # the elements of a row lie side by side
    return call._replace(**{name: memory.as_strided(own.shape, strides).copy_(own)})


FAR_APART = {  # the axis of three is the one that is far apart
    "vectorized": ((3, 1, 64), {}),
    "generic, rows wider than a block": ((3, 1, 8192), {}),
    "tokens first": ((2, 3, 64), {"strides": dict.fromkeys(ROWS, (64, 128, 1))}),
    "FP8 output": ((3, 1, 64), {"output_dtype": E4M3, "scale": 0.5}),
}


# On a CPU the untouched pages between the rows cost address space alone.
@pytest.mark.parametrize("name", [*ROWS, *LSES])
@pytest.mark.parametrize("border", [2**31 - 64, 2**31, 2**32])  # below int32, uint32 elements
@pytest.mark.parametrize("variant", FAR_APART)
def test_rows_past_the_borders_of_32_bits(variant, border, name, device, gigabytes):
    shape, options = FAR_APART[variant]
    near = make_call(shape, BF16, device, empty=False, **options)
    call = far_apart(near, name, border // 4 if name in LSES else border, device)
    kernel = merge_attn_states.selected_kernel(*call).kernel
    assert kernel == expected_kernel(call)
    assert kernel == (
        "cpu" if device == "cpu" else "generic" if "generic" in variant else "vectorized"
    )
    dense = check(cloned(near))  # with outputs of its own, which `call` does not share
    merge(*call)
    assert_bits(call.output, dense.output)
    assert_bits(call.output_lse, dense.output_lse)


# 2^31 and 2^32 elements and a little more; the odd head size runs the generic kernel.
@pytest.mark.parametrize("head_size", [128, 127])
@pytest.mark.parametrize("border", [2**31, 2**32])
def test_more_elements_than_32_bits_count(border, head_size, cuda, gigabytes):
    heads = 16
    tokens = border // (heads * head_size) + 17
    need = 3 * 2 * tokens * heads * head_size + 3 * 4 * tokens * heads
    if torch.cuda.mem_get_info()[0] < need * 1.05:
        pytest.skip(f"{need >> 30} GiB of GPU memory are not free")
    shape, empty = (tokens, heads, head_size), {"device": cuda, "dtype": BF16}
    call = Call(
        output=torch.full(shape, float("nan"), **empty),
        prefix_output=torch.empty(shape, **empty).normal_(),
        prefix_lse=torch.empty((heads, tokens), device=cuda).normal_(),
        suffix_output=torch.empty(shape, **empty).normal_(),
        suffix_lse=torch.empty((heads, tokens), device=cuda).normal_(),
        output_lse=torch.full((heads, tokens), float("nan"), device=cuda),
        prefill_tokens_with_context=tokens - 3,
    )
    merge(*call)
    around = border // (heads * head_size)
    for first in (0, around // 2 - 2, around - 5, tokens - 20):  # rows on both sides
        rows = slice(first, first + 20)
        part = make_call((20, heads, head_size), BF16, cuda)
        count = min(max(tokens - 3 - first, 0), 20)
        part = part._replace(
            prefix_output=call.prefix_output[rows], suffix_output=call.suffix_output[rows],
            prefix_lse=call.prefix_lse[:, rows], suffix_lse=call.suffix_lse[:, rows],
            prefill_tokens_with_context=count,
        )  # fmt: skip
        inputs = part._replace(output=blank((20, heads, head_size), BF16, cuda))
        compare(inputs, call.output[rows], call.output_lse[:, rows])
    assert not call.output.isnan().any()


@pytest.mark.parametrize("rows", [2**31 - 1, 2**31 + 3])
def test_more_rows_than_31_bits_count(rows, cuda, gigabytes):
    """Without elements a row is its LSE alone; rows past 2^31 are divided in 64 bits."""
    if torch.cuda.mem_get_info()[0] < 4 * rows * 1.6:
        pytest.skip(f"{int(4 * rows * 1.6) >> 30} GiB of GPU memory are not free")
    prefix, suffix = (torch.tensor([[x]], device=cuda).expand(1, rows) for x in (1.5, 0.5))
    values = torch.empty((rows, 1, 0), device=cuda, dtype=BF16)
    output_lse = torch.full((1, rows), float("nan"), device=cuda)
    merge(values, values, prefix, values, suffix, output_lse)
    expected = torch.logaddexp(prefix[0, 0], suffix[0, 0])
    for part in output_lse[0].split(2**28):
        assert ((part - expected).abs() < 1e-6).all()


def test_strides_without_an_element_mean_nothing(device):
    """head_size 0: the LSEs are merged, and no address is computed from strides near 2^62."""
    call = make_call((4, 2, 8), F32, device, empty=False)
    wild = torch.empty(0, device=device).as_strided((4, 2, 0), (2**62, 2**61, 3))
    rows = dict.fromkeys(("output", "prefix_output", "suffix_output"), wild)
    merge_attn_states.merge_attn_states(*call._replace(**rows))
    expected = torch.logaddexp(call.prefix_lse, call.suffix_lse)
    torch.testing.assert_close(call.output_lse, expected)
