"""What stands between the operation and an engine: one module an engine, none imported by default.

Each module starts with the table of the differences that it absorbs. `pytorch`, `flashinfer` and
`sglang` need nothing but PyTorch; `transformers` and `vllm` need the packages of those names.
"""
