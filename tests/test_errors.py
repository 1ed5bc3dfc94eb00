"""Every refused call with its message: the same through every way in, and nothing is written."""

import pytest
import torch
from support import (
    BF16,
    E4M3,
    F32,
    F64,
    LSES,
    OPERATOR_ERROR,
    ROWS,
    Call,
    assert_bits,
    blank,
    check,
    make_call,
    place,
    refusal_of,
)

import merge_attn_states
from merge_attn_states import merge_attn_states as merge

N, H, D = 4, 2, 64
OUTPUT_AXES, LSE_AXES = "[num_tokens, num_heads, head_size]", "[num_heads, num_tokens]"
SAME = "the dtype of prefix_output"
TABLE = "float32, float16, bfloat16, float64, float8_e4m3fn or float8_e5m2"


def zeros(*shape, dtype=F32):
    return torch.zeros(shape, dtype=dtype)


# (what is changed in a right call of 4 tokens, 2 heads and 64 elements, the message)
REFUSED = [
    # Rank.
    ({"output": zeros(N, H * D)},
     f"output: expected 3 dimensions {OUTPUT_AXES}, got 2: [4, 128]"),
    ({"output": zeros(1, N, H, D)},
     f"output: expected 3 dimensions {OUTPUT_AXES}, got 4: [1, 4, 2, 64]"),
    ({"output": zeros()}, f"output: expected 3 dimensions {OUTPUT_AXES}, got 0: []"),
    ({"prefix_output": zeros(N, H * D)},
     f"prefix_output: expected 3 dimensions {OUTPUT_AXES}, got 2: [4, 128]"),
    ({"suffix_output": zeros(N, H, D, 1)},
     f"suffix_output: expected 3 dimensions {OUTPUT_AXES}, got 4: [4, 2, 64, 1]"),
    # The unit dimension that cuDNN leaves on its LSE.
    ({"prefix_lse": zeros(H, N, 1)},
     f"prefix_lse: expected 2 dimensions {LSE_AXES}, got 3: [2, 4, 1]"),
    ({"suffix_lse": zeros(1, H, N)},
     f"suffix_lse: expected 2 dimensions {LSE_AXES}, got 3: [1, 2, 4]"),
    ({"output_lse": zeros(H * N)},
     f"output_lse: expected 2 dimensions {LSE_AXES}, got 1: [8]"),
    # Shape. output is what the others are held against.
    ({"prefix_output": zeros(N + 1, H, D)},
     f"prefix_output: expected shape [4, 2, 64] = {OUTPUT_AXES}, got [5, 2, 64]"),
    ({"suffix_output": zeros(N, H + 1, D)},
     f"suffix_output: expected shape [4, 2, 64] = {OUTPUT_AXES}, got [4, 3, 64]"),
    ({"suffix_output": zeros(N, H, D - 1)},
     f"suffix_output: expected shape [4, 2, 64] = {OUTPUT_AXES}, got [4, 2, 63]"),
    ({"suffix_output": zeros(1, H, D)},  # nothing is broadcast
     f"suffix_output: expected shape [4, 2, 64] = {OUTPUT_AXES}, got [1, 2, 64]"),
    ({"output": zeros(0, H, D)},
     f"prefix_output: expected shape [0, 2, 64] = {OUTPUT_AXES}, got [4, 2, 64]"),
    ({"prefix_lse": zeros(N, H)},
     f"prefix_lse: expected shape [2, 4] = {LSE_AXES}, got [4, 2]"),
    ({"suffix_lse": zeros(H, N + 1)},
     f"suffix_lse: expected shape [2, 4] = {LSE_AXES}, got [2, 5]"),
    ({"output_lse": zeros(N, H)},
     f"output_lse: expected shape [2, 4] = {LSE_AXES}, got [4, 2]"),
    # Dtype; the whole table is in test_dtypes.py.
    ({"prefix_output": zeros(N, H, D, dtype=torch.int32)},
     f"prefix_output: expected {TABLE}, got int32"),
    ({"suffix_output": zeros(N, H, D, dtype=BF16)},
     f"suffix_output: expected float32, {SAME}, got bfloat16"),
    ({"output": zeros(N, H, D, dtype=BF16)},
     f"output: expected float32, {SAME} (or, with output_scale, an FP8 dtype), got bfloat16"),
    ({"output": zeros(N, H, D, dtype=E4M3)},
     "output_scale: expected one float32 for a float8_e4m3fn output of float32 inputs, got none"),
    ({name: zeros(N, H, D, dtype=F64) for name in ROWS},
     "prefix_lse: expected float64, the dtype of an LSE of float64 outputs, got float32"),
    ({"prefix_lse": zeros(H, N, dtype=F64)},
     "prefix_lse: expected float32, the dtype of every LSE, got float64"),
    ({"suffix_lse": zeros(H, N, dtype=BF16)},
     "suffix_lse: expected float32, the dtype of every LSE, got bfloat16"),
    ({"output_lse": zeros(H, N, dtype=torch.float16)},
     "output_lse: expected float32, the dtype of every LSE, got float16"),
    # Scale.
    ({"output_scale": zeros()},
     "output_scale: expected none for a float32 output, since only an FP8 output is scaled, "
     "got a tensor"),
    ({"output": zeros(N, H, D, dtype=E4M3), "output_scale": zeros(H)},
     "output_scale: expected one element, got shape [2]"),
    ({"output": zeros(N, H, D, dtype=E4M3), "output_scale": zeros(0)},
     "output_scale: expected one element, got shape [0]"),
    ({"output": zeros(N, H, D, dtype=E4M3), "output_scale": zeros(dtype=BF16)},
     "output_scale: expected float32, the dtype of a scale, got bfloat16"),
    # Count.
    ({"prefill_tokens_with_context": -1},
     "prefill_tokens_with_context: expected a count in [0, 4] = [0, num_tokens], got -1"),
    ({"prefill_tokens_with_context": 5},
     "prefill_tokens_with_context: expected a count in [0, 4] = [0, num_tokens], got 5"),
    ({"prefill_tokens_with_context": 2**62},
     "prefill_tokens_with_context: expected a count in [0, 4] = [0, num_tokens], "
     f"got {2**62}"),
    # Memory; every kind of overlap is in test_overlap.py.
    ({"output": zeros(N, 1, D).expand(N, H, D)},
     "output: expected memory of its own for each element, got sizes [4, 2, 64] with strides "
     "[64, 0, 1] that overlap themselves"),
]  # fmt: skip


def written(call: Call):
    return [t for t in (call.output, call.output_lse) if t is not None]


@pytest.mark.parametrize("way", ["python", "torch.ops", "selected_kernel"])
@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_refused(changes, message, way, device):
    run = {
        "python": merge,
        "torch.ops": torch.ops.merge_attn_states.merge_attn_states,
        "selected_kernel": merge_attn_states.selected_kernel,
    }[way]
    moved = {
        name: value.clone(memory_format=torch.preserve_format).to(device)
        if isinstance(value, torch.Tensor) and 0 not in value.stride()
        else value
        for name, value in changes.items()
    }
    if "overlap" in message:
        moved = {"output": blank((N, 1, D), F32, device).expand(N, H, D)}
    call = make_call((N, H, D), F32, device)._replace(**moved)
    before = [tensor.clone() for tensor in written(call)]
    with pytest.raises(refusal_of(run)) as error:
        run(*call)
    assert str(error.value) == message
    for tensor, old in zip(written(call), before, strict=True):
        assert_bits(tensor, old)


@pytest.mark.parametrize(("names", "message"), [
    (("output", "prefix_output"),
     "output: expected no memory in common with prefix_output or exactly its memory with its "
     "strides, got a partial overlap"),
    (("output_lse", "suffix_lse"),
     "output_lse: expected no memory in common with suffix_lse or exactly its memory with its "
     "strides, got a partial overlap"),
    (("output_lse", "suffix_output"),
     "output_lse: expected no memory in common with suffix_output, got an overlap"),
])  # fmt: skip
def test_refused_overlap(names, message, device, entry):
    call = make_call((N, H, D), F32, device, empty=False)
    memory = place(torch.randn(4 * N * H * D), device)
    views = {}
    for i, name in enumerate(names):
        own = getattr(call, name)
        views[name] = memory[i : i + own.numel()].view(own.shape)
    before = memory.clone()
    with pytest.raises(refusal_of(entry)) as error:
        entry(*call._replace(**views))
    assert str(error.value) == message
    assert torch.equal(memory, before)


def test_bad_input_is_refused_without_tokens_too(device, entry):
    call = make_call((0, H, D), F32, device)
    with pytest.raises(refusal_of(entry), match=r"^prefix_lse: expected shape \[2, 0\]"):
        entry(*call._replace(prefix_lse=call.prefix_lse.new_zeros(0, H)))


def test_as_many_tokens_as_heads_are_not_mistaken(device, entry):
    """[N, H] given for [H, N] is silent where N == H: what is given is what is read."""
    call = make_call((4, 4, D), F32, device, empty=False)
    check(call, entry)
    straight = call.output.clone()
    check(call._replace(prefix_lse=call.prefix_lse.T, suffix_lse=call.suffix_lse.T), entry)
    assert not torch.allclose(straight, call.output)


@pytest.mark.parametrize("name", [*ROWS, *LSES, "output_scale"])
@pytest.mark.parametrize("value", [[[1.0]], "text", 1.0, torch.Size([1])], ids=str)
def test_what_is_no_tensor(name, value, device):
    call = make_call((N, H, D), F32, device)
    with pytest.raises(TypeError, match=rf"^{name}: "):
        merge(*call._replace(**{name: value}))
    assert call.output.isnan().all()


@pytest.mark.parametrize("name", [*ROWS, *LSES[:2]])
def test_a_required_tensor_left_out(name, device):
    call = make_call((N, H, D), F32, device)._replace(**{name: None})
    with pytest.raises(TypeError, match=rf"^{name}: "):
        merge(*call)
    with pytest.raises(OPERATOR_ERROR, match=rf"^{name}: expected a tensor, got none$"):
        torch.ops.merge_attn_states.merge_attn_states(*call)  # an undefined tensor


@pytest.mark.parametrize("count", [
    True, False,  # a flag is no count
    torch.tensor(2), torch.tensor([2]),  # reading it would synchronise
    2.0, "2", [2],
], ids=repr)  # fmt: skip
def test_what_is_no_count(count, device):
    call = make_call((N, H, D), F32, device)
    with pytest.raises(TypeError, match=r"^prefill_tokens_with_context: "):
        merge(*call._replace(prefill_tokens_with_context=count))
    assert call.output.isnan().all()


def test_a_count_is_taken_by_index(device):
    class Two:
        def __index__(self):
            return 2

    numpy = pytest.importorskip("numpy")
    for count in (Two(), numpy.int64(2), numpy.uint8(2)):
        call = make_call((N, H, D), F32, device, count=2)
        check(call, lambda *args, count=count: merge(*args[:6], count))


@pytest.mark.parametrize("count", [2**63, -(2**70)])  # more than the operator's schema carries
def test_a_count_beyond_64_bits(count, device):
    call = make_call((N, H, D), F32, device)
    with pytest.raises(ValueError, match=rf"^prefill_tokens_with_context: .* got {count}$"):
        merge(*call._replace(prefill_tokens_with_context=count))
