"""The plugin's tests, and what measures and checks the merge inside vLLM with and without it.

    test_vllm.py      in the real vLLM; packages.py fetches it
    test_vllm_*.py    on a stand-in (standin.py), and the ways in which backends call (patterns.py)
    test_rigs*.py     of the following
    gain.py           what the plugin gains at vLLM's dispatcher (dispatcher.py, memory.py)
    engine.py         the whole vLLM with the plugin: its processes (process.py), models and prompts
                      (scenarios.py), what is watched in them (watch.py; across_ranks.py, and for
                      it workers.py in their workers), what that comes to (rounds.py, observed.py)
    report.py         writes both into docs/vllm.md; records.py, what they write into results files

The folder is not called vllm: `import vllm` would find it.
"""
