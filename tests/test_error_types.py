"""Which exception a refusal is: one on every PyTorch for the Python function, eager."""

import re
import sys
import threading

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


def test_another_thread_that_compiles_changes_nothing():
    """PyTorch's is_compiling() is true in every thread meanwhile."""
    inside, go_on = threading.Event(), threading.Event()

    def backend(module, _):
        inside.set()
        go_on.wait(60)
        return module

    call = make_call((N, H, D), F32, "cpu", empty=False)
    # Legal, and of a type that goes through the operator.
    by_operator = torch.nn.Parameter(call.suffix_output.clone(), requires_grad=False)
    call = call._replace(suffix_output=by_operator)
    compiled = torch.compile(lambda x: x + 1, backend=backend)
    thread = threading.Thread(target=compiled, args=(torch.ones(3),))
    thread.start()
    try:
        assert inside.wait(60)
        for count in (99, 2**70):
            refused = call._replace(prefill_tokens_with_context=count)
            with pytest.raises(ValueError, match=r"^prefill_tokens_with_context: expected a count"):
                merge_attn_states(*refused)
        with torch.inference_mode():
            output = torch.empty_like(call.output)
        merge_attn_states(*call._replace(output=output))
        assert not output.isnan().any()
    finally:
        go_on.set()
        thread.join()
