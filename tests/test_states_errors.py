"""Every refused call of many parts with its message: nothing is written, whatever the way in."""

import pytest
import torch
from states_support import States, make_states, operator_args
from support import BF16, E4M3, E5M2, F16, F32, F64, OPERATOR_ERROR, assert_bits, blank

from merge_attn_states import merge_states

OPS = torch.ops.merge_attn_states
N, H, D, K = 4, 2, 8, 3
TABLE = "float32, float16, bfloat16, float64, float8_e4m3fn or float8_e5m2"
FLOATS_OF = "float32, float16, bfloat16 (or, with out_scale, an FP8 dtype)"


def zeros(*shape, dtype=F32):
    return torch.zeros(shape, dtype=dtype)


def among(name, position, value):
    """One of the list that a right call has, replaced."""
    return lambda states: {
        name: [value if k == position else x for k, x in enumerate(getattr(states, name))]
    }


def masks(value, position=1):
    return {"empty": [value if k == position else None for k in range(K)]}


def indices(*values):
    return {"index": list(values)}


def parts(dtype, lse_dtype=F32):
    return {
        "outputs": [zeros(N, H, D, dtype=dtype)] * K,
        "lses": [zeros(N, H, dtype=lse_dtype)] * K,
    }


ROWS = torch.arange(N)
# (what is changed in a right call of 3 parts [4, 2, 8], the message)
REFUSED = [
    # The lists.
    ({"outputs": [], "lses": []}, "outputs: expected one part or more, got 0"),
    ({"lses": [zeros(N, H)] * 2}, "lses: expected 3 tensors, as many as outputs, got 2"),
    ({"lses": []}, "lses: expected 3 tensors, as many as outputs, got 0"),
    ({"index": [None]}, "index: expected a tensor or None for each of 3 parts, got 1"),
    ({"empty": [None] * 4}, "empty: expected a tensor or None for each of 3 parts, got 4"),
    # Shapes. The first output is what the others are held against; nothing is broadcast.
    ({"outputs": [zeros(D)] * K},
     "outputs[0]: expected 2 to 5 dimensions [*rows, head_size], got shape [8]"),
    ({"outputs": [zeros()] * K},
     "outputs[0]: expected 2 to 5 dimensions [*rows, head_size], got shape []"),
    ({"outputs": [zeros(1, 1, 1, N, H, D)] * K},
     "outputs[0]: expected 2 to 5 dimensions [*rows, head_size], got shape [1, 1, 1, 4, 2, 8]"),
    (among("outputs", 1, zeros(N + 1, H, D)),
     "outputs[1]: expected shape [4, 2, 8] = outputs[0].shape, got [5, 2, 8]"),
    (among("outputs", 2, zeros(N, 1, D)),
     "outputs[2]: expected shape [4, 2, 8] = outputs[0].shape, got [4, 1, 8]"),
    (among("outputs", 2, zeros(N * H, D)),
     "outputs[2]: expected shape [4, 2, 8] = outputs[0].shape, got [8, 8]"),
    (among("outputs", 0, zeros(N, H, D + 1)),
     "outputs[1]: expected shape [4, 2, 9] = outputs[0].shape, got [4, 2, 8]"),
    (among("lses", 0, zeros(H, N)),
     "lses[0]: expected shape [4, 2] = outputs[0].shape[:-1], got [2, 4]"),
    (among("lses", 2, zeros(N, H, 2)),
     "lses[2]: expected shape [4, 2] = outputs[2].shape[:-1], got [4, 2, 2]"),
    (among("lses", 2, zeros(N, H, 1, 1)),
     "lses[2]: expected shape [4, 2] = outputs[2].shape[:-1], got [4, 2, 1, 1]"),
    (among("lses", 1, zeros(1, N, H)),
     "lses[1]: expected shape [4, 2] = outputs[1].shape[:-1], got [1, 4, 2]"),
    ({"out": zeros(N, H, D + 1)},
     "out: expected shape [4, 2, 8] = outputs[0].shape, got [4, 2, 9]"),
    ({"out": zeros(N, H, D, 1)},
     "out: expected shape [4, 2, 8] = outputs[0].shape, got [4, 2, 8, 1]"),
    ({"out_lse": zeros(H, N)}, "out_lse: expected shape [4, 2] = out.shape[:-1], got [2, 4]"),
    ({"out_lse": zeros(N, H, 2)}, "out_lse: expected shape [4, 2] = out.shape[:-1], got [4, 2, 2]"),
    ({"sink": zeros(N)}, "sink: expected shape [2] = the last row dimension, got [4]"),
    ({"sink": zeros(H, 1)}, "sink: expected shape [2] = the last row dimension, got [2, 1]"),
    ({"sink": zeros()}, "sink: expected shape [2] = the last row dimension, got []"),
    (masks(zeros(H, N, dtype=torch.bool)),
     "empty[1]: expected shape [4, 2] = outputs[1].shape[:-1], got [2, 4]"),
    (masks(zeros(N, dtype=torch.bool), 0),
     "empty[0]: expected shape [4, 2] = outputs[0].shape[:-1], got [4]"),
    # An index.
    (indices(None, zeros(N, 1, dtype=torch.int64), None),
     "index[1]: expected one dimension, got shape [4, 1]"),
    (indices(None, ROWS[:3], None),
     "index[1]: expected shape [4] = the rows of outputs[0].shape, got [3]"),
    (indices(ROWS[:3], ROWS[:2], ROWS[:3]),
     "index[1]: expected shape [3] = the rows of index[0].shape + outputs[0].shape[1:], got [2]"),
    (indices(ROWS[:3], None, ROWS[:3]),
     "outputs[1]: expected shape [3, 2, 8] = index[0].shape + outputs[0].shape[1:], got [4, 2, 8]"),
    (lambda states: among("outputs", 2, zeros(9, 1, D))(states) | indices(None, None, ROWS),
     "outputs[2]: expected shape [9, 2, 8] = any number of rows like those of outputs[0], "
     "got [9, 1, 8]"),
    ({"outputs": [zeros(N, D)] * K, "lses": [zeros(N)] * K, **indices(None, ROWS, None)},
     "index[1]: expected none for outputs of 2 dimensions, since an index counts along the first "
     "of [num_tokens, num_heads, head_size], got a tensor"),
    # Dtypes.
    (parts(torch.int32), f"outputs[0]: expected {TABLE}, got int32"),
    (among("outputs", 2, zeros(N, H, D, dtype=torch.complex64)),
     f"outputs[2]: expected {TABLE}, got complex64"),
    (among("outputs", 1, zeros(N, H, D, dtype=F64)),
     "outputs[1]: expected float32, float16 or bfloat16, since outputs[0] is float32, got float64"),
    (among("outputs", 1, zeros(N, H, D, dtype=E5M2)),
     "outputs[1]: expected float32, float16 or bfloat16, since outputs[0] is float32, "
     "got float8_e5m2"),
    (among("outputs", 0, zeros(N, H, D, dtype=F64)),
     "outputs[1]: expected float64, the dtype of outputs[0], got float32"),
    (lambda _: among("outputs", 2, zeros(N, H, D, dtype=E5M2))(States(**parts(E4M3))),
     "outputs[2]: expected float8_e4m3fn, the dtype of outputs[0], got float8_e5m2"),
    (among("lses", 1, zeros(N, H, dtype=F64)),
     "lses[1]: expected float32, the dtype of every LSE, got float64"),
    (among("lses", 2, zeros(N, H, dtype=BF16)),
     "lses[2]: expected float32, the dtype of every LSE, got bfloat16"),
    ({"out": zeros(N, H, D, dtype=F64), **parts(F64)},
     "lses[0]: expected float64, the dtype of an LSE of float64 outputs, got float32"),
    ({"out_lse": zeros(N, H, dtype=F16)},
     "out_lse: expected float32, the dtype of every LSE, got float16"),
    ({"out": zeros(N, H, D, dtype=F64)},
     f"out: expected {FLOATS_OF} of float32 parts, got float64"),
    ({"out": zeros(N, H, D, dtype=torch.int32)},
     f"out: expected {FLOATS_OF} of float32 parts, got int32"),
    ({"out": zeros(N, H, D, dtype=F32), **parts(F64, F64)},
     "out: expected float64 of float64 parts, got float32"),
    ({"out": zeros(N, H, D, dtype=E5M2), **parts(E4M3)},
     "out: expected float8_e4m3fn, float32, float16 or bfloat16 of float8_e4m3fn parts, "
     "got float8_e5m2"),
    (masks(zeros(N, H, dtype=torch.uint8)), "empty[1]: expected bool, got uint8"),
    (indices(None, None, ROWS.to(torch.int16)), "index[2]: expected int32 or int64, got int16"),
    (indices(None, None, ROWS.to(F32)), "index[2]: expected int32 or int64, got float32"),
    (indices(None, None, ROWS > 1), "index[2]: expected int32 or int64, got bool"),
    ({"sink": zeros(H, dtype=F64)}, "sink: expected float32, float16 or bfloat16, got float64"),
    ({"sink": zeros(H, dtype=E4M3)},
     "sink: expected float32, float16 or bfloat16, got float8_e4m3fn"),
    ({"sink": zeros(H, dtype=torch.int64)},
     "sink: expected float32, float16 or bfloat16, got int64"),
    ({"sink": zeros(H), "out_lse": zeros(N, H, dtype=F64),
      "out": zeros(N, H, D, dtype=F64), **parts(F64, F64)},
     "sink: expected float64, the dtype of a sink of float64 outputs, got float32"),
    # A scale.
    ({"out": zeros(N, H, D, dtype=E4M3)},
     "out_scale: expected one float32 for a float8_e4m3fn result of float32 parts, got none"),
    ({"out_scale": zeros()},
     "out_scale: expected none for a float32 result, since only an FP8 one is scaled, "
     "got a tensor"),
    ({"out": zeros(N, H, D, dtype=BF16), "out_scale": zeros(), **parts(E4M3)},
     "out_scale: expected none for a bfloat16 result, since only an FP8 one is scaled, "
     "got a tensor"),
    ({"out": zeros(N, H, D, dtype=E4M3), "out_scale": zeros(H)},
     "out_scale: expected one element, got shape [2]"),
    ({"out": zeros(N, H, D, dtype=E4M3), "out_scale": zeros(dtype=F64)},
     "out_scale: expected float32, the dtype of a scale, got float64"),
    # Bases.
    ({"lse_base": "10"}, 'lse_base: expected "e" or "2", or one of them for each of 3 parts, '
     'got "10"'),
    ({"lse_base": "E"}, 'lse_base: expected the base "e" or "2", got "E"'),
    ({"lse_base": ["e", "e", "3"]}, 'lse_base: expected the base "e" or "2", got "ee3"'),
    ({"lse_base": ["e", "2"]},
     'lse_base: expected "e" or "2", or one of them for each of 3 parts, got "e2"'),
    ({"lse_base": ""}, 'lse_base: expected "e" or "2", or one of them for each of 3 parts, got ""'),
    ({"lse_base": ["e", "2", "e"]},
     'out_lse_base: expected "e" or "2" where the bases of the parts differ, got none'),
    ({"out_lse_base": "10"}, 'out_lse_base: expected the base "e" or "2", got "10"'),
    ({"out_lse_base": ""}, 'out_lse_base: expected the base "e" or "2", got ""'),
]  # fmt: skip


def moved(value, device):
    if isinstance(value, list):
        return [moved(each, device) for each in value]
    return value.to(device) if isinstance(value, torch.Tensor) else value


def refused_call(changes, device) -> States:
    states = make_states((N, H), D, K, F32, device, empty=False)
    states = states._replace(out=blank((N, H, D), F32, device), out_lse=blank((N, H), F32, device))
    changes = changes(states) if callable(changes) else changes
    return states._replace(**{name: moved(value, device) for name, value in changes.items()})


def by_the_operator(states: States):
    """Everything as the bare operator has it: in place where there is an output, else new."""
    parts = operator_args(states)
    if states.out is not None:
        return OPS.merge_states_out(states.out, states.out_lse, *parts, states.out_scale)
    return OPS.merge_states(*parts, states.out_dtype, states.out_scale, states.return_lse)


WAYS = {"python": (States.run, ValueError), "torch.ops": (by_the_operator, OPERATOR_ERROR)}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_refused(changes, message, way, device):
    run, kind = WAYS[way]
    states = refused_call(changes, device)
    before = [tensor.clone() for tensor in (states.out, states.out_lse)]
    with pytest.raises(kind) as error:
        run(states)
    assert str(error.value) == message
    for tensor, old in zip((states.out, states.out_lse), before, strict=True):
        assert_bits(tensor, old)


OF_NEW_RESULTS = [
    (changes, message)
    for changes, message in REFUSED[1:]
    if callable(changes) or not {"out", "out_lse"} & changes.keys()
]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("changes", "message"), OF_NEW_RESULTS)
def test_refused_where_the_results_are_new(changes, message, way, device):
    run, kind = WAYS[way]
    with pytest.raises(kind) as error:
        run(refused_call(changes, device)._replace(out=None, out_lse=None))
    assert str(error.value) == message


def test_no_part_at_all():
    """PyTorch itself finds no kernel for a call without a tensor."""
    for outputs in ([], ()):
        with pytest.raises(ValueError, match=r"^outputs: expected one part or more, got 0$"):
            merge_states(outputs, [])


def test_bad_input_is_refused_without_rows_too(device):
    empty = torch.empty(0, H, D, device=device)
    with pytest.raises(ValueError, match=r"^lses\[1\]: expected shape \[0, 2\] = outputs\[1\]"):
        merge_states([empty] * 2, [empty[..., 0], empty[..., 0].T])


def test_as_many_tokens_as_heads_are_not_mistaken(device):
    """[H, N] given for [N, H] is silent where N == H: what is given is what is read."""
    states = make_states((H, H), D, K, F32, device, empty=False)
    straight, _ = states.run()
    turned, _ = states._replace(lses=[lse.T.contiguous() for lse in states.lses]).run()
    assert not torch.allclose(straight, turned)
    turned, _ = states._replace(lses=[lse.T.contiguous().T for lse in states.lses]).run()
    assert_bits(turned, straight)
