"""Where there is no eager fast path, what of PyTorch it cannot be without, and who imports it."""

import inspect
import subprocess
import sys

import pytest
import torch
from support import F32, OLDER_THAN_2_14, make_call, run_command

from merge_attn_states import ops
from merge_attn_states._library import load_python_module

WITHOUT = """
from support import F32, make_call, check
from merge_attn_states import _info, ops
assert ops._fast is None
check(make_call((5, 3, 64), F32, count=2))
print(next(line for line in _info.lines() if line.startswith("eager fast path")))
"""
MISSING = {
    "_C": "import sys; sys.modules['merge_attn_states._C'] = None",
    "the wish for it": "import os; os.environ['MERGE_ATTN_STATES_FAST_PATH'] = '0'",
}


def python(code, environment) -> str:
    return run_command(sys.executable, "-c", code, **environment)


@pytest.mark.parametrize("missing", MISSING)
def test_without_it_every_call_goes_through_torch_ops(missing, child_environment):
    said = python(MISSING[missing] + WITHOUT, child_environment)
    assert said.startswith("eager fast path       no: ")
    assert said.endswith("; calls go through torch.ops\n")
    if missing == "the wish for it":
        assert "no: MERGE_ATTN_STATES_FAST_PATH=0;" in said


# What it asks of PyTorch: functions about the thread, and others. Before 2.14 a tensor is described
# by DLPack.
ASKED_OF_THE_THREAD = [
    "torch._C._len_torch_dispatch_stack",
    "torch._C._len_torch_function_stack",
    "torch._C._is_tracing",
    "torch._C._are_functorch_transforms_active",
    "torch.is_inference_mode_enabled",
    "torch.is_grad_enabled",
]
ASKED = [
    *ASKED_OF_THE_THREAD,
    "torch.autograd.forward_ad._current_level",
    "torch.is_neg",
    "torch._C._increment_version",
    *(["torch.Tensor.__dlpack_c_exchange_api__"] if OLDER_THAN_2_14 else []),
]
# Away only while it is looked for: PyTorch needs them too.
AWAY = """
import torch
kept = {name}
del {name}
import merge_attn_states._library
merge_attn_states._library.load_python_module()
{name} = kept
"""


@pytest.mark.parametrize("name", ASKED)
def test_a_pytorch_without_a_function_is_named(name, child_environment):
    if load_python_module()[0] is None:
        pytest.skip("_C is not built for this CPython")
    said = python(AWAY.format(name=name) + WITHOUT, child_environment)
    assert said == (
        f"eager fast path       no: this PyTorch has no {name}; calls go through torch.ops\n"
    )


FAILING = """
import torch
def fails(*args):
    raise RuntimeError("no answer")
kept = {name}
{name} = fails
import merge_attn_states._library
merge_attn_states._library.load_python_module()
{name} = kept
from support import F32, make_call
from merge_attn_states import ops
call = make_call((5, 3, 64), F32)
call.output.requires_grad_({name!r} == "torch.is_grad_enabled")
print(ops._fast(*call))
"""


@pytest.mark.parametrize("name", ASKED_OF_THE_THREAD)
def test_a_question_that_fails_hides_nothing(name, child_environment):
    if load_python_module()[0] is None:
        pytest.skip("_C is not built for this CPython")
    assert python(FAILING.format(name=name), child_environment) == "False\n"


@pytest.mark.parametrize("level", [None, "x", -1.0, 2**80, 0])
def test_a_level_of_dual_numbers_that_is_no_number_hides_nothing(level, taken, monkeypatch):
    call = make_call((5, 3, 64), F32)
    assert ops._fast(*call)
    monkeypatch.setattr(torch.autograd.forward_ad, "_current_level", level)
    assert not ops._fast(*call)


def test_a_newer_pytorch_has_it_too(child_environment):
    newer = "import torch; torch.__version__ = '2.99.0'" + WITHOUT.replace("is None", "is not None")
    if load_python_module()[0] is None:
        pytest.skip("_C is not built for this CPython")
    assert python(newer, child_environment) == (
        "eager fast path       yes, not tried on this PyTorch, which is newer than 2.15\n"
    )


def imported(x):
    from merge_attn_states import ops

    assert ops._fast is not None
    return x


IMPORTS = """
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
""" + inspect.getsource(imported)
WITH = ["torch.inference_mode()", "torch.no_grad()", "torch.device('meta')", "FakeTensorMode()"]
INSIDE = ["torch.vmap", "torch.func.grad", "torch.func.functionalize", "make_fx"]


@pytest.mark.parametrize(
    "use",
    [f"with {context}: imported(0)" for context in WITH]
    + [f"{transform}(lambda x: imported(x).sum())(torch.ones(2))" for transform in INSIDE],
)
def test_it_is_there_wherever_the_package_is_imported(use, child_environment):
    if load_python_module()[0] is None:
        pytest.skip("_C is not built for this CPython")
    subprocess.run([sys.executable, "-c", IMPORTS + use], env=child_environment, check=True)
