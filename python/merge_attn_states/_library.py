"""Loads the two binaries; where one cannot be loaded, says why in one sentence.

`libmerge_attn_states.so` registers the operators and is needed; `_C` (the Python module) is built
for one CPython and may be missing: everything but the fast path works without it.
"""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

OLDEST_TORCH = (2, 11)
NEWEST_TRIED_TORCH = (2, 15)
OP_LIBRARY = Path(__file__).with_name("libmerge_attn_states.so")

_NO_TORCH = (
    "merge_attn_states needs PyTorch 2.11 or newer, and this Python has none: install torch."
)


def _release(version: str) -> tuple[int, int]:
    """Return major and minor of a version of PyTorch; (0, 0) where it has none."""
    release = re.match(r"(\d+)\.(\d+)", version)
    return (int(release[1]), int(release[2])) if release else (0, 0)


def _check_torch_version(version: str) -> None:
    if _release(version) < OLDEST_TORCH:
        raise ImportError(
            f"merge_attn_states needs PyTorch 2.11 or newer, and this is {version}: upgrade torch."
        )


def _explain(error: str) -> str:
    """Say what to do about an error of the dynamic loader."""
    if glibc := re.search(r"version `GLIBC(?:XX)?_[\d.]+' not found", error):
        return f"this system's C or C++ library is too old ({glibc[0]}): build from source on it"
    if "undefined symbol" in error:
        return "it was built for another release of PyTorch: reinstall merge_attn_states"
    if "wrong ELF class" in error or "invalid ELF header" in error:
        return "it was built for another processor: build from source on this machine"
    return "reinstall merge_attn_states, or build it from source"


def load_op_library() -> None:
    """Register the operators.

    Raises
    ------
    ImportError
        PyTorch is missing or too old, or the library is missing or cannot be loaded; the message
        is one sentence that says what to do.
    """
    try:
        import torch
    except (ImportError, OSError) as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "torch":
            raise ImportError(_NO_TORCH) from error
        raise ImportError(f"merge_attn_states cannot import PyTorch: {error}") from error
    _check_torch_version(torch.__version__)
    if not OP_LIBRARY.is_file():
        raise ImportError(
            f"{OP_LIBRARY} is missing: the package was not built here; run "
            "`pip install --no-build-isolation .` in the source tree."
        )
    try:
        torch.ops.load_library(str(OP_LIBRARY))  # type: ignore[no-untyped-call]
    except OSError as error:
        said = str(error.__cause__ or error)  # PyTorch puts a sentence of its own in front
        raise ImportError(
            f"{OP_LIBRARY.name} cannot be loaded: {_explain(said)} ({said})."
        ) from error


def load_python_module() -> tuple[ModuleType | None, str]:
    """Return `_C`, or None and the reason why it is not there."""
    try:
        return importlib.import_module("merge_attn_states._C"), ""
    except ImportError as error:
        return None, str(error)


def fast_path(name: str = "merge_attn_states") -> tuple[Callable[..., bool] | None, str]:
    """Return the call that merges without PyTorch's dispatcher, and what is to be known of it.

    It takes the arguments of the function of that name (csrc/torch/eager_path.h) and returns
    whether it merged; where it did not, nothing happened and torch.ops has to do it. It is None
    where there is none, with the reason.
    """
    module, why = load_python_module()
    if module is None:
        return None, why
    why = module.why_no_fast_path()
    return (None, why) if why else (getattr(module, name), _why_untried())


def _why_untried() -> str:
    import torch

    if _release(torch.__version__) <= NEWEST_TRIED_TORCH:
        return ""
    newest = ".".join(map(str, NEWEST_TRIED_TORCH))
    return f"not tried on this PyTorch, which is newer than {newest}"


def build_info() -> dict[str, Any]:
    """Return what the op library was built from and with.

    Returns
    -------
    dict
        version, commit, torch, compiler, cuda (toolkit version or None), architectures (list of
        str) and cpu (the instruction set chosen on this machine).
    """
    import torch

    info: dict[str, Any] = json.loads(torch.ops.merge_attn_states.build_info())
    info["architectures"] = info["architectures"].split()
    return info
