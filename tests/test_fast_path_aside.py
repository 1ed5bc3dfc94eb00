"""The operands that the eager fast path leaves to torch.ops."""

import pytest
import torch
from support import LSES, ROWS, assert_bits, check, needs_bounds, plain, refuses

from merge_attn_states import merge_attn_states as merge


class Subclass(torch.Tensor):
    pass


def freed(values: torch.Tensor, left: int = 0) -> torch.Tensor:
    values.untyped_storage().resize_(left)
    return values


RIGHT = {  # what becomes of an operand
    "a subclass": lambda x: x.as_subclass(Subclass),
    "a parameter": lambda x: torch.nn.Parameter(x, requires_grad=False),
    "the negative bit": lambda x: torch.complex(x, -x).conj().imag,
    "zeros without memory": lambda x: torch._efficientzerotensor(x.shape),
}


@pytest.mark.parametrize(("kind", "name"), [
    *((kind, "suffix_output") for kind in RIGHT),
    ("a subclass", "output"), ("a parameter", "output"),
])  # fmt: skip
def test_an_unusual_operand_passes_it_by(kind, name, taken):
    call = plain(empty=False)
    still = plain(empty=False)
    if "zeros" in kind:
        still.suffix_output.zero_()
    expected = check(still).output
    taken.clear()
    changed = call._replace(**{name: RIGHT[kind](getattr(call, name))})
    merge(*changed)
    assert_bits(changed.output.as_subclass(torch.Tensor).data, expected)
    assert taken == [False]


NO_MEMORY = (ValueError, "{name}: expected memory, got a null data pointer")
NO_KERNEL = (NotImplementedError, "Could not run 'merge_attn_states::merge_attn_states'")
NO_TENSOR = (TypeError, "{name}: expected a torch.Tensor, got ")
FUNCTIONAL = (RuntimeError, r"Found a custom \(non-ATen\) operator whose output has alias")
REFUSED = {  # what becomes of an operand, and what is said of it
    "a freed storage": (lambda x: freed(x.clone()), *NO_MEMORY),
    "a freed storage behind an offset": (lambda x: freed(torch.stack([x, x])[1]), *NO_MEMORY),
    "meta": (lambda x: x.to("meta"), ValueError, "(prefix|suffix)_output: expected device "),
    "sparse": (torch.Tensor.to_sparse, *NO_KERNEL),
    "mkldnn": (torch.Tensor.to_mkldnn, *NO_KERNEL),
    "nested": (lambda x: torch.nested.as_nested_tensor([*x]), *NO_KERNEL),
    "jagged": (
        lambda x: torch.nested.as_nested_tensor([*x], layout=torch.jagged),
        NotImplementedError,
        "merge_attn_states",
    ),
    "quantized": (lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8), *NO_KERNEL),
    "a functional wrapper": (torch._to_functional_tensor, *FUNCTIONAL),
    "a functional wrapper with an offset": (
        lambda x: torch._to_functional_tensor(torch.stack([x, x])[1]),
        *FUNCTIONAL,
    ),
    "a list": (torch.Tensor.tolist, *NO_TENSOR),
    "none": (lambda _: None, *NO_TENSOR),
}
REFUSED_OUTPUT = {
    "the negative bit": (
        RIGHT["the negative bit"],
        ValueError,
        "output: .*negative bit",
    ),
    "zeros without memory": (
        RIGHT["zeros without memory"],
        ValueError,
        "output: expected memory of its own",
    ),
}


@pytest.mark.filterwarnings("ignore:.*(nested|quantiz).*")
@pytest.mark.parametrize(("kind", "name"), [
    *((kind, name) for kind in REFUSED for name in ("output", "suffix_output")),
    *((kind, "output") for kind in REFUSED_OUTPUT),
])  # fmt: skip
def test_an_operand_without_plain_memory_is_refused(kind, name, taken):
    make, error, text = (REFUSED | REFUSED_OUTPUT)[kind]
    call = plain(empty=False)
    values = getattr(call, name)
    unusual = make(torch.zeros_like(values) if name == "output" else values)
    with refuses(error, "^" + text.format(name=name)):
        merge(*call._replace(**{name: unusual}))
    assert taken == [False]
    assert call.output.isnan().all()


@pytest.mark.parametrize("name", [*ROWS, *LSES])
def test_a_storage_that_is_too_small_is_seen(name, device, taken):
    """On a GPU too, where a write past it would change another tensor in silence."""
    needs_bounds(merge)
    call = plain(device, empty=False)
    small = freed(getattr(call, name).clone(), left=16)
    with refuses(ValueError, rf"^{name}: expected elements inside its memory of 16"):
        merge(*call._replace(**{name: small}))
    assert taken == [None]


@pytest.mark.parametrize("name", [*ROWS, *LSES])
def test_what_requires_grad_passes_it_by(name, taken):
    call = plain()
    getattr(call, name).requires_grad_()
    with pytest.raises(ValueError, match=rf"^{name}: .*grad"):
        merge(*call)
    assert taken == [False]


def test_what_was_computed_from_it_requires_grad_too(taken):
    call = plain()
    with pytest.raises(ValueError, match=r"^prefix_output: .*grad"):
        merge(*call._replace(prefix_output=call.prefix_output.requires_grad_() * 1))
    assert taken == [False]


class Two:
    def __index__(self):
        return 2


def test_a_count_with_an_index_passes_it_by(taken):
    check(plain(count=2), lambda *args: merge(*args[:6], Two()))
    assert taken == [False]


@pytest.mark.parametrize(
    ("count", "error"),
    [(True, TypeError), (2.0, TypeError), (torch.tensor(2), TypeError), (2**63, ValueError)],
    ids=repr,
)
def test_a_count_that_is_no_plain_int_passes_it_by(count, error, taken):
    call = plain(count=2)._replace(prefill_tokens_with_context=count)
    with pytest.raises(error, match=r"^prefill_tokens_with_context: expected "):
        merge(*call)
    assert taken == [False]
    assert call.output.isnan().all()
