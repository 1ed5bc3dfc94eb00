"""`python -m benchmarks`: measure; `compare`: op libraries; `report`: publish."""

import importlib
import sys


def main(arguments: list[str]) -> int:
    name = arguments[0] if arguments[:1] and arguments[0] in COMMANDS else ""
    command = importlib.import_module(f".{name or 'run'}", __package__)
    return int(command.main(arguments[bool(name) :]))


COMMANDS = ("compare", "report")

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
