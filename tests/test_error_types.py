"""Which exception a refusal is: one on every PyTorch for the Python function, eager."""

import re
import sys

import pytest
import torch
from support import F32, OPERATOR_ERROR, make_call, refusal_of, run_command

from merge_attn_states import merge_attn_states

N, H, D = 4, 2, 64
LSE_AXES = "[num_heads, num_tokens]"


UNAVAILABLE = """
from support import plain, without_fast_path
import merge_attn_states
for way in (merge_attn_states.merge_attn_states, merge_attn_states.selected_kernel,
            without_fast_path):
    try:
        way(*plain())
    except merge_attn_states.UnavailableError as error:
        print(error)
"""


def test_what_this_machine_lacks_has_a_type_of_its_own(child_environment):
    said = run_command(
        sys.executable,
        "-c",
        UNAVAILABLE,
        **child_environment,
        MERGE_ATTN_STATES_CPU_KERNEL="none such",
    ).splitlines()
    assert len(said) == 3
    assert len(set(said)) == 1
    assert said[0].startswith("MERGE_ATTN_STATES_CPU_KERNEL: expected ")


@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad])
def test_a_refusal_keeps_its_text_everywhere(context, way):
    call = make_call((N, H, D), F32, "cpu", empty=False)
    message = rf"prefix_lse: expected shape \[2, 4\] = {re.escape(LSE_AXES)}, got \[4, 2\]"
    compiled = way.backend is not None
    with (
        context(),
        pytest.raises(OPERATOR_ERROR if compiled else refusal_of(way.merge), match=message),
    ):
        way.run(lambda *args: way.merge(*args))(*call._replace(prefix_lse=call.prefix_lse.T)[:6])
    assert call.output.isnan().all()


class Forbidden(torch.Tensor):
    """Of a library that says no to the merge and does not know what else this package asks."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if "merge_attn_states.merge_attn_states" in str(function):
            raise RuntimeError("merges are forbidden here")
        return NotImplemented


def test_an_error_of_somebody_else_is_kept():
    call = make_call((N, H, D), F32, "cpu")
    operands = call._replace(prefix_output=call.prefix_output.as_subclass(Forbidden))
    with pytest.raises(RuntimeError, match=r"^merges are forbidden here$"):
        merge_attn_states(*operands)
