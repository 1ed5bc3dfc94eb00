"""Errors of `merge_states` and `update_state` by the names that an integration's caller knows."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TypeVar

Error = TypeVar("Error", bound=Exception)


def renamed(error: Error, names: Mapping[str, str]) -> Error:
    """The same error with the caller's names: `names` maps this package's to them."""
    ours = "|".join(map(re.escape, names))
    said = re.sub(rf"(?<![\w.])(?:{ours})(?![\w\[])", lambda name: names[name[0]], str(error))
    return type(error)(said)
