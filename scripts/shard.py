"""A pytest plugin: SHARD=k/n runs every n-th test of the suite, from the k-th on."""

import os

import pytest


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    number, _, count = os.environ.get("SHARD", "1/1").partition("/")
    if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise pytest.UsageError(f"SHARD: expected k/n with 1 <= k <= n, got {os.environ['SHARD']}")
    mine = items[int(number) - 1 :: int(count)]
    left = [item for index, item in enumerate(items) if index % int(count) != int(number) - 1]
    config.hook.pytest_deselected(items=left)
    items[:] = mine
