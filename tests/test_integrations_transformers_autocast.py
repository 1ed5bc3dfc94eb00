"""Architectures of transformers under autocast, beside the same model with sdpa."""

import pytest
import torch
from attention_support import operands
from support import BF16, F16, F32, F64

transformers = pytest.importorskip("transformers", reason="the extra [demo] is not installed")

from transformers.integrations.sdpa_attention import sdpa_attention_forward  # noqa: E402

from merge_attn_states.integrations import pytorch  # noqa: E402
from merge_attn_states.integrations.transformers import (  # noqa: E402
    register,
    split_attention_forward,
)

TOKENS = {"vocab_size": 100, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES = {"hidden_size": 64, "intermediate_size": 64}
DEPTH = {"num_hidden_layers": 2, "num_attention_heads": 4}
PLAIN = TOKENS | SIZES | DEPTH
GROUPED = PLAIN | {"num_key_value_heads": 2}
WIDTH_16 = GROUPED | {"head_dim": 16}
PATCHES = SIZES | DEPTH | {"image_size": 16, "patch_size": 4}
BOTH_STACKS = {
    f"{stack}_{name}": size
    for stack in ("encoder", "decoder")
    for name, size in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 64))
}
SEQUENCE = TOKENS | BOTH_STACKS | {"d_model": 64, "decoder_start_token_id": 1}
GPT = TOKENS | {"n_embd": 64, "n_layer": 2, "n_head": 4}
LATENT = {  # attention over a latent: V narrower than Q
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
    "first_k_dense_replace": 2,
}

TEXT, BOTH, IMAGE, SOUND = "text", "text for both stacks", "image", "sound"
ARCHITECTURES = {
    "Bert": (PLAIN, TEXT),
    "Roberta": (PLAIN, TEXT),
    "Electra": (PLAIN | {"embedding_size": 64}, TEXT),
    "ModernBert": (PLAIN | {"cls_token_id": 1, "sep_token_id": 2}, TEXT),
    "Llama": (GROUPED, TEXT),
    "Mistral": (GROUPED, TEXT),
    "Mixtral": (GROUPED | {"num_local_experts": 2}, TEXT),
    "Qwen2": (GROUPED, TEXT),
    "Qwen3": (WIDTH_16, TEXT),
    "Gemma": (WIDTH_16, TEXT),
    "Gemma3Text": (WIDTH_16, TEXT),
    "Phi": (GROUPED, TEXT),
    "Phi3": (GROUPED, TEXT),
    "Olmo2": (GROUPED, TEXT),
    "Granite": (GROUPED, TEXT),
    "Cohere": (GROUPED, TEXT),
    "StableLm": (GROUPED, TEXT),
    "Starcoder2": (GROUPED, TEXT),
    "Glm": (WIDTH_16, TEXT),
    "DeepseekV3": (PLAIN | LATENT, TEXT),
    "GPT2": (GPT, TEXT),
    "GPTJ": (GPT | {"rotary_dim": 8}, TEXT),
    "GPTNeoX": (PLAIN, TEXT),
    "OPT": (PLAIN | {"ffn_dim": 64, "word_embed_proj_dim": 64}, TEXT),
    "Bart": (SEQUENCE, BOTH),
    "T5": (TOKENS | {"d_model": 64, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 4}, BOTH),
    "Whisper": (SEQUENCE | {"num_mel_bins": 8, "max_source_positions": 20}, SOUND),
    "ViT": (PATCHES, IMAGE),
    "Dinov2": (PATCHES, IMAGE),
    "SiglipVision": (PATCHES, IMAGE),
}


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def inputs(kind, device):
    tokens = torch.randint(5, 100, (3, 20), device=device)
    lengths = torch.tensor([20, 9, 3], device=device)
    padding = (torch.arange(20, device=device) < lengths[:, None]).long()
    if kind == IMAGE:
        return {"pixel_values": torch.randn(3, 3, 16, 16, device=device)}
    if kind == SOUND:
        sound = torch.randn(3, 8, 40, device=device)
        return {"input_features": sound, "decoder_input_ids": tokens}
    more = {"decoder_input_ids": tokens} if kind == BOTH else {}
    return {"input_ids": tokens, "attention_mask": padding, **more}


def states(model, implementation, given, lower=None):
    model.set_attn_implementation(implementation)
    device = model.device.type
    with torch.autocast(device, lower, enabled=lower is not None):
        state = model(**given).last_hidden_state.to(F64)
    # A padded query's own state means nothing, and each implementation has its own.
    is_decoder = "decoder_input_ids" in given
    return state if is_decoder or "input_ids" not in given else state[given["attention_mask"] > 0]


TRANSFORMERS = tuple(map(int, transformers.__version__.split(".")[:2]))
ITS_OWN_ATTENTION = ("GPTJ", "T5")  # in 5.17, no more in 5.24


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures(name, device):
    config, kind = ARCHITECTURES[name]
    config = getattr(transformers, f"{name}Config")(**config)
    model = getattr(transformers, f"{name}Model")(config).eval().to(device)
    given, seen = inputs(kind, device), []
    exact = states(model, "sdpa", given)
    unsplit = states(model, "sdpa", given, BF16)

    def attend(query, *args, **options):
        seen.append(query.dtype)
        return pytorch.attention_with_lse(query, *args, **options)

    for parts in (1, 3):
        split = states(model, register(parts=parts, attend=attend), given, BF16)
        assert (split - exact).norm() <= 1.25 * (unsplit - exact).norm()
        assert (split - unsplit).norm() <= 1.25 * (unsplit - exact).norm()
    if not seen and name in ITS_OWN_ATTENTION and TRANSFORMERS < (5, 24):
        pytest.skip(
            f"{name} of transformers {transformers.__version__} has an attention of its own"
        )
    assert set(seen) == {BF16}


@pytest.mark.parametrize("added", ["nothing", "mask", "mask in float32", "bias", "bias and mask"])
@pytest.mark.parametrize("lower", [BF16, F16], ids=str)
@pytest.mark.parametrize(
    "dtypes",
    [
        (F32, F32, BF16),  # a rotary embedding in float32
        (BF16, F32, F32),
        (F32, F32, F32),
        (F16, BF16, F32),
    ],
    ids=str,
)
def test_dtypes_are_autocasts(dtypes, lower, added, device):
    """As sdpa has it: all three, and what is added to the scores."""
    given = operands((2, 4, 2, 7, 7, 16, 16), F32, device)
    given = [x.to(dtype) for x, dtype in zip(given, dtypes, strict=True)]
    mask = None
    bias = torch.randn(1, 4, 7, 7, device=device) if "bias" in added else None
    if "mask" in added:
        mask = torch.rand(2, 1, 7, 7, device=device) < 0.6
        mask |= torch.eye(7, dtype=torch.bool, device=device)
        if "float32" in added:
            mask = torch.randn(mask.shape, device=device).masked_fill(~mask, -torch.inf)
    layer = torch.nn.Module()
    layer.num_key_value_groups = 2
    with torch.autocast(device, lower):
        expected, _ = sdpa_attention_forward(layer, *given, mask, position_bias=bias)
        output, _ = split_attention_forward(layer, *given, mask, position_bias=bias, parts=3)
    assert output.dtype == expected.dtype == lower
    torch.testing.assert_close(output, expected, rtol=0, atol=4 * torch.finfo(lower).eps)


def test_float64_is_left_alone(device):
    given = operands((2, 4, 2, 7, 7, 16, 16), F64, device)
    expected, _ = split_attention_forward(torch.nn.Module(), *given, None)
    with torch.autocast(device, BF16):
        output, _ = split_attention_forward(torch.nn.Module(), *given, None)
    assert torch.equal(output, expected)


def test_mixed_dtypes_are_refused_without_autocast(device):
    query, key, value = operands((2, 4, 2, 7, 7, 16, 16), F32, device)
    with pytest.raises(ValueError, match=r"^value: expected dtype .*, got torch.bfloat16$"):
        split_attention_forward(torch.nn.Module(), query, key, value.to(BF16), None)
