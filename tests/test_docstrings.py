"""The examples in the docstrings of what a user calls run as they stand."""

import doctest
import importlib

import pytest

MODULES = ["", ".ops", ".states", ".distributed"]
MODULES += [
    f".integrations.{name}" for name in ("context_parallel", "flashinfer", "pytorch", "sglang")
]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    module = importlib.import_module("merge_attn_states" + name)
    failed, ran = doctest.testmod(module)
    assert ran
    assert not failed
