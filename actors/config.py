"""Config sections of the rollout floor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field, JsonValue, StringConstraints, field_validator, model_validator

from avatar_rl.actors.vllm_arguments import check_arguments
from avatar_rl.common.config import Section

#: Completions that are decoded together, where a recipe leaves it open.
CPU_SEQUENCES, GPU_SEQUENCES = 64, 256


#: Processes of an actor on a GPU that prepare prompts, and cores of the machine for each.
MEDIA_WORKERS, CORES_PER_WORKER = 2, 4


#: Stored embeddings that an actor holds ready (rollout.stored_embeddings).
HELD_BYTES = 1 << 30


def default_sequences(device: str) -> int:
    """Of an engine on "cpu" or "cuda"."""
    return CPU_SEQUENCES if device == "cpu" else GPU_SEQUENCES


class SamplingConfig(Section):
    """How completions are drawn. ``temperature: 0`` is greedy."""

    REMOVED: ClassVar[Mapping[str, str]] = {
        "n": "loop.fresh and loop.replayed say how many completions a prompt gets"
    }

    temperature: float = Field(
        1.0, ge=0, le=2, description="Softmax temperature; 0 picks the most likely token."
    )
    top_p: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Nucleus mass; below 1 tokens are drawn from a truncated distribution.",
    )
    top_k: int = Field(
        0,
        ge=0,
        description="Draw among the k most likely tokens only; 0 means all. Truncates as top_p "
        "does.",
    )
    max_tokens: int = Field(
        2048, ge=1, description="Longest completion, end-of-turn token included."
    )
    min_tokens: int = Field(
        0, ge=0, description="End of turn is suppressed before this many tokens."
    )
    stop: tuple[Annotated[str, StringConstraints(min_length=1)], ...] = Field(
        (),
        description="Strings that end a completion, beside the model's own end of turn: base "
        "models need them, e.g. ['</answer>'].",
    )
    ignore_eos: bool = Field(
        False, description="Generate max_tokens whatever comes; for benchmarks."
    )

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @model_validator(mode="after")
    def _check(self) -> SamplingConfig:
        if self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens {self.min_tokens} is above max_tokens {self.max_tokens}")
        return self


class RequestSampling(SamplingConfig):
    """How the completions of one request are drawn, and how many. Not a part of a recipe."""

    n: int = Field(1, ge=1, description="Completions of the request.")

    @classmethod
    def of(
        cls,
        config: SamplingConfig,
        n: int,
        *,
        temperature: float | None = None,
        max_tokens: int | None = None,
    ) -> RequestSampling:
        """``n`` completions as ``config`` has it, but for what is given."""
        given = {"temperature": temperature, "max_tokens": max_tokens}
        changed = {name: value for name, value in given.items() if value is not None}
        return cls.model_construct(**(dict(config) | changed | {"n": n}))

    @model_validator(mode="after")
    def _check_count(self) -> RequestSampling:
        if self.temperature == 0 and self.n > 1:
            raise ValueError(
                f"temperature 0 gives {self.n} equal completions: set n to 1 or a temperature "
                "above 0"
            )
        return self


class EngineConfig(Section):
    """One vLLM engine. Null means: what suits the device."""

    ALIASES: ClassVar[Mapping[str, str]] = {"adopt_mode": "weight_update"}
    REMOVED: ClassVar[Mapping[str, str]] = {
        "seed": "every request brings a seed of its own, which follows from the recipe's `seed`"
    }

    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="Where the engine runs; auto takes a GPU if any."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="Weights and activations; auto is bfloat16 on a GPU, float32 on a CPU (faster "
        "there).",
    )
    max_model_len: int = Field(
        16_384, ge=16, description="Longest prompt plus completion, in tokens."
    )
    max_num_seqs: int | None = Field(
        None,
        ge=1,
        description="Completions that are decoded together; null is 256 on a GPU, 64 on a CPU.",
    )
    max_num_batched_tokens: int | None = Field(
        None,
        ge=16,
        description="Tokens of one engine step; null is 8,192 on a GPU (16,384 suits 80 GB), "
        "max_model_len on a CPU.",
    )
    kv_cache_memory_bytes: int | None = Field(
        None,
        ge=1 << 20,
        description="KV cache size; null is what gpu_memory_utilization leaves, 256 MiB on a CPU.",
    )
    gpu_memory_utilization: float = Field(
        0.85, gt=0, lt=1, description="Share of the GPU's memory the engine may use."
    )
    quantization: Literal["fp8"] | None = Field(
        None,
        description="fp8: rollouts compute in FP8 (a GPU of compute capability 8.9 or newer); "
        "versions come in bfloat16 and are quantised by vLLM as they load. Needs "
        "old_logprobs other than behaviour, and a probe.tolerance.",
    )
    enforce_eager: bool | None = Field(
        None,
        description="No CUDA graphs and no compilation; null is false on a GPU, true on a CPU.",
    )
    tensor_parallel_size: int = Field(1, ge=1, description="GPUs the model is split over.")
    block_size: int | None = Field(
        None,
        ge=8,
        description="Tokens per KV block, the grain of prefix sharing; null is vLLM's choice, 32 "
        "on a CPU.",
    )
    media_per_prompt: int = Field(
        8, ge=1, description="Most images, videos or audios of one prompt, each kind."
    )
    prompt_cache_bytes: int = Field(
        1 << 30,
        ge=0,
        description="Preprocessed prompts kept for their next visit, in bytes; 0 preprocesses "
        "each time.",
    )
    media_workers: int | None = Field(
        None,
        ge=0,
        description="Processes per actor that decode and preprocess the media of coming prompts "
        "ahead of the engine; 0 does it in the actor; null is 2 on a GPU (1 on a machine of fewer "
        "than 8 cores), 0 on a CPU, whose cores the engine has.",
    )
    weight_update: Literal["drain", "keep"] = Field(
        "keep",
        description="keep: requests in flight continue with new weights (their context is "
        "prefilled again); drain: new weights wait until the engine is idle.",
    )
    async_scheduling: bool = Field(
        False,
        description="On a GPU: vLLM schedules a step while the one before computes. Versions stay "
        "exact; equal seeds no longer give equal completions across an update of the weights.",
    )
    threads: int = Field(1, ge=1, description="CPU threads of the engine; ignored on a GPU.")
    vllm: dict[str, JsonValue] = Field(
        {},
        description="Further arguments of vLLM's EngineArgs, such as `enable_expert_parallel: "
        "true`. Those that this project decides are refused.",
    )

    @field_validator("vllm")
    @classmethod
    def _check_arguments(cls, given: dict[str, JsonValue]) -> dict[str, JsonValue]:
        check_arguments(given)
        return given

    def sequences_on(self, device: str) -> int:
        """``max_num_seqs``, resolved for "cpu" or "cuda"."""
        return self.max_num_seqs or default_sequences(device)

    def media_workers_on(self, device: str, *, cores: int) -> int:
        """``media_workers``, resolved for a machine with ``cores``."""
        if self.media_workers is not None:
            return self.media_workers
        return 0 if device == "cpu" else min(MEDIA_WORKERS, cores // CORES_PER_WORKER)

    def dtype_on(self, device: str) -> str:
        """``dtype``, resolved for "cpu" or "cuda"."""
        if self.dtype != "auto":
            return self.dtype
        return "float32" if device == "cpu" else "bfloat16"
