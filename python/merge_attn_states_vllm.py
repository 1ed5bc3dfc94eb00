"""vLLM's way in: the entry point `merge_attn_states` of the group `vllm.general_plugins`.

A module of its own, because vLLM calls plugins without a `try`: importing the package raises where
PyTorch is missing or too old, and an engine must not die of that.
"""

from __future__ import annotations

import logging
import os

_said: set[str] = set()


def _is_off(switch: str) -> bool:
    return os.environ.get(switch, "").strip().lower() in ("0", "false", "off", "no")


def switched_off() -> str:
    """Say what in the environment takes the plugin off; empty where nothing does."""
    switch = "MERGE_ATTN_STATES_VLLM"
    return f"{switch} takes it off" if _is_off(switch) else ""


def ranks_switched_off() -> str:
    """Say what in the environment keeps merges across ranks from the plugin; empty: nothing."""
    switch = "MERGE_ATTN_STATES_VLLM_DCP"
    return f"{switch} takes them off" if _is_off(switch) else ""


def register() -> None:
    """Let vLLM merge attention states through merge_attn_states; never raises.

    Does nothing where the environment says `MERGE_ATTN_STATES_VLLM=0`, and leaves everything as it
    was with one warning where the package does not fit. May be called again.
    """
    if switched_off():
        return
    try:
        from merge_attn_states.integrations import vllm

        vllm.register()
    except Exception as error:
        if str(error) not in _said:
            _said.add(str(error))
            logging.getLogger("vllm.merge_attn_states").warning(
                "merge_attn_states is not used, vLLM merges as before: %s", error
            )
