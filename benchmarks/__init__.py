"""The benchmark: what a merge costs where a user meets it, against a limit and against others.

`python -m benchmarks --help`; docs/benchmarks.md says what each figure means. cases.py and
states_cases.py have what is measured, providers.py and states.py who, targets.json what is asked;
run.py is the command, and process.py one of the processes that it starts.
"""
