"""The benchmark: what a merge costs where a user meets it, against a limit and against others.

`python -m benchmarks --help`; docs/benchmarks.md says what each figure means. Its files:

    cases.py        what is measured; operands.py, the tensors of a case
    providers.py    who is measured; vllm.py, vLLM's op
    check.py        whether an answer is right, before it is timed
    timing.py       the only timer
    kernels.cu      what a merge is timed between and against; kernels.py compiles and launches it
    neighbours.py   the groups: what a merge adds between two kernels,
    cold.py         large and out of DRAM,
    host.py         what a call costs the processor,
    cpu.py          and on a CPU
    states.py       many parts and running states, in all of these regimes: who, checks, measuring;
    states_cases.py their cases and operands
    process.py      one process of a run
    run.py          the command that measures; options.py, what commands are given
    environment.py  GPU, clocks, versions, the hashes of the sources; results.py, the JSON file
    targets.py      how results do against targets.json
    report.py       publishes: README and docs, out of tables.py and picture.py
"""
