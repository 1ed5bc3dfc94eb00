"""vLLM's attention backends, merging through this package.

vLLM finds `register` through its entry point (`merge_attn_states_vllm.py`) and calls it in every
process before work begins. It replaces two functions, wherever a module holds them, and what merges
across ranks (_vllm_ranks.py):

| vLLM's function                                          | called by                             |
| -------------------------------------------------------- | ------------------------------------- |
| `vllm.v1.attention.ops.merge_attn_states` (the           | every attention backend, most through |
|   dispatcher), before that `vllm.attention.ops....`      |   a name bound when it was imported   |
| `vllm._custom_ops.merge_attn_states` (the CUDA op)       | the dispatcher, at each call          |

What is absorbed: releases whose functions have 6, 7 or 8 parameters; modules that bound a function
before the plugin ran; a call that this package refuses and vLLM's own function takes, which vLLM's
own function then gets.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.metadata
import inspect
import logging
import re
import sys
import threading
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, NamedTuple

import torch

from merge_attn_states_vllm import ranks_switched_off, switched_off

from .. import UnavailableError, __version__, build_info, merge_attn_states
from .._library import fast_path
from ._vllm_ranks import HOMES, RankMerges, merges_of, replacing

__all__ = ["Status", "register", "restore", "status"]

_DISPATCHERS = (
    "vllm.v1.attention.ops.merge_attn_states",
    "vllm.attention.ops.merge_attn_states",
)
_CUSTOM_OPS = "vllm._custom_ops"
_NAME = "merge_attn_states"
_PARAMETERS = tuple(inspect.signature(merge_attn_states).parameters)
_FEWEST = 6  # parameters of vLLM's function; older releases lack the last one or two
_log = logging.getLogger("vllm.merge_attn_states")  # under vLLM's, whose handler shows it

_Merge = Callable[..., Any]


def _merge_by_operator(*call: object) -> None:
    """Merge as the Python function does, in less time than it takes without the fast path."""
    try:
        torch.ops.merge_attn_states.merge_attn_states(*call)
    except RuntimeError:
        # The operator has one type for every error, and wrote nothing; the function has several.
        merge_attn_states(*call)  # type: ignore[arg-type]


_merge: _Merge = _merge_by_operator if fast_path()[0] is None else merge_attn_states


class _Replacement(NamedTuple):
    original: _Merge
    ours: _Merge
    owner: type | None = None  # whose method it is: no module holds it then


class Status(NamedTuple):
    """What is replaced in this process, and what went back to vLLM's own functions."""

    active: bool
    reason: str  # why not; empty where active
    vllm: str | None  # its version
    replaced: list[str]  # every place that holds this package's function, sorted
    fallbacks: dict[str, int]  # calls that vLLM's own function got, by the reason
    across_ranks: str  # why merges across ranks are vLLM's own; empty where they are replaced
    transports: list[str]  # how states travel there, since the first such call


_replacements: list[_Replacement] = []
_fallbacks: dict[str, int] = {}
_refused_later: set[str] = set()  # by calls of register() after one that replaced something
_reason: str | None = None  # None until register() is called
_across_ranks = ""  # why not
_rank_merges = RankMerges()
_cannot_run = ""  # why no kernel of this build runs on this GPU, once a call has shown it
_thread = threading.local()
_lock = threading.RLock()  # importing a module may bring another call of register()


def register() -> None:
    """Replace vLLM's merge in this process, and log once what was replaced.

    Neither initialises CUDA nor launches anything. Calling it again replaces what has been imported
    anew since. It never raises: where this package does not fit, everything stays as it was, and
    one warning says why.
    """
    global _reason
    new: list[_Replacement] = []
    with _lock:
        try:
            refusal = _why_not()
            if not refusal:
                new = _find()
                _replacements.extend(new)  # first, so that restore() knows of every place
                replaced = [
                    place
                    for original, ours, owner in _replacements
                    for place in _swap(original, ours, owner)
                ]
        except Exception as error:
            refusal = f"{type(error).__name__}: {error}"
        if refusal:
            _refuse(refusal)
            return
        _reason = ""
    if new:
        _log.info(
            "merge_attn_states %s merges attention states in vLLM %s: replaced %s",
            __version__,
            _version(),
            ", ".join(replaced),
        )


def _refuse(refusal: str) -> None:
    """Say once why what is not replaced stays vLLM's own; what is replaced stays so."""
    global _reason
    if _replacements:
        if refusal not in _refused_later:
            _refused_later.add(refusal)
            _log.warning("merge_attn_states replaces nothing that is new in vLLM: %s", refusal)
        return
    if refusal != _reason and not switched_off():
        _log.warning("merge_attn_states is not used, vLLM merges as before: %s", refusal)
    _reason = refusal


def restore() -> None:
    """Give vLLM its own functions back, wherever register() replaced them in this process.

    What took this package's function meanwhile, and is no module (a wrapper, an object), keeps it.
    """
    _give_back("restore() was called")


def _give_back(reason: str) -> None:
    global _reason
    with _lock:
        while _replacements:
            one = _replacements.pop()
            _swap(one.ours, one.original, one.owner)
        _fallbacks.clear()
        _refused_later.clear()
        _rank_merges.clear()
        _reason = reason


def status() -> Status:
    """Tell what is replaced in this process.

    Returns
    -------
    Status
        active; reason (why not); vllm (version or None); replaced (module attributes that hold this
        package's functions); fallbacks (how many calls vLLM's own function got, by the reason);
        across_ranks (why merges across ranks are vLLM's own; empty where they are replaced);
        transports (how states travel there, since the first such call).
    """
    replaced = sorted(place for one in _replacements for place, _ in _places(one.ours, one.owner))
    reason = _reason
    if reason is None:
        reason = switched_off() or "register() was not called"
    return Status(
        bool(replaced),
        reason,
        _version(),
        replaced,
        dict(_fallbacks),
        reason or _across_ranks,
        _rank_merges.transports,
    )


def _why_not() -> str:
    if why := switched_off():
        return why
    if _version() is None and "vllm" not in sys.modules:
        return "vLLM is not installed"
    if torch.version.hip:
        return f"PyTorch {torch.__version__} is a ROCm build"
    if torch.version.cuda and build_info()["cuda"] is None:
        return "this build of merge_attn_states has no CUDA kernels"
    return _cannot_run


def _find() -> list[_Replacement]:
    """Find what is to be replaced and is not yet; raises where a function's shape is not known."""
    dispatcher = next(filter(None, map(_module, _DISPATCHERS)), None)
    if dispatcher is None:
        raise LookupError(f"this vLLM has neither {' nor '.join(_DISPATCHERS)}")
    device_type = getattr(getattr(dispatcher, "current_platform", None), "device_type", "")
    if device_type not in ("cuda", "cpu", ""):  # empty: vLLM knows no platform here
        raise LookupError(f"vLLM's platform here is {device_type}")
    homes = [dispatcher, importlib.import_module(_CUSTOM_OPS)]
    ours = [one.ours for one in _replacements]
    found = []
    for home in homes:
        original = getattr(home, _NAME)
        if original not in ours:
            found.append(_Replacement(original, _replacing(original, home.__name__)))
    return [*found, *_find_across_ranks(ours)]


def _find_across_ranks(ours: list[_Merge]) -> list[_Replacement]:
    """Find what merges across ranks; nothing, and why, where it is not to be replaced."""
    global _across_ranks
    found: list[_Replacement] = []
    before, _across_ranks = _across_ranks, ranks_switched_off()
    if _across_ranks:
        return found
    try:
        homes = list(filter(None, map(_module, HOMES)))
        if not homes:
            _across_ranks = f"this vLLM has none of {', '.join(HOMES)}"
        for home in homes:
            for owner, name, original in merges_of(home):
                if original not in ours:
                    at = f"{home.__name__}.{original.__qualname__}"
                    falling_back = functools.partial(_falling_back, home=at)
                    merge = replacing(name, original, _rank_merges, falling_back)
                    held_by = owner if isinstance(owner, type) else None
                    found.append(_Replacement(original, merge, held_by))
    except Exception as error:  # merges of two parts are replaced all the same
        found, _across_ranks = [], f"{type(error).__name__}: {error}"
        if _across_ranks != before:
            _log.warning("merge_attn_states leaves merges across ranks to vLLM: %s", _across_ranks)
    return found


def _module(name: str) -> ModuleType | None:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # vLLM has it, and something else is missing
        return None


def _replacing(original: _Merge, home: str) -> _Merge:
    """Return this package's function in the original's place, and with the original behind it."""
    known = _known_parameters(original, home)

    @functools.wraps(original)
    def merge_attn_states(
        output: torch.Tensor,
        prefix_output: torch.Tensor,
        prefix_lse: torch.Tensor,
        suffix_output: torch.Tensor,
        suffix_lse: torch.Tensor,
        output_lse: torch.Tensor | None = None,
        prefill_tokens_with_context: int | None = None,
        output_scale: torch.Tensor | None = None,
    ) -> None:
        try:
            _merge(
                output,
                prefix_output,
                prefix_lse,
                suffix_output,
                suffix_lse,
                output_lse,
                prefill_tokens_with_context,
                output_scale,
            )
        except Exception as error:
            given = (
                *(output, prefix_output, prefix_lse, suffix_output, suffix_lse),
                *(output_lse, prefill_tokens_with_context, output_scale),
            )
            if any(option is not None for option in given[known:]):
                raise  # the original has no parameter for it
            with _falling_back(error, home):
                original(*given[:known])

    return merge_attn_states


def _known_parameters(original: _Merge, home: str) -> int:
    """How many of the op's parameters a function has, which must be the first of them."""
    parameters = inspect.signature(original).parameters
    names = tuple(parameters)
    by_position = all(p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters.values())
    defaults = {p.default for p in parameters.values()} <= {None, inspect.Parameter.empty}
    fits = by_position and defaults and not inspect.iscoroutinefunction(original)
    if len(names) < _FEWEST or names != _PARAMETERS[: len(names)] or not fits:
        said = ", ".join(map(str, parameters.values()))
        raise LookupError(f"{home}.{_NAME} is called otherwise: {said}")
    return len(names)


@contextlib.contextmanager
def _falling_back(error: Exception, home: str) -> Iterator[None]:
    """Count a refusal, and log it once for each reason: numbers do not make it another one.

    vLLM's dispatcher calls the op's function, which is replaced too and refuses the same call
    again: that is no second refusal.
    """
    global _cannot_run
    if getattr(_thread, "is_falling_back", False):
        yield
        return
    if isinstance(error, UnavailableError):
        # No kernel for this GPU or driver: the next call would be refused too, and cost twice.
        with _lock:
            is_known, _cannot_run = bool(_cannot_run), f"{type(error).__name__}: {error}"
        if not is_known:  # what is no module may hold this function still
            _log.warning("merge_attn_states cannot run here, vLLM merges as before: %s", error)
            _give_back(_cannot_run)
        yield
        return
    said = str(error).partition("\n")[0]  # PyTorch's dispatcher adds a page
    reason = re.sub(r"(?<![A-Za-z0-9])-?\d+", "#", f"{type(error).__name__}: {said}")
    with _lock:
        count = _fallbacks[reason] = _fallbacks.get(reason, 0) + 1
    if count == 1:
        _log.warning("merge_attn_states refuses a call, vLLM's own %s gets it: %s", home, said)
    _thread.is_falling_back = True
    try:
        yield
    finally:
        _thread.is_falling_back = False


def _swap(old: _Merge, new: _Merge, owner: type | None) -> list[str]:
    """Replace a function wherever a module holds it, or a method; returns where."""
    places = list(_places(old, owner))
    for _, put in places:
        put(new)
    return [place for place, _ in places]


def _places(
    function: _Merge, owner: type | None
) -> Iterator[tuple[str, Callable[[_Merge], object]]]:
    """Yield where modules hold a function, those too that bound it by name when they were imported,
    or where its owner holds a method; and what puts another one there.
    """
    if owner is not None:
        name = function.__name__
        if vars(owner).get(name) is function:
            at = f"{owner.__module__}.{owner.__qualname__}.{name}"
            yield at, functools.partial(setattr, owner, name)
        return
    for module_name, module in list(sys.modules.items()):
        if not issubclass(type(module), ModuleType):  # isinstance believes what a proxy says
            continue
        # Not getattr: a module that loads itself when it is looked at stays unloaded.
        members = ModuleType.__getattribute__(module, "__dict__")
        for name, value in list(members.items()):
            if value is function:
                # Not setattr, which a module may refuse.
                yield f"{module_name}.{name}", functools.partial(members.__setitem__, name)


def _version() -> str | None:
    try:
        return importlib.metadata.version("vllm")
    except Exception:  # none, or metadata that cannot be read
        return getattr(sys.modules.get("vllm"), "__version__", None)
