"""`python -m benchmarks`: measure; `python -m benchmarks report`: publish."""

import sys

from . import report, run


def main(arguments: list[str]) -> int:
    return report.main(arguments[1:]) if arguments[:1] == ["report"] else run.main(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
