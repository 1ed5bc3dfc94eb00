"""Operands of attention, attention by its definition, and the comparison with it."""

import torch
from support import BF16, F16, F32, F64, INF, NAN

from merge_attn_states.integrations.pytorch import attention_kernel, attention_with_lse

# |error| of the output for values of size 1, and of the LSE: twice what was seen over the shapes of
# test_integrations_pytorch.py. In 16
# bits the flash kernels round the weights as well as the output, and the CPU kernel sums them with
# an exponential of its own (LSE wrong by 6e-5).
OUTPUT_BOUND = {F64: 1e-14, F32: 3e-6, F16: 1.5e-3, BF16: 1e-2}
LSE_BOUND = {F64: 1e-14, F32: 2e-6, F16: 1.5e-4, BF16: 1.5e-4}


def operands(shape, dtype, device):
    batch, heads, kv_heads, queries, keys, head_size, value_head_size = shape
    query = torch.randn(batch, heads, queries, head_size, dtype=F64).to(dtype)
    key = torch.randn(batch, kv_heads, keys, head_size, dtype=F64).to(dtype)
    value = torch.randn(batch, kv_heads, keys, value_head_size, dtype=F64).clamp(-2, 2).to(dtype)
    return query.to(device), key.to(device), value.to(device)


def additive(mask, dtype):
    """The bool mask as a sum."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, -INF)


def reference(query, key, value, mask=None, is_causal=False, scale=None):
    """The definition, in float64 on the CPU: sums over the keys that a row sees, and no others."""
    groups = query.shape[1] // key.shape[1]
    query, key, value = (x.cpu().to(F64) for x in (query, key, value))
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.mT * (query.shape[3] ** -0.5 if scale is None else scale)
    seen = torch.ones(scores.shape, dtype=torch.bool)
    if is_causal:
        seen = seen.tril(scores.shape[3] - scores.shape[2])
    if mask is not None:
        mask = mask.cpu()
        seen = seen & (mask if mask.dtype == torch.bool else mask != -INF)
        scores = scores if mask.dtype == torch.bool else scores + mask
    scores = scores.masked_fill(~seen, -INF)
    lse = scores.logsumexp(-1)
    weights, value = scores.softmax(-1)[..., None], value[:, :, None]
    weights = weights.masked_fill((weights == 0) & value.isinf(), 1.0)  # 0 times inf is inf here
    weighted = weights * value
    output = weighted.masked_fill(~seen[..., None], 0.0).sum(-2)
    output = output.masked_fill(lse[..., None] == -INF, 0.0)
    return output, lse.masked_fill(lse == INF, NAN)


def check(query, key, value, mask=None, kernel=None, **options):
    if kernel is not None:
        assert attention_kernel(query, key, value, mask, **options) == kernel
    output, lse = attention_with_lse(query, key, value, mask, **options)
    expected, expected_lse = reference(query, key, value, mask, **options)
    assert output.dtype == query.dtype
    assert lse.dtype == (F64 if query.dtype == F64 else F32)
    assert output.device == lse.device == query.device
    torch.testing.assert_close(
        output.cpu().to(F64), expected, rtol=0, atol=OUTPUT_BOUND[query.dtype], equal_nan=True
    )
    torch.testing.assert_close(
        lse.cpu().to(F64), expected_lse, rtol=0, atol=LSE_BOUND[query.dtype], equal_nan=True
    )
    assert (output[lse == -INF] == 0).all()
    return output, lse


def flash(device, dtype, head_size=64, masked=False):
    """The kernel that is due, the rule written a second time."""
    if device == "cpu":
        return "cpu_flash"
    serves = dtype in (F16, BF16) and head_size <= 256 and not masked
    return "cuda_flash" if serves and torch.cuda.get_device_capability() >= (8, 0) else "matmul"
