"""What only merge_states as a Python function refuses: what is no tensor, list, number or name."""

import re

import pytest
import torch
from states_support import make_states
from support import E4M3, E5M2, F32, F64, blank

N, H, D, K = 4, 2, 8, 3
OPERANDS = ["outputs[0]", "outputs[2]", "lses[0]", "lses[1]", "index[1]", "empty[2]", "sink",
            "out", "out_lse", "out_scale"]  # fmt: skip
FLOATS_OF = "float32, float16, bfloat16 (or, with out_scale, an FP8 dtype)"


def states_of(device="cpu"):
    states = make_states((N, H), D, K, F32, device, empty=False)
    return states._replace(out=blank((N, H, D), F32, device), out_lse=blank((N, H), F32, device))


def parts(dtype, lse_dtype=F32):
    lses = [torch.zeros(N, H, dtype=lse_dtype)] * K
    return {"outputs": [torch.zeros(N, H, D, dtype=dtype)] * K, "lses": lses}


NO_TENSORS = [[[1.0]], "text", 1.0, torch.Size([1])]


@pytest.mark.parametrize("value", NO_TENSORS, ids=str)
@pytest.mark.parametrize("name", OPERANDS)
def test_what_is_no_tensor(name, value, device):
    states = states_of(device)._replace(index=[None] * K, empty=[None] * K)
    field, _, part = name.partition("[")
    if part:
        value = [value if k == int(part[:-1]) else x for k, x in enumerate(getattr(states, field))]
    with pytest.raises(TypeError, match=rf"^{re.escape(name)}: expected a torch\.Tensor"):
        states._replace(**{field: value}).run()
    for written in {"out": [states.out_lse], "out_lse": [states.out]}.get(name, states[8:10]):
        assert written.isnan().all()


@pytest.mark.parametrize("name", ["outputs", "lses"])
@pytest.mark.parametrize("value", [None, 1.0, "text", {1, 2}, iter([])], ids=repr)
def test_what_is_no_list(name, value):
    with pytest.raises(TypeError, match=rf"^{name}: expected a sequence of tensors, got "):
        states_of()._replace(**{name: value}).run()


def test_a_tensor_without_dim_and_a_dim_without_a_tensor():
    states = states_of()
    stacked = torch.stack(states.outputs)
    message = "expected a sequence of tensors, or one tensor with dim, got one without"
    with pytest.raises(TypeError, match=f"^outputs: {message}$"):
        states._replace(outputs=stacked).run()
    with pytest.raises(TypeError, match=f"^lses: {message}$"):
        states._replace(lses=stacked[..., 0]).run()
    with pytest.raises(TypeError, match=r"^outputs: expected one tensor with dim, got list$"):
        states._replace(dim=0).run()
    with pytest.raises(TypeError, match=r"^lses: expected one tensor with dim, got list$"):
        states._replace(outputs=stacked, dim=0).run()


@pytest.mark.parametrize(("name", "value"), [
    # As a count of the pair's: a flag is no dimension, and reading a tensor would synchronise.
    *(("dim", value) for value in (1.0, "0", True, torch.tensor(0), [0])),
    ("index", torch.zeros(N, dtype=torch.int64)), ("empty", torch.zeros(N, H, dtype=torch.bool)),
    ("lse_base", 2), ("lse_base", None), ("lse_base", [2, 2, 2]), ("out_lse_base", 2),
    ("out_lse_base", ["e"]), ("out_dtype", "float32"), ("out_dtype", 6),
], ids=repr)  # fmt: skip
def test_what_is_of_another_type(name, value):
    states = states_of()
    if name == "dim":
        states = states._replace(outputs=torch.stack(states.outputs), lses=torch.stack(states.lses))
    if name == "out_dtype":
        states = states._replace(out=None)
    with pytest.raises(TypeError, match=rf"^{name}: expected "):
        states._replace(**{name: value}).run()


@pytest.mark.parametrize("name", ["index", "empty"])
def test_an_empty_list_is_none_of_three(name):
    """The operator takes it for none; a caller of the function leaves it out."""
    message = rf"^{name}: expected a tensor or None for each of 3 parts, got 0$"
    with pytest.raises(ValueError, match=message):
        states_of()._replace(**{name: []}).run()


def test_a_base_is_one_letter():
    with pytest.raises(ValueError, match=r"^lse_base: expected "):
        states_of()._replace(lse_base=["e2", "", "e"], out_lse_base="e").run()


# The dtype of a new output, and what is given twice.
NEW = [
    ({"out_dtype": F64}, f"out_dtype: expected {FLOATS_OF} of float32 parts, got float64"),
    ({"out_dtype": torch.int32}, f"out_dtype: expected {FLOATS_OF} of float32 parts, got int32"),
    ({"out_dtype": F32, **parts(F64, F64)},
     "out_dtype: expected float64 of float64 parts, got float32"),
    ({"out_dtype": E5M2},
     "out_scale: expected one float32 for a float8_e5m2 result of float32 parts, got none"),
    ({"out_dtype": E5M2, **parts(E4M3)},
     "out_dtype: expected float8_e4m3fn, float32, float16 or bfloat16 of float8_e4m3fn parts, "
     "got float8_e5m2"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), NEW)
def test_a_dtype_that_no_output_may_have(changes, message, device):
    """The caller gave no `out`: what is wrong is the dtype that was asked for."""
    states = states_of(device)._replace(out=None, out_lse=None)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        to = {
            name: [x.to(device) for x in value] if isinstance(value, list) else value
            for name, value in changes.items()
        }
        states._replace(**to).run()


def test_what_is_given_twice(device):
    states = states_of(device)
    with pytest.raises(ValueError, match=r"^out_dtype: expected none beside out, got torch\."):
        states._replace(out_dtype=F32).run()
    message = r"^out_lse: expected none where return_lse is False, got a tensor"
    with pytest.raises(ValueError, match=message):
        states._replace(return_lse=False).run()
    assert states.out.isnan().all()
    assert states.out_lse.isnan().all()
