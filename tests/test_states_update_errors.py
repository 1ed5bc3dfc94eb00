"""Every refused update of a running state with its message: the state is what it was."""

import re

import pytest
import torch
from support import BF16, E4M3, E5M2, F16, F32, F64, OPERATOR_ERROR, assert_bits
from update_support import copies, state_and_block

from merge_attn_states import update_state

OP = torch.ops.merge_attn_states.update_state
N, H, D = 4, 2, 8
TABLE = "float32, float16, bfloat16, float64, float8_e4m3fn or float8_e5m2"
NAMES = ("out", "lse", "block_out", "block_lse")


def zeros(*shape, dtype=F32):
    return torch.zeros(shape, dtype=dtype)


ROWS = torch.arange(N)
# (what is changed in a right call of 4 tokens, 2 heads and 8 elements, the message)
REFUSED = [
    # Shapes. The block is what the state is held against.
    ({"block_out": zeros(D)},
     "block_out: expected 2 to 5 dimensions [*rows, head_size], got shape [8]"),
    ({"block_out": zeros(1, 1, 1, N, H, D)},
     "block_out: expected 2 to 5 dimensions [*rows, head_size], got shape [1, 1, 1, 4, 2, 8]"),
    ({"block_out": zeros(N - 1, H, D)},
     "out: expected shape [3, 2, 8] = block_out.shape, got [4, 2, 8]"),
    ({"out": zeros(N, 1, D)}, "out: expected shape [4, 2, 8] = block_out.shape, got [4, 1, 8]"),
    ({"out": zeros(N, H, D, 1)},
     "out: expected shape [4, 2, 8] = block_out.shape, got [4, 2, 8, 1]"),
    ({"lse": zeros(H, N)}, "lse: expected shape [4, 2] = out.shape[:-1], got [2, 4]"),
    ({"lse": zeros(N, H, 2)}, "lse: expected shape [4, 2] = out.shape[:-1], got [4, 2, 2]"),
    ({"block_lse": zeros(H, N)},
     "block_lse: expected shape [4, 2] = block_out.shape[:-1], got [2, 4]"),
    ({"block_lse": zeros(N, H, 1, 1)},
     "block_lse: expected shape [4, 2] = block_out.shape[:-1], got [4, 2, 1, 1]"),
    ({"empty": zeros(H, N) == 1},
     "empty: expected shape [4, 2] = block_out.shape[:-1], got [2, 4]"),
    # An index. The state has any number of rows then.
    ({"index": ROWS[:3]}, "index: expected shape [4] = the rows of block_out.shape, got [3]"),
    ({"index": ROWS[:, None]}, "index: expected one dimension, got shape [4, 1]"),
    ({"index": ROWS, "out": zeros(9, H, D + 1)},
     "out: expected shape [9, 2, 8] = any number of rows like those of block_out, got [9, 2, 9]"),
    ({"index": ROWS, "out": zeros(9, H, D)},
     "lse: expected shape [9, 2] = out.shape[:-1], got [4, 2]"),
    ({"index": ROWS, "out": zeros(N, D), "lse": zeros(N), "block_out": zeros(N, D),
      "block_lse": zeros(N)},
     "index: expected none for outputs of 2 dimensions, since an index counts along the first of "
     "[num_tokens, num_heads, head_size], got a tensor"),
    ({"index": ROWS.to(F32)}, "index: expected int32 or int64, got float32"),
    ({"index": ROWS.to(torch.uint8)}, "index: expected int32 or int64, got uint8"),
    # Dtypes.
    ({"out": zeros(N, H, D, dtype=torch.int32)}, f"out: expected {TABLE}, got int32"),
    ({"block_out": zeros(N, H, D, dtype=torch.bool)}, f"block_out: expected {TABLE}, got bool"),
    ({"block_out": zeros(N, H, D, dtype=F64)},
     "block_out: expected float32, float16 or bfloat16, since out is float32, got float64"),
    ({"block_out": zeros(N, H, D, dtype=E5M2)},
     "block_out: expected float32, float16 or bfloat16, since out is float32, got float8_e5m2"),
    ({"out": zeros(N, H, D, dtype=F64)},
     "block_out: expected float64, the dtype of out, got float32"),
    ({"out": zeros(N, H, D, dtype=E4M3), "block_out": zeros(N, H, D, dtype=E5M2)},
     "block_out: expected float8_e4m3fn, the dtype of out, got float8_e5m2"),
    # A state that is refused here would be updated in a temporary.
    ({"lse": zeros(N, H, dtype=BF16)}, "lse: expected float32, the dtype of every LSE, "
     "got bfloat16"),
    ({"lse": zeros(N, H, dtype=F64)}, "lse: expected float32, the dtype of every LSE, got float64"),
    ({"lse": zeros(N, H, dtype=F16), "block_lse": zeros(N, H, dtype=F16)},
     "lse: expected float32, the dtype of every LSE, got float16"),
    ({"block_lse": zeros(N, H, dtype=F16)},
     "block_lse: expected float32, the dtype of every LSE, got float16"),
    ({"out": zeros(N, H, D, dtype=F64), "block_out": zeros(N, H, D, dtype=F64)},
     "lse: expected float64, the dtype of an LSE of float64 outputs, got float32"),
    ({"empty": zeros(N, H)}, "empty: expected bool, got float32"),
    # Bases.
    ({"lse_base": "10"}, 'lse_base: expected the base "e" or "2", got "10"'),
    ({"lse_base": ""}, 'lse_base: expected the base "e" or "2", got ""'),
    ({"lse_base": "E"}, 'lse_base: expected the base "e" or "2", got "E"'),
]  # fmt: skip


def legal_call(device) -> dict:
    state, block = state_and_block((N, H), D, (F32, F32), device, empty=False)
    return dict(zip(NAMES, (*state, *block), strict=True))


@pytest.mark.parametrize("way", ["python", "torch.ops"])
@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_refused(changes, message, way, device):
    changes = {k: x.to(device) if torch.is_tensor(x) else x for k, x in changes.items()}
    call = legal_call(device) | changes
    operands = [call.pop(name) for name in NAMES]
    before = copies(operands)
    run, kind = {"python": (update_state, ValueError), "torch.ops": (OP, OPERATOR_ERROR)}[way]
    with pytest.raises(kind, match=f"^{re.escape(message)}$"):
        run(*operands, **call)
    for now, old in zip(operands, before, strict=True):
        assert_bits(now, old)


@pytest.mark.parametrize("name", [*NAMES, "index", "empty"])
@pytest.mark.parametrize("value", [[[1.0]], "text", 1.0, torch.Size([1])], ids=str)
def test_what_is_no_tensor(name, value, device):
    call = legal_call(device)
    before = copies((call["out"], call["lse"]))
    with pytest.raises(TypeError, match=rf"^{name}: expected a torch\.Tensor"):
        update_state(**call | {name: value})
    assert_bits(call["out"], before[0])
    assert_bits(call["lse"], before[1])


@pytest.mark.parametrize("name", NAMES)
def test_a_required_tensor_left_out(name, device):
    call = legal_call(device) | {name: None}
    with pytest.raises(TypeError, match=rf"^{name}: expected a torch\.Tensor, got NoneType$"):
        update_state(**call)
    with pytest.raises(OPERATOR_ERROR, match=rf"^{name}: expected a tensor, got none$"):
        OP(*call.values())  # an undefined tensor


@pytest.mark.parametrize("value", [2, None, ["e", 2]], ids=repr)
def test_a_base_that_is_no_text(value):
    with pytest.raises(TypeError, match=r"^lse_base: expected "):
        update_state(**legal_call("cpu"), lse_base=value)


@pytest.mark.parametrize("name", [*NAMES, "index", "empty"])
def test_a_meta_operand_among_real_ones(name, device):
    call = legal_call(device)
    call |= {"index": ROWS.to(device), "empty": torch.zeros(N, H, dtype=torch.bool, device=device)}
    here = call["out"].device
    before = copies(call.values())
    named, due, got = (r"\w+", "meta", here) if name == "out" else (name, here, "meta")
    message = rf"^{named}: expected device {due}(, the device of \w+)?, got {got}$"
    with pytest.raises(ValueError, match=message):
        update_state(**call | {name: call[name].to("meta")})
    for now, old in zip(call.values(), before, strict=True):
        assert torch.equal(now, old)


@pytest.mark.parametrize("name", [*NAMES, "index", "empty"])
def test_a_cpu_operand_among_cuda_ones(name, cuda):
    call = legal_call(cuda)
    call |= {"index": ROWS.to(cuda), "empty": torch.zeros(N, H, dtype=torch.bool, device=cuda)}
    message = f"^{name}: expected device cuda:0, the device of out, got cpu$"
    if name == "out":
        message = "^lse: expected device cpu, the device of out, got cuda:0$"
    with pytest.raises(ValueError, match=message):
        update_state(**call | {name: call[name].cpu()})
