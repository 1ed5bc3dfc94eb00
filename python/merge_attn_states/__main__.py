"""`python -m merge_attn_states`: `info`."""

from __future__ import annotations

import argparse
import sys

from . import _info


def main(arguments: list[str] | None = None) -> int:
    """Run a subcommand and return its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m merge_attn_states",
        description="Merge partial attention outputs by their log-sum-exp.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="versions, binaries, devices, and which paths are available")
    parser.parse_args(arguments)
    print("\n".join(_info.lines()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
