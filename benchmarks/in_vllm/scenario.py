"""One engine, started as a user starts it: `python -m benchmarks.in_vllm.scenario NAME MODEL`.

The last line is what was seen, in JSON. vLLM finds the plugin by its entry point; the first answers
come from an engine that nothing of this folder has touched. Then, in the same engine:

| round    | merges                                                                              |
| -------- | ----------------------------------------------------------------------------------- |
| checked  | every call twice, through the plugin and through vLLM's own, both against float64   |
| timed    | with the plugin and without, in turn: host time of each call and of each step       |
| profiled | once each: GPU time of the merge and of everything                                  |
| float64  | every call in float64, rounded once: what the answers are measured against          |
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .. import vllm as vllm_op
from .dispatcher import Merge, patched, unpatched
from .watch import (
    Checked,
    Errors,
    Kind,
    checking,
    merging_in_float64,
    standing_in,
    timing,
)

ROUNDS = 10  # timed, for each
Answers = list[list[tuple[int, float]]]  # for each prompt, each token and its log-probability


class Scenario(NamedTuple):
    """A way in which an engine comes to merge."""

    title: str
    model: str
    prompts: Callable[[Callable[[int], list[int]]], list[list[int]]]
    new_tokens: int
    engine: dict[str, Any] = {}  # noqa: RUF012
    environment: dict[str, str] = {}  # noqa: RUF012
    workspace_tokens: int = 0  # of MLA's chunked prefill; 0: vLLM's own choice
    without_lse: str = "MLA final merge"  # what a call is that asks for no output_lse
    with_lse: str = "MLA chunk loop"

    def name_of(self, has_output_lse: bool) -> str:
        return self.with_lse if has_output_lse else self.without_lse


def long_prompts(random: Callable[[int], list[int]]) -> list[list[int]]:
    return [random(tokens) for tokens in (9000, 6000, 3000, 5000)]


def shared_prefix(random: Callable[[int], list[int]]) -> list[list[int]]:
    prefix = random(2048)
    return [[*prefix, *random(16 + i)] for i in range(16)]


SCENARIOS = {
    "final": Scenario("MLA, prompts longer than a step", "deepseek", long_prompts, 8),
    "chunks": Scenario(
        "MLA, contexts longer than the workspace",
        "deepseek",
        long_prompts,
        8,
        {"max_num_seqs": 16},
        workspace_tokens=2048,
    ),
    "cascade": Scenario(
        "cascade attention, 16 prompts with one prefix",
        "llama",
        shared_prefix,
        16,
        {"disable_cascade_attn": False, "enable_prefix_caching": True},
        {"VLLM_USE_V2_MODEL_RUNNER": "0"},
        without_lse="cascade",
    ),
}
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
VOCABULARY = 4096


def save_model(name: str, folder: Path) -> None:
    """A model with random weights, small but with heads as real ones have them."""
    import transformers

    common: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 2048,
        "intermediate_size": 4096,
        "num_hidden_layers": 4,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "max_position_embeddings": 16384,
        "initializer_range": 0.06,
    }
    torch.manual_seed(0)
    if name == "deepseek":
        latent = {"kv_lora_rank": 512, "q_lora_rank": None, "v_head_dim": 128}
        heads = {"qk_nope_head_dim": 128, "qk_rope_head_dim": 64}
        config = transformers.DeepseekV2Config(
            **common, **latent, **heads, first_k_dense_replace=4, n_routed_experts=4
        )
        model = transformers.DeepseekV2ForCausalLM(config)
    else:
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**common, head_dim=128))
    model.to(torch.bfloat16).save_pretrained(folder)


class Engine:
    """vLLM's `LLM` with a scenario's settings, and its prompts."""

    def __init__(self, scenario: Scenario, model: str) -> None:
        from vllm import LLM

        if scenario.workspace_tokens:
            from vllm.model_executor.layers.attention import mla_attention

            mla_attention.MLACommonMetadataBuilder.determine_chunked_prefill_workspace_size = (
                staticmethod(lambda _: scenario.workspace_tokens)
            )
        settings = {
            "skip_tokenizer_init": True,
            "enforce_eager": True,
            "max_model_len": 12288,
            "max_num_batched_tokens": 2048,
            "enable_chunked_prefill": True,
            "enable_prefix_caching": False,
            "gpu_memory_utilization": 0.25,
            "seed": 0,
        }
        self.llm = LLM(model=model, **settings | scenario.engine)
        self.scenario = scenario
        random = torch.Generator().manual_seed(1)

        def tokens(count: int) -> list[int]:
            drawn: list[int] = torch.randint(VOCABULARY, (count,), generator=random).tolist()
            return drawn

        self.prompts = [{"prompt_token_ids": ids} for ids in scenario.prompts(tokens)]

    def answer(self) -> Answers:
        """Greedy tokens and their log-probabilities, nothing of an earlier round being cached."""
        from vllm import SamplingParams

        self.llm.reset_prefix_cache()
        sampling = SamplingParams(
            temperature=0.0,
            max_tokens=self.scenario.new_tokens,
            ignore_eos=True,
            logprobs=1,
            detokenize=False,
        )
        outputs = self.llm.generate(self.prompts, sampling, use_tqdm=False)
        return [
            [
                (token, logprobs[token].logprob)
                for token, logprobs in zip(one.token_ids, one.logprobs, strict=True)
            ]
            for one in (output.outputs[0] for output in outputs)
        ]

    @contextlib.contextmanager
    def timed_steps(self, steps: list[float]) -> Iterator[None]:
        """Note each step's microseconds."""
        engine = self.llm.llm_engine
        step = engine.step

        def timed() -> Any:
            begin = time.perf_counter_ns()
            answer = step()
            steps.append((time.perf_counter_ns() - begin) / 1e3)
            return answer

        engine.step = timed
        try:
            yield
        finally:
            engine.step = step


def differences(ours: Answers, theirs: Answers) -> dict[str, Any]:
    """How many tokens are the same, and how far the log-probabilities are apart until one is not.

    After the first other token, two answers are answers to two questions.
    """
    same, compared, tokens, largest = 0, 0, 0, 0.0
    for one, other in zip(ours, theirs, strict=True):
        tokens += len(one)
        same += sum(a[0] == b[0] for a, b in zip(one, other, strict=True))
        for (token, logprob), (their_token, their_logprob) in zip(one, other, strict=True):
            if token != their_token:
                break
            compared += 1
            largest = max(largest, abs(logprob - their_logprob))
    return {
        "tokens": tokens,
        "same_tokens": same,
        "compared_logprobs": compared,
        "largest_logprob_difference": largest,
    }


def check_round(engine: Engine) -> tuple[list[dict[str, Any]], Answers]:
    """Check every call; for each kind of call and each result, how far off ours and theirs were at
    the most, and how often ours was further off.
    """
    calls: list[Checked] = []
    with standing_in(checking(calls)):
        answers = engine.answer()
    kinds: dict[Kind, list[Checked]] = {}
    for call in calls:
        kinds.setdefault(call.kind, []).append(call)
    return [
        {"case": engine.scenario.name_of(kind.has_output_lse), "result": result}
        | kind._asdict()
        | {"tokens": sorted({call.tokens for call in alike})}
        | compared([getattr(call.ours, result) for call in alike],
                   [getattr(call.theirs, result) for call in alike])
        for kind, alike in kinds.items()
        for result in Errors._fields[: 1 + kind.has_output_lse]
    ], answers  # fmt: skip


def compared(ours: list[float], theirs: list[float]) -> dict[str, Any]:
    excess = [mine - other for mine, other in zip(ours, theirs, strict=True)]
    return {
        "calls": len(ours),
        "ours": max(ours),
        "vllm": max(theirs),
        "further_off": sum(one > 0 for one in excess),
        "largest_excess": max(0.0, *excess),
    }


def timed_round(engine: Engine, merge: Merge) -> tuple[dict[str, Any], Answers]:
    calls: list[tuple[bool, float]] = []
    steps: list[float] = []
    with standing_in(timing(merge, calls)), engine.timed_steps(steps):
        answers = engine.answer()
    by_kind: dict[str, list[float]] = {}
    for has_lse, us in calls:
        by_kind.setdefault(engine.scenario.name_of(has_lse), []).append(us)
    return {"calls_us": by_kind, "steps_us": steps}, answers


def profiled_round(engine: Engine, merge: Merge) -> dict[str, float]:
    """GPU microseconds of the merge's kernels and of all, and how many merges there were."""
    from torch.profiler import ProfilerActivity, profile

    with standing_in(merge), profile(activities=[ProfilerActivity.CUDA]) as profiler:
        engine.answer()
    kernels = [event for event in profiler.key_averages() if event.device_time_total > 0]
    merges = [event for event in kernels if "merge_attn_states" in event.key]
    return {
        "all_us": sum(event.self_device_time_total for event in kernels),
        "merge_us": sum(event.self_device_time_total for event in merges),
        "merges": sum(event.count for event in merges),
    }


def with_plugin() -> contextlib.AbstractContextManager[Merge]:
    return contextlib.nullcontext(patched())


def run(scenario: Scenario, model: str) -> dict[str, Any]:
    from merge_attn_states.integrations import vllm as plugin

    engine = Engine(scenario, model)
    first = engine.answer()
    state = plugin.status()
    found = {"title": scenario.title, "plugin": state._asdict(), "first": first}
    if not state.active:  # taken off: that is all there is to see
        return found
    checked, checked_answers = check_round(engine)
    rounds: dict[str, list[dict[str, Any]]] = {"ours": [], "vllm": []}
    answers: dict[str, list[Answers]] = {"ours": [], "vllm": []}
    providers = {"ours": with_plugin, "vllm": unpatched}
    for index in range(1 + ROUNDS):  # the first warms up
        for provider in sorted(providers, reverse=bool(index % 2)):
            with providers[provider]() as merge:
                one, answer = timed_round(engine, merge)
            if index:
                rounds[provider].append(one)
                answers[provider].append(answer)
    profiled = {}
    for provider, around in providers.items():
        with around() as merge:
            profiled[provider] = profiled_round(engine, merge)
    with standing_in(merging_in_float64):
        exact = engine.answer()
    ours, theirs = answers["ours"], answers["vllm"]
    return found | {
        "checked": checked,
        "rounds": rounds,
        "profiled": profiled,
        "answers": {"ours": ours[0], "vllm": theirs[0], "float64": exact},
        "differences": {
            "with the plugin, and without": differences(ours[0], theirs[0]),
            "with the plugin, and a float64 merge": differences(ours[0], exact),
            "without it, and a float64 merge": differences(theirs[0], exact),
            "with the plugin, twice": differences(ours[0], ours[-1]),
            "without it, twice": differences(theirs[0], theirs[-1]),
            "with the plugin, watched and not": differences(first, checked_answers),
        },
        "fallbacks": plugin.status().fallbacks,
        "dispatcher": inspect.unwrap(patched()).__module__,
        "vllm": vllm_op.version(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("name", choices=SCENARIOS)
    parser.add_argument("model", help="the model's folder")
    options = parser.parse_args()
    scenario = SCENARIOS[options.name]
    os.environ.update(ENVIRONMENT | scenario.environment)
    print(json.dumps(run(scenario, options.model)))


if __name__ == "__main__":
    main()
