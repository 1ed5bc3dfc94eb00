"""Merge partial attention outputs by their log-sum-exp, exactly, on CPU and CUDA.

>>> import torch
>>> from merge_attn_states import merge_attn_states
>>> prefix_output, suffix_output = torch.randn(2, 4, 8, 64)  # [num_tokens, num_heads, head_size]
>>> prefix_lse, suffix_lse = torch.randn(2, 8, 4)  # [num_heads, num_tokens], natural log
>>> output = torch.empty_like(suffix_output)
>>> merge_attn_states(output, prefix_output, prefix_lse, suffix_output, suffix_lse)
"""

from ._library import build_info, load_op_library

load_op_library()

from .ops import SelectedKernel, merge_attn_states, selected_kernel  # noqa: E402

__all__ = ["SelectedKernel", "__version__", "build_info", "merge_attn_states", "selected_kernel"]

__version__: str = build_info()["version"]
