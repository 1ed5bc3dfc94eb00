"""The benchmark: what a merge costs against the memory's limit, against others, and on the host.

`python -m benchmarks --help`; docs/benchmarks.md says what each figure means. Its files:

    cases.py        what is measured, in named groups
    operands.py     the tensors of a case
    providers.py    who is measured; formula.py, vllm.py, triad.py hold what they need
    check.py        whether an answer is right, before it is timed
    timing.py       the only timer
    measure.py      one comparison: operands, checks, times, records
    host.py         eager calls, in processes of their own; bare_launch.cu is their floor
    environment.py  GPU, clocks, versions, the hashes of the sources
    results.py      the JSON file, and how runs merge into it
    run.py          the command that measures; argument_types.py, what all commands are given
    targets.py      what we ask of ourselves: target_list.py, of the kinds in target_kinds.py
    tables.py       results as tables
    in_vllm/        the merge inside vLLM, with and without the plugin: docs/vllm.md
    report.py       what is published of results files: the text of sections.py, the pictures of
                    pictures.py, whose rows (picture_rows.py) are embedded in them
"""
