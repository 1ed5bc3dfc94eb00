"""What `python -m merge_attn_states info` prints: versions and devices, then what works here.

Where something does not work, its line says why.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
from collections.abc import Iterator

import torch

from ._library import build_info, fast_path

_VLLM_PLUGIN = "merge_attn_states"  # the entry point's name


def lines() -> Iterator[str]:
    """Yield the report, a line each."""
    build = build_info()
    cuda_kernels = f"CUDA {build['cuda']}" if build["cuda"] else "none"
    yield f"merge_attn_states {build['version']}, commit {build['commit']}"
    yield _line("built with", f"PyTorch {build['torch']}, {build['compiler']}, {cuda_kernels}")
    yield _line("GPU code for", " ".join(build["architectures"]) or "none")
    yield _line("PyTorch here", torch.__version__ + _torch_kind())
    for index in range(_device_count()):
        yield _line(f"cuda:{index}", _describe_gpu(index))
    yield ""
    yield from _paths(build["cuda"], build["architectures"], build["cpu"])


def _line(name: str, state: str) -> str:
    return f"{name:22}{state}"


def _torch_kind() -> str:
    if torch.version.hip:
        return f", ROCm {torch.version.hip}"
    return f", CUDA {torch.version.cuda}" if torch.version.cuda else ", CPU only"


def _device_count() -> int:
    return torch.cuda.device_count() if torch.version.cuda else 0


def _describe_gpu(index: int) -> str:
    properties = torch.cuda.get_device_properties(index)
    memory = properties.total_memory / 2**30
    return f"{properties.name}, {properties.major}.{properties.minor}, {memory:.0f} GiB"


def _paths(cuda: str | None, architectures: list[str], cpu: str) -> Iterator[str]:
    yield _line("cpu kernel", f"no: {cpu}" if cpu.startswith("none") else f"yes, {cpu}")
    no_cuda = _why_no_cuda(cuda, architectures)
    yield _line("cuda kernels", no_cuda or "yes")
    yield _line("eager fast path", _fast_path())
    yield _line("transformers", _transformers())
    yield _line("vllm", _why_not_in_vllm() or (no_cuda if _device_count() else "") or _in_vllm())


def _fast_path() -> str:
    path, remark = fast_path()
    if path is None:
        return f"no: {remark}; calls go through torch.ops"
    return f"yes, {remark}" if remark else "yes"


def _transformers() -> str:
    if importlib.util.find_spec("transformers") is None:
        return "no: pip install 'merge-attn-states[transformers]' brings it"
    try:
        importlib.import_module("merge_attn_states.integrations.transformers")
    except Exception as error:
        return f"no: {error}"
    return "yes"


def _why_not_in_vllm() -> str:
    """Say why vLLM does not find the plugin; empty where it does."""
    if importlib.util.find_spec("vllm") is None:
        return "no: not installed"
    plugins = importlib.metadata.entry_points(group="vllm.general_plugins")
    if _VLLM_PLUGIN not in plugins.names:
        return "no: merge_attn_states was not installed by pip, so vLLM does not see its plugin"
    from merge_attn_states_vllm import switched_off

    if why := switched_off():
        return f"no: {why}"
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and _VLLM_PLUGIN not in allowed.split(","):
        return f"no: VLLM_PLUGINS={allowed} leaves {_VLLM_PLUGIN} out"
    return ""


def _in_vllm() -> str:
    """Register the plugin, as vLLM does at its start, and say what it replaced."""
    from .integrations import vllm

    vllm.register()
    state = vllm.status()
    if not state.active:
        return f"no: {state.reason}"
    return f"yes, {state.vllm}: replaces {', '.join(state.replaced)}"


def _why_no_cuda(cuda: str | None, architectures: list[str]) -> str:
    """Say why CUDA tensors cannot be merged; empty where they can."""
    if cuda is None:
        return "no: this build has none; reinstall it where nvcc is (MERGE_ATTN_STATES_CUDA=1)"
    if torch.version.hip:
        return "no: this PyTorch is a ROCm build, which has no CUDA"
    if not torch.version.cuda:
        return "no: this PyTorch is CPU only; install a CUDA build of it"
    if not torch.cuda.is_available():
        return f"no: no GPU, or its driver is too old for CUDA {cuda}"
    uncovered = [i for i in range(_device_count()) if not _covers(architectures, i)]
    if uncovered:
        major, minor = torch.cuda.get_device_capability(uncovered[0])
        return (
            f"no: cuda:{uncovered[0]} has compute capability {major}.{minor}, for which this build "
            f"holds no code; reinstall with TORCH_CUDA_ARCH_LIST={major}.{minor}"
        )
    return ""


def _covers(architectures: list[str], index: int) -> bool:
    """Whether the binaries hold code that a GPU can run.

    Code for 8.0 runs on 8.0 and every later 8.x, PTX for 8.0 on every later GPU. Code for "10.0f"
    runs on 10.0 and later 10.x, PTX or not, and code for "10.0a" on 10.0 alone.
    """
    here = torch.cuda.get_device_capability(index)
    for architecture in architectures:
        number, _, ptx = architecture.partition("+")
        major, minor = (int(part) for part in number.rstrip("af").split("."))
        if number.endswith("a"):
            covers = (major, minor) == here
        elif number.endswith("f"):
            covers = major == here[0] and minor <= here[1]
        else:
            covers = (major, minor) <= here and (major == here[0] or bool(ptx))
        if covers:
            return True
    return False
