"""The engines that are started: their models, settings and prompts."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

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
    merges: tuple[str, ...] = ("MLA final merge",)  # its calls: without an output_lse, and with
    ranks: int = 1  # GPUs, each with a worker of its own; more than one merge across them
    graphs: bool = False  # compiled, with CUDA graphs

    def name_of(self, has_output_lse: bool) -> str:
        """What a call is called; there may be ones that nobody expected."""
        return self.merges[has_output_lse] if has_output_lse < len(self.merges) else "unexpected"


def long_prompts(random: Callable[[int], list[int]]) -> list[list[int]]:
    return [random(tokens) for tokens in (9000, 6000, 3000, 5000)]


def shared_prefix(random: Callable[[int], list[int]]) -> list[list[int]]:
    prefix = random(2048)
    return [[*prefix, *random(16 + i)] for i in range(16)]


def of_many_lengths(random: Callable[[int], list[int]]) -> list[list[int]]:
    return [random(tokens) for tokens in (3000, 1500, 700, 300, 200, 100, 50, 33)]


def across_ranks(backend: str, graphs: bool) -> Scenario:
    """Decode context parallelism: each layer of each decode step merges once."""
    parallel = {
        "tensor_parallel_size": 2,
        "decode_context_parallel_size": 2,
        "dcp_comm_backend": backend,
        "distributed_executor_backend": "mp",
        "max_num_seqs": 16,
    }
    return Scenario(
        f"MLA on two GPUs, {backend}, {'CUDA graphs' if graphs else 'eager'}",
        "deepseek-32",
        of_many_lengths,
        32,
        parallel,
        {"VLLM_WORKER_MULTIPROC_METHOD": "fork"},
        merges=("merge across ranks",),
        ranks=2,
        graphs=graphs,
    )


SCENARIOS = {
    "final": Scenario("MLA, prompts longer than a step", "deepseek", long_prompts, 8),
    "chunks": Scenario(
        "MLA, contexts longer than the workspace",
        "deepseek",
        long_prompts,
        8,
        {"max_num_seqs": 16},
        workspace_tokens=2048,
        merges=("MLA final merge", "MLA chunk loop"),
    ),
    "cascade": Scenario(
        "cascade attention, 16 prompts with one prefix",
        "llama",
        shared_prefix,
        16,
        {"disable_cascade_attn": False, "enable_prefix_caching": True},
        {"VLLM_USE_V2_MODEL_RUNNER": "0"},
        merges=("cascade",),
    ),
    "ranks-ag_rs": across_ranks("ag_rs", graphs=False),
    "ranks-a2a": across_ranks("a2a", graphs=False),
    "ranks-ag_rs-graphs": across_ranks("ag_rs", graphs=True),
    "ranks-a2a-graphs": across_ranks("a2a", graphs=True),
}
ENVIRONMENT = {
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
WATCHED = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}  # an engine whose calls can be watched
AS_SERVED = {"VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}  # a worker is asked for the plugin's status
VOCABULARY = 4096
LAYERS = 4


def save_model(name: str, folder: Path) -> None:
    """A model with random weights, small but with heads as real ones have them.

    "deepseek-32" has 32 heads, others 16.
    """
    import transformers

    kind, _, heads = name.partition("-")
    common: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 2048,
        "intermediate_size": 4096,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": int(heads or 16),
        "num_key_value_heads": int(heads or 16),
        "max_position_embeddings": 16384,
        "initializer_range": 0.06,
    }
    torch.manual_seed(0)
    if kind == "deepseek":
        latent = {"kv_lora_rank": 512, "q_lora_rank": None, "v_head_dim": 128}
        widths = {"qk_nope_head_dim": 128, "qk_rope_head_dim": 64}
        config = transformers.DeepseekV2Config(
            **common, **latent, **widths, first_k_dense_replace=LAYERS, n_routed_experts=4
        )
        model = transformers.DeepseekV2ForCausalLM(config)
    else:
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**common, head_dim=128))
    model.to(torch.bfloat16).save_pretrained(folder)


def _plugin_status(worker: Any) -> dict[str, Any]:
    from merge_attn_states.integrations import vllm as plugin

    return plugin.status()._asdict()


class Engine:
    """vLLM's `LLM` with a scenario's settings, and its prompts.

    As served: compiled, with CUDA graphs, and in a process of its own, as vLLM does by default.
    """

    def __init__(self, scenario: Scenario, model: str, as_served: bool = False) -> None:
        from vllm import LLM

        if scenario.workspace_tokens:
            from vllm.model_executor.layers.attention import mla_attention

            mla_attention.MLACommonMetadataBuilder.determine_chunked_prefill_workspace_size = (
                staticmethod(lambda _: scenario.workspace_tokens)
            )
        settings = {
            "skip_tokenizer_init": True,
            "enforce_eager": not (as_served or scenario.graphs),
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

    def plugin_in_worker(self) -> dict[str, Any]:
        """The plugin's status in the processes that merge.

        Raises
        ------
        SystemExit
            It is not the same in all of them.
        """
        state, *others = self.in_workers(_plugin_status)
        if any(other != state for other in others):
            raise SystemExit(f"benchmarks: workers differ: {state}, {others}")
        return dict(state)

    def in_workers(self, function: Callable[..., Any], *args: object) -> list[Any]:
        """What a function returns in each of them, called with the worker and `args`."""
        answers: list[Any] = self.llm.collective_rpc(function, args=args)
        return answers

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
