"""Merge the attention of two halves of the keys, through Python and through torch.ops."""

import torch

from merge_attn_states import merge_attn_states
from merge_attn_states.integrations.pytorch import attention_with_lse, token_layout

query, key, value = torch.randn(3, 1, 8, 128, 64)  # [batch, num_heads, num_tokens, head_size]
prefix = token_layout(*attention_with_lse(query, key[:, :, :96], value[:, :, :96]))
suffix = token_layout(*attention_with_lse(query, key[:, :, 96:], value[:, :, 96:]))
whole, _ = token_layout(*attention_with_lse(query, key, value))

output = torch.empty_like(whole)  # [num_tokens, num_heads, head_size]
merge_attn_states(output, *prefix, *suffix)
print("through Python, largest difference from one pass:", float((output - whole).abs().max()))

output.fill_(torch.nan)
torch.ops.merge_attn_states.merge_attn_states(output, *prefix, *suffix)
print("through torch.ops:", float((output - whole).abs().max()))
