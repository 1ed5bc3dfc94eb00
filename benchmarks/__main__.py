"""`python -m benchmarks`: measure; `report`: publish; `targets`: judge; `compare`: two builds."""

from __future__ import annotations

import sys


def main() -> int:
    if sys.argv[1:2] == ["report"]:
        from .report import main as command
    elif sys.argv[1:2] == ["targets"]:
        from .targets import main as command
    elif sys.argv[1:2] == ["compare"]:
        from .compare import main as command
    else:
        from .run import main as measure

        return measure(sys.argv[1:])
    return int(command(sys.argv[2:]))


if __name__ == "__main__":
    sys.exit(main())
