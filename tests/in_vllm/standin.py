"""A package in vLLM's place: its modules' names, and functions of 6, 7 or 8 parameters."""

from __future__ import annotations

import importlib
import logging
import sys
from pathlib import Path

import pytest
from support import BF16, F32, make_call

from merge_attn_states.integrations import vllm as plugin

NAMES = [
    "output",
    "prefix_output",
    "prefix_lse",
    "suffix_output",
    "suffix_lse",
    "output_lse",
    "prefill_tokens_with_context",
    "output_scale",
]
PATHS = ("vllm.v1.attention.ops", "vllm.attention.ops")
VERSION = "0.99.0"

CUSTOM_OPS = """
calls = []
def merge_attn_states({parameters}):
    calls.append(({names}))
    output.fill_(7)
    if output.shape[0] == 13:
        raise RuntimeError("vLLM's own refuses this too")
"""
DISPATCHER = """
calls = []
def merge_attn_states({parameters}):
    calls.append(({names}))
    from vllm._custom_ops import merge_attn_states
    return merge_attn_states({names})
"""
BACKEND = """
from {path}.merge_attn_states import merge_attn_states
from {path}.merge_attn_states import merge_attn_states as under_another_name
def by_position(*args):
    return merge_attn_states(*args)
def by_keyword(**kwargs):
    return merge_attn_states(**kwargs)
"""
DCP = """
calls = []
def cp_lse_ag_out_rs({parameters}):
    calls.append("cp_lse_ag_out_rs")
    return cp_attn_out
def cp_lse_ag_out_ar({parameters}):
    calls.append("cp_lse_ag_out_ar")
    return cp_attn_out
def dcp_a2a_lse_reduce({parameters}):
    calls.append("dcp_a2a_lse_reduce")
    return cp_attn_out
class DirectDCPA2AWorkspace:
    def __init__(self, group):
        self.group = group
    def lse_reduce({workspace}):
        calls.append("lse_reduce")
        return partial_output
"""
DCP_PARAMETERS = (
    "cp_attn_out, cp_attn_lse, cp_group, ctx=None, return_lse=False, is_lse_base_on_e=True"
)
WORKSPACE_PARAMETERS = (
    "self, partial_output, partial_lse, is_lse_base_on_e, seq_lens=None, query_start_loc=None"
)
PLATFORMS = """
class CpuPlatform:
    def is_cuda(self):
        return False
    def is_cpu(self):
        return True
current_platform = CpuPlatform()
"""


def parameters(count: int) -> str:
    """The first five are needed, the others None by default."""
    names = [*NAMES, "ninth"][:count]
    return ", ".join(name if i < 5 else f"{name}=None" for i, name in enumerate(names))


def write(
    folder: Path,
    count: int = 8,
    path: str = PATHS[0],
    signature: str = "",
    dcp: str = "",
    workspace: str = WORKSPACE_PARAMETERS,
) -> None:
    """Write the package `vllm` into a folder; `signature` in place of the usual one.

    `dcp`, `workspace`: the parameters of its merges across ranks, where it has any.
    """
    names = ", ".join([*NAMES, "ninth"][:count])
    made = {"parameters": parameters(count), "names": names, "path": path}
    ops = folder / path.replace(".", "/")
    ops.mkdir(parents=True)
    for package in [ops, *ops.parents][: len(path.split("."))]:
        package.joinpath("__init__.py").touch()
    root = folder / "vllm"
    root.joinpath("__init__.py").write_text(f"__version__ = {VERSION!r}\n")
    root.joinpath("_custom_ops.py").write_text(CUSTOM_OPS.format(**made))
    root.joinpath("platforms.py").write_text(PLATFORMS)
    if signature:
        parts = [part for part in signature.split(", ") if part != "*"]
        names = ", ".join(part.partition("=")[0] for part in parts)
        made |= {"parameters": signature, "names": names}
    ops.joinpath("merge_attn_states.py").write_text(DISPATCHER.format(**made))
    if dcp:
        ops.joinpath("dcp.py").write_text(DCP.format(parameters=dcp, workspace=workspace))
    for name in ("early", "late"):
        root.joinpath(f"{name}_backend.py").write_text(BACKEND.format(**made))


class StandIn:
    """The modules of a package that a test has written."""

    def __init__(self, path):
        self.path = path

    def __getattr__(self, name):
        return importlib.import_module(f"vllm.{name}")

    @property
    def dispatcher(self):
        return importlib.import_module(f"{self.path}.merge_attn_states")

    @property
    def dcp(self):
        return importlib.import_module(f"{self.path}.dcp")

    @property
    def calls(self):
        """Of vLLM's own functions, however often they were replaced."""
        return len(self.dispatcher.calls), len(self._custom_ops.calls)


@pytest.fixture
def vllm(tmp_path, monkeypatch):
    """Write the package and hide a real one; neither stays. Merges across ranks are on."""

    def is_vllm(name):
        return name == "vllm" or name.startswith("vllm.")

    hidden = {name: module for name, module in sys.modules.items() if is_vllm(name)}
    for name in hidden:
        del sys.modules[name]
    monkeypatch.delenv("MERGE_ATTN_STATES_VLLM", raising=False)
    monkeypatch.delenv("MERGE_ATTN_STATES_VLLM_DCP", raising=False)
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    monkeypatch.setattr(plugin, "_version", lambda: VERSION)
    monkeypatch.setattr(plugin, "_cannot_run", "")

    def make(count=8, path=PATHS[0], **options):
        write(tmp_path, count, path, **options)
        monkeypatch.syspath_prepend(tmp_path)
        return StandIn(path)

    yield make
    plugin.restore()
    for name in [name for name in sys.modules if is_vllm(name)]:
        del sys.modules[name]
    sys.modules.update(hidden)
    importlib.invalidate_caches()


@pytest.fixture
def log(caplog):
    caplog.set_level(logging.INFO, "vllm.merge_attn_states")

    def texts(level):
        return [record.message for record in caplog.records if record.levelno == level]

    return texts


def refused(tokens=5, count=8):
    """Operands that this package refuses and vLLM's own function may take."""
    operands = make_call((tokens, 3, 64), F32)
    return operands._replace(prefix_lse=operands.prefix_lse.to(BF16))[:count]
