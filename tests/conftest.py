"""Fixtures of the suite: the devices, the ways into the op, seeds and the hypothesis profile."""

import fcntl
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import hypothesis
import pytest
import torch
import torch._functorch.config
import torch._inductor.config
from in_vllm.standin import log, vllm  # noqa: F401
from support import without_fast_path

import merge_attn_states
from merge_attn_states._library import fast_path


def cuda_missing() -> str:
    """Why the CUDA tests cannot run here; empty where they can."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    if merge_attn_states.build_info()["cuda"] is None:
        return "built without CUDA kernels"
    return ""


hypothesis.settings.register_profile(
    "suite", deadline=None, max_examples=150, derandomize="CI" in os.environ
)
hypothesis.settings.load_profile("suite")

CUDA = pytest.param(
    "cuda", marks=pytest.mark.skipif(bool(cuda_missing()), reason=cuda_missing() or "available")
)


@pytest.fixture(params=["cpu", CUDA])
def device(request):
    return request.param


@pytest.fixture
def cuda():
    if cuda_missing():
        pytest.skip(cuda_missing())
    return "cuda"


ENTRIES = {
    "python": merge_attn_states.merge_attn_states,
    "python without the fast path": without_fast_path,
    "torch.ops": torch.ops.merge_attn_states.merge_attn_states,
}


@pytest.fixture(params=ENTRIES)
def entry(request):
    """Every way in takes the same arguments and gives the same results and the same errors."""
    return ENTRIES[request.param]


class Way(NamedTuple):
    """One way into the op, eager or compiled."""

    merge: Callable[..., None]
    backend: str | None = None  # of torch.compile

    @property
    def refusal(self) -> type[Exception]:
        """The type of what a Python kernel refuses: compiling wraps it and keeps its sentence."""
        return RuntimeError if self.backend else ValueError

    def run(self, step):
        """The step as this way runs it: as it is, or in one graph."""
        if self.backend is None:
            return step
        torch._dynamo.reset()
        return torch.compile(step, backend=self.backend, fullgraph=True)


WAYS = {name: Way(entry) for name, entry in ENTRIES.items()} | {
    f"{name}, {backend}": Way(ENTRIES[name], backend)
    for name in ("python", "torch.ops")
    for backend in ("eager", "aot_eager", "inductor")
}


@pytest.fixture(params=WAYS)
def way(request):
    """Every way in, the compiled ones too; nothing that was compiled before hides a change."""
    with (
        torch._inductor.config.patch(force_disable_caches=True),
        torch._functorch.config.patch(enable_autograd_cache=False),
    ):
        yield WAYS[request.param]


@pytest.fixture
def taken(monkeypatch):
    """What the fast path said to each call of the Python function.

    True: it merged. False: it stepped aside. None: it raised.
    """
    path, why = fast_path()
    if path is None:
        pytest.skip(why)
    answers = []

    def record(*args):
        answer = None  # of a call that raises
        try:
            answer = path(*args)
        finally:
            answers.append(answer)
        return answer

    monkeypatch.setattr(merge_attn_states.ops, "_fast", record)
    return answers


@pytest.fixture
def child_environment():
    """For a second Python that imports the package and this folder's helpers."""
    paths = [Path(__file__).parent, Path(merge_attn_states.__file__).parents[1]]
    return os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths))}


@pytest.fixture
def gigabytes():
    """One test at a time that takes gigabytes, of all processes that run parts of the suite."""
    with Path(tempfile.gettempdir(), "merge_attn_states_gigabytes.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()  # what a test leaves to the next is nobody's for the others


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(20250101)
