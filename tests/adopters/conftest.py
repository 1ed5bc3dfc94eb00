"""Fixtures: an adopter's module, imported where `make test-adopters` has put it."""

import importlib
import importlib.util

import pytest

from . import packages


@pytest.fixture
def adopter(monkeypatch):
    """Return a module of an adopter by the name of its package and its own, or by its file."""

    def load(package, module):
        root = packages.root_of(package)
        if not root.is_dir():
            pytest.skip(f"{package} is not here: `make test-adopters` fetches it")
        try:
            if module.endswith(".py"):
                spec = importlib.util.spec_from_file_location(f"_{package}", root / module)
                loaded = importlib.util.module_from_spec(spec)
                spec.loader.exec_module(loaded)
                return loaded
            for folder in (packages.NEEDS, root):
                monkeypatch.syspath_prepend(folder)
            return importlib.import_module(module)
        except ImportError as error:
            pytest.skip(f"{package} cannot be imported here: {error}")

    return load
