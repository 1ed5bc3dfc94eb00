"""The attention function that transformers calls, by itself."""

import pytest
import torch
from attention_support import additive, operands, reference
from support import F32, F64

pytest.importorskip("transformers", reason="the extra [demo] is not installed")

from merge_attn_states.integrations.transformers import split_attention_forward


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("as_sum", [False, True])
@pytest.mark.parametrize("parts", [1, 3])
def test_forward_with_masked_rows(parts, as_sum, device):
    query, key, value = operands((2, 4, 2, 7, 11, 32, 24), F32, device)
    mask = torch.rand(2, 1, 7, 11, device=device) < 0.6
    mask[0, 0, 2] = False  # a row that no part sees
    mask[1, 0, 5, :4] = False  # a row that the first part does not see
    given = additive(mask, F32) if as_sum else mask
    layer = torch.nn.Module()
    output, weights = split_attention_forward(layer, query, key, value, given, parts=parts)
    expected, _ = reference(query, key, value, mask)
    assert weights is None
    assert output.shape == (2, 7, 4, 24)
    assert output.is_contiguous()
    assert (output[0, 2] == 0).all()
    torch.testing.assert_close(output.cpu().to(F64), expected.transpose(1, 2), rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("queries", "keys", "of_the_call", "of_the_layer", "causal"),
    [
        (7, 7, None, True, True),
        (7, 7, None, None, True),  # transformers' default
        (7, 7, False, True, False),
        (7, 7, True, False, True),
        (1, 7, None, True, False),  # decode
        (7, 12, None, True, True),  # prefill into a static cache: later keys are unused
        (7, 4, None, True, True),
    ],
)
def test_is_causal(queries, keys, of_the_call, of_the_layer, causal, device):
    query, key, value = operands((2, 4, 2, queries, keys, 16, 16), F32, device)
    layer = torch.nn.Module()
    if of_the_layer is not None:
        layer.is_causal = of_the_layer
    output, _ = split_attention_forward(
        layer, query, key, value, None, is_causal=of_the_call, parts=3
    )
    mask = torch.ones(queries, keys, dtype=torch.bool).tril() if causal else None
    expected, _ = reference(query, key, value, mask)
    torch.testing.assert_close(output.cpu().to(F64), expected.transpose(1, 2), rtol=0, atol=2e-6)


@pytest.mark.parametrize("width", [1, "queries", "keys"])
@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize(("queries", "keys"), [(7, 7), (7, 12), (7, 4)])
def test_a_bias_leaves_causality_as_it_is(queries, keys, parts, width, device):
    """One for all keys too; of a static cache it may be as wide as what is used, or as all."""
    query, key, value = operands((2, 4, 2, queries, keys, 16, 16), F32, device)
    used = min(queries, keys)
    bias = torch.randn(1, 4, queries, {1: 1, "queries": used, "keys": keys}[width], device=device)
    layer = torch.nn.Module()
    output, _ = split_attention_forward(
        layer, query, key, value, None, is_causal=True, position_bias=bias, parts=parts
    )
    mask = torch.ones(queries, used, dtype=torch.bool).tril()
    seen = torch.where(mask, bias[..., :used].cpu(), -torch.inf)
    expected, _ = reference(query, key[:, :, :used], value[:, :, :used], seen)
    torch.testing.assert_close(output.cpu().to(F64), expected.transpose(1, 2), rtol=0, atol=2e-6)


@pytest.mark.parametrize("parts", [1, 2, 3])
@pytest.mark.parametrize("width", [4, 6, 9])
def test_a_mask_or_bias_of_other_keys_is_refused(width, parts):
    inputs = operands((2, 4, 2, 7, 7, 8, 8), F32, "cpu")
    layer = torch.nn.Module()
    expected = rf"^attn_mask: expected a last size of 1 or 7 = num_keys, got \[.*{width}\]$"
    mask = torch.ones(2, 1, 7, width, dtype=torch.bool)
    with pytest.raises(ValueError, match=expected):
        split_attention_forward(layer, *inputs, mask, parts=parts)
    with pytest.raises(ValueError, match=expected):
        split_attention_forward(
            layer, *inputs, None, is_causal=False, position_bias=additive(mask, F32), parts=parts
        )


REFUSED = [
    ("softcap", 50.0, "got 50.0"),
    ("s_aux", torch.zeros(4), r"got a tensor \[4\]"),
    ("sinks", torch.zeros(4), r"got a tensor \[4\]"),
    ("sliding_window", 2, "got 2"),  # three keys
    ("head_mask", torch.ones(4), r"got a tensor \[4\]"),
    ("layer_head_mask", torch.ones(4), r"got a tensor \[4\]"),
    ("output_attentions", True, "got True"),
    ("cu_seq_lens_q", torch.zeros(3), r"got a tensor \[3\]"),
    ("cu_seq_lens_k", torch.zeros(3), r"got a tensor \[3\]"),
    ("indices", torch.zeros(3), r"got a tensor \[3\]"),
    ("block_indices", torch.zeros(3), r"got a tensor \[3\]"),
]


@pytest.mark.parametrize(("name", "given", "got"), REFUSED)
def test_refused_by_name(name, given, got):
    inputs = operands((1, 2, 2, 3, 3, 8, 8), F32, "cpu")
    layer = torch.nn.Module()
    with pytest.raises(ValueError, match=rf"^{name}: not supported .*; expected None, {got}$"):
        split_attention_forward(layer, *inputs, None, **{name: given})
    split_attention_forward(layer, *inputs, None, **{name: None})


@pytest.mark.parametrize(
    ("window", "queries", "keys"),
    [
        (9, 9, 9),  # exactly as long
        (4096, 9, 9),
        (9, 1, 9),  # decode
    ],
)
def test_a_window_as_long_as_the_keys_hides_nothing(window, queries, keys, device):
    inputs = operands((2, 4, 2, queries, keys, 16, 16), F32, device)
    expected, _ = split_attention_forward(torch.nn.Module(), *inputs, None)
    output, _ = split_attention_forward(torch.nn.Module(), *inputs, None, sliding_window=window)
    assert torch.equal(output, expected)
    with pytest.raises(ValueError, match=r"^sliding_window: not supported .*, got 8$"):
        split_attention_forward(torch.nn.Module(), *inputs, None, sliding_window=8)


def test_queries_of_a_batch_of_one(device):
    """Learned queries beside the keys of a whole batch, as sdpa takes them."""
    query, key, value = operands((3, 4, 4, 5, 9, 16, 16), F32, device)
    output, _ = split_attention_forward(
        torch.nn.Module(), query[:1], key, value, None, is_causal=False
    )
    expected, _ = reference(query[:1].expand(3, -1, -1, -1), key, value)
    torch.testing.assert_close(output.cpu().to(F64), expected.transpose(1, 2), rtol=0, atol=2e-6)
