"""The merge itself: every dtype over the sizes that occur, and the edges of the kernels."""

import subprocess
import sys

import pytest
import torch
from support import BF16, E4M3, F16, F32, F64, FLOATS, Call, assert_bits, bits, check, make_call

import merge_attn_states
from merge_attn_states import merge_attn_states as merge

HEAD_SIZES = [
    1,  # smaller than a pack, and no dimension at all to stride over
    3,  # odd
    4,  # one float32 pack, half a 16-bit one
    8,  # one 16-bit pack
    31, 33,  # around a 256-bit vector of bytes: every tail of a CPU loop
    48,  # packs that do not divide a warp
    64,  # gpt-oss
    80,  # Phi-2
    96,  # Phi-3-mini
    100,  # a multiple of the float32 pack, not of the 16-bit one
    127,  # odd, one less than the usual size
    128,  # most models
    192,  # DeepSeek's padded heads
    256,  # Gemma-3
    512,  # DeepSeek absorbed
    576,  # the same with its rope part
    1000,  # no model: any size works
    4104,  # more packs than a block has threads
]  # fmt: skip
TOKENS = [
    1,  # decode
    7, 8, 9,  # a tile of 8 tokens (D = 256 and small sizes)
    15, 16, 17,  # a tile of 16 (D = 128)
    31, 32, 33,  # a tile of 32 (D = 64)
    63, 64, 65,  # two of these, four of those
    257,  # odd and several blocks of rows
]  # fmt: skip
HEADS = [
    1,  # MQA and a rank of a large group
    5, 12, 33,  # not a power of two, and more than one warp
    64, 65,  # 65 heads x 16 packs are more than 1,024 threads
    96, 128, 130, 256,  # a whole model on one GPU, and beyond
]  # fmt: skip


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("head_size", HEAD_SIZES)
def test_head_sizes(head_size, dtype, device):
    # 9 tokens x 3 heads: no multiple of any tile in either direction.
    check(make_call((9, 3, head_size), dtype, device))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("tokens", TOKENS)
def test_tokens(tokens, dtype, device):
    for head_size in (64, 100, 128):  # the two usual tiles, and what no pack divides
        check(make_call((tokens, 3, head_size), dtype, device))


@pytest.mark.parametrize("head_size", [64, 80, 96, 128, 192, 256, 512, 576])  # today's models
@pytest.mark.parametrize("heads", HEADS)
def test_heads(heads, head_size, device):
    check(make_call((2, heads, head_size), BF16, device))


@pytest.mark.parametrize(
    "shape",
    [(0, 4, 64), (4, 0, 64), (0, 0, 64), (0, 0, 0), (4, 2, 0)],
    ids=lambda shape: "x".join(map(str, shape)),
)
def test_nothing_to_do_is_legal(shape, device, entry):
    check(make_call(shape, BF16, device), entry)


@pytest.mark.parametrize("head_size", [128, 99])  # vectorized, generic
def test_every_way_in(head_size, device, entry):
    call = make_call((5, 3, head_size), BF16, device, count=3)
    check(call, lambda *args: entry(**Call(*args)._asdict()))  # by keyword
    check(make_call((5, 3, head_size), BF16, device), entry)  # by position
    assert entry(*call) is None


def test_optional_arguments_may_be_left_out(device, entry):
    check(make_call((5, 3, 64), device=device, output_lse=False), lambda *args: entry(*args[:5]))


# None, nobody, the first, all but one, all; 16 and 17 stand around the tile's border.
@pytest.mark.parametrize("count", [None, 0, 1, 15, 16, 17, 32, 33])
@pytest.mark.parametrize("head_size", [128, 99])  # vectorized, generic
@pytest.mark.parametrize("dtype", [F32, BF16, F64], ids=str)
def test_context_counts(count, head_size, dtype, device, entry):
    check(make_call((33, 2, head_size), dtype, device, count=count), entry)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_weights_at_every_distance(dtype, device):
    # From equal parts to the underflow of the smaller weight at 104 (float32) and 746 (float64).
    call = make_call((2001, 1, 8), dtype, device, empty=False)
    call.prefix_lse.copy_(torch.linspace(-800, 800, 2001))
    call.suffix_lse.fill_(0.25)
    check(call)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("head_size", [64, 99])  # vectorized, generic
def test_extreme_values(head_size, dtype, device):
    """No overflow from weights that sum to a little more than 1, and no flush to zero.

    In float32 and float64 the last two ulp below the largest number may round to infinity (README).
    """
    info = torch.finfo(dtype)
    largest = info.max if dtype in (F16, BF16) else info.max * (1 - 4 * info.eps)
    tiny = torch.tensor(info.smallest_normal, dtype=F64) * info.eps
    for value in (largest, -largest, tiny.item(), 2 * tiny.item(), info.smallest_normal):
        call = make_call((257, 1, head_size), dtype, device, empty=False)
        call.prefix_output.fill_(value)
        call.suffix_output.fill_(value)
        if abs(value) < 1:  # a half of a smallest number is none: equal parts, exact halves
            call.suffix_lse.copy_(call.prefix_lse)
            call.prefix_output.mul_(2)
            call.suffix_output.zero_()
        check(call)


def rows_of(call: Call, token: int, head: int, **layout) -> Call:
    """One row as a call of its own, in another layout."""
    single = make_call(
        (1, 1, call.output.shape[2]), call.output.dtype, call.output.device, empty=False, **layout
    )
    for name in ("prefix_output", "suffix_output"):
        getattr(single, name).copy_(getattr(call, name)[token, head])
    for name in ("prefix_lse", "suffix_lse"):
        getattr(single, name).copy_(getattr(call, name)[head, token])
    return single


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("head_size", [128, 100, 13])  # full vectors, a tail, nearly only a tail
def test_a_row_depends_on_nothing_but_itself(head_size, dtype, device):
    call = check(make_call((37, 5, head_size), dtype, device))
    names = ("output", "prefix_output", "suffix_output")
    layouts = [
        {},
        {"offsets": dict.fromkeys(names, 1)},  # misaligned: generic on CUDA
        {"strides": dict.fromkeys(names, (1, 1, 3))},  # an element stride
        {"strides": {"suffix_output": (1, 1, 2)}},  # mixed
    ]
    for token, head in [(0, 0), (36, 4), (17, 2), (5, 3)]:
        for layout in layouts:
            single = check(rows_of(call, token, head, **layout))
            assert_bits(single.output[0, 0], call.output[token, head])
            assert_bits(single.output_lse[0, 0], call.output_lse[head, token])


@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
@pytest.mark.parametrize("head_size", [48, 64, 128, 512])  # tiles of each kind
@pytest.mark.parametrize("output_dtype", [None, E4M3], ids=str)
def test_vectorized_and_generic_agree_bit_for_bit(output_dtype, head_size, dtype, cuda):
    options = {"output_dtype": output_dtype, "scale": 0.3 if output_dtype else None, "count": 60}
    aligned = make_call((67, 5, head_size), dtype, cuda, **options)
    shifted = make_call((67, 5, head_size), dtype, cuda, **options, offsets={"suffix_output": 1})
    assert merge_attn_states.selected_kernel(*aligned).kernel == "vectorized"
    assert merge_attn_states.selected_kernel(*shifted).kernel == "generic"
    check(aligned), check(shifted)
    assert_bits(aligned.output, shifted.output)
    assert_bits(aligned.output_lse, shifted.output_lse)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_a_repeated_call_gives_the_same_bits(dtype, device):
    call = check(make_call((300, 7, 128), dtype, device))  # several threads and many blocks
    first, first_lse = call.output.clone(), call.output_lse.clone()
    for _ in range(5):
        merge(*call)
        assert_bits(call.output, first)
        assert_bits(call.output_lse, first_lse)


def test_the_number_of_threads_changes_nothing():
    call = make_call((1031, 7, 100), F16)  # a prime number of tokens: uneven shares
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 5):
            torch.set_num_threads(count)
            results.append(bits(check(call).output))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(result, results[0]) for result in results)


# Sizes with every tail of both builds; seeds give the same operands in both processes.
BUILDS_SCRIPT = """
import hashlib, sys, torch
from support import BF16, E4M3, E5M2, F16, F32, F64, bits, make_call
import merge_attn_states
digest = hashlib.sha256()
for dtype in (F32, F16, BF16, F64, E4M3, E5M2):
    for head_size in (*range(1, 40), 64, 100, 128, 577):
        for output_dtype in (None, E4M3, E5M2):
            if output_dtype and dtype in (F64, E4M3, E5M2):
                continue
            call = make_call((16, 3, head_size), dtype, seed=head_size, count=14,
                             output_dtype=output_dtype, scale=0.37 if output_dtype else None)
            if dtype in (F16, BF16):  # every bit pattern: NaN of any kind, subnormal, infinite
                seeded = torch.Generator().manual_seed(head_size)
                call.prefix_output.view(torch.int16).random_(-(2**15), 2**15, generator=seeded)
            merge_attn_states.merge_attn_states(*call)
            digest.update(bits(call.output).numpy().tobytes())
            digest.update(bits(call.output_lse).numpy().tobytes())
print(merge_attn_states.build_info()["cpu"], digest.hexdigest())
"""


def test_both_cpu_builds_give_the_same_bits(child_environment):
    here = merge_attn_states.build_info()["cpu"]
    if here == "baseline":
        pytest.skip("this processor runs the baseline build only")

    def run(build):
        process = subprocess.run(
            [sys.executable, "-c", BUILDS_SCRIPT],
            env=child_environment | {"MERGE_ATTN_STATES_CPU_KERNEL": build},
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        return process.stdout.split()

    chosen, default = run(""), run("baseline")
    assert chosen[0] == here
    assert default[0] == "baseline"
    assert chosen[1] == default[1]


@pytest.mark.parametrize("dtype", [F32, F16, BF16])
def test_a_nan_of_all_ones_stays_one(dtype, device):
    call = make_call((16, 3, 128), dtype, device)
    call.suffix_lse.view(torch.int32)[0, 1] = 0x7FFFFFFF  # its upper half, rounded up, is -0
    merge_attn_states.merge_attn_states(*call)
    assert call.output[1, 0].isnan().all()
    assert call.output_lse[0, 1].isnan()


def test_an_unknown_cpu_build_is_refused(child_environment):
    script = """
import torch, merge_attn_states
rows, lse = torch.zeros(2, 2, 8), torch.zeros(2, 2)
try:
    merge_attn_states.merge_attn_states(rows, rows, lse, rows, lse)
except RuntimeError as error:
    print(error)
"""
    process = subprocess.run(
        [sys.executable, "-c", script],
        env=child_environment | {"MERGE_ATTN_STATES_CPU_KERNEL": "avx9"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert process.stdout.startswith("MERGE_ATTN_STATES_CPU_KERNEL: expected ")
    assert process.stdout.strip().endswith("baseline, got avx9")
