"""Other projects' own merges, called and never copied, beside the one line that replaces them.

packages.py       fetches what PyTorch does not bring; `make test-adopters` runs it
support.py        the comparison: theirs' shape and dtype, and no further from float64
test_rings.py     a running state: PyTorch, yunchang, ring-flash-attn, diffusers, TransformerEngine
test_lists.py     parts at once: NATTEN, SGLang's dual chunk attention
test_engines.py   two parts: SGLang, FlashInfer, vLLM's way with FlashInfer
"""
