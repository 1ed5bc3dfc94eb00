"""A package in vLLM's place: its modules' names, and functions of 6, 7 or 8 parameters."""

from __future__ import annotations

from pathlib import Path

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


def parameters(count: int) -> str:
    """The first five are needed, the others None by default."""
    names = [*NAMES, "ninth"][:count]
    return ", ".join(name if i < 5 else f"{name}=None" for i, name in enumerate(names))


def write(folder: Path, count: int = 8, path: str = PATHS[0], signature: str = "") -> None:
    """Write the package `vllm` into a folder; `signature` in place of the usual one."""
    names = ", ".join([*NAMES, "ninth"][:count])
    made = {"parameters": parameters(count), "names": names, "path": path}
    ops = folder / path.replace(".", "/")
    ops.mkdir(parents=True)
    for package in [ops, *ops.parents][: len(path.split("."))]:
        package.joinpath("__init__.py").touch()
    root = folder / "vllm"
    root.joinpath("__init__.py").write_text(f"__version__ = {VERSION!r}\n")
    root.joinpath("_custom_ops.py").write_text(CUSTOM_OPS.format(**made))
    if signature:
        names = ", ".join(part.partition("=")[0] for part in signature.split(", "))
        made |= {"parameters": signature, "names": names}
    ops.joinpath("merge_attn_states.py").write_text(DISPATCHER.format(**made))
    for name in ("early", "late"):
        root.joinpath(f"{name}_backend.py").write_text(BACKEND.format(**made))
