"""`python -m benchmarks`: measure; `python -m benchmarks report`: publish."""

import sys

from . import report, run

if __name__ == "__main__":
    publishes = sys.argv[1:2] == ["report"]
    sys.exit(report.main(sys.argv[2:]) if publishes else run.main(sys.argv[1:]))
