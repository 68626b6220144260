"""Arguments of vLLM that a recipe passes through: ``rollout.engine.vllm``."""

from __future__ import annotations

import ast
import difflib
import importlib.util
from collections.abc import Mapping
from functools import cache
from pathlib import Path

#: What this project decides, and why a recipe must not.
OURS = {
    "model": "model.path names the model",
    "tokenizer": "the model's folder has it",
    "served_model_name": "the engine serves nobody else",
    "seed": "every request brings its own",
    "dtype": "use rollout.engine.dtype",
    "max_model_len": "use rollout.engine.max_model_len",
    "max_num_seqs": "use rollout.engine.max_num_seqs",
    "max_num_batched_tokens": "use rollout.engine.max_num_batched_tokens",
    "kv_cache_memory_bytes": "use rollout.engine.kv_cache_memory_bytes",
    "gpu_memory_utilization": "use rollout.engine.gpu_memory_utilization",
    "enforce_eager": "use rollout.engine.enforce_eager",
    "tensor_parallel_size": "use rollout.engine.tensor_parallel_size",
    "pipeline_parallel_size": "an engine is one stage; use rollout.engine.tensor_parallel_size",
    "data_parallel_size": "use rollout.workers",
    "quantization": "use rollout.engine.quantization",
    "block_size": "use rollout.engine.block_size",
    "limit_mm_per_prompt": "use rollout.engine.media_per_prompt",
    "generation_config": "sampling is the recipe's alone",
    "override_generation_config": "sampling is the recipe's alone",
    "logprobs_mode": "log-probabilities must be the learner's",
    "max_logprobs": "log-probabilities must be the learner's",
    "async_scheduling": "use rollout.engine.async_scheduling",
    "speculative_config": "log-probabilities must be the learner's",
    "disable_log_stats": "metrics are the run's",
    "mm_processor_cache_gb": "use rollout.engine.prompt_cache_bytes",
    "mm_processor_kwargs": "pixel bounds are passed with each prompt",
    "worker_extension_cls": "the sampler lives there",
    "weight_transfer_config": "use weights.transport",
    "load_format": "weights come from the checkpoint",
    "skip_tokenizer_init": "completions are decoded",
    "enable_lora": "use learner.lora",
    "max_lora_rank": "use learner.lora.rank",
    "max_loras": "four versions run at once",
    "max_cpu_loras": "four versions run at once",
    "lora_dtype": "an adapter has the type of the model",
    "lora_target_modules": "use learner.lora.targets",
    "default_mm_loras": "every request runs with its version's adapter",
    "enable_tower_connector_lora": "adapters on towers and projectors are merged",
    "enable_mixed_moe_lora_format": "routed experts get no adapter",
    "enable_moe_shared_loras": "routed experts get no adapter",
    "max_lora_cls_labels": "a policy has no classification head",
    "enable_sleep_mode": "use resources.colocate",
    "enable_return_routed_experts": "use learner.router: replay",
    "aux_output_config": "use learner.router: replay",
    "ec_transfer_config": "use rollout.stored_embeddings",
}
#: That shape how adapters run, and are yours to set where rollouts take adapters.
OF_ADAPTERS = frozenset({"fully_sharded_loras", "specialize_active_lora"})


def check_arguments(given: Mapping[str, object]) -> None:
    """Raises ValueError for an argument that is ours, or that the installed vLLM does not have."""
    for name in given:
        if name in OURS:
            raise ValueError(f"vllm.{name} is not yours to set: {OURS[name]}")
        known = argument_names()
        if known and name not in known:
            near = difflib.get_close_matches(name, known - OURS.keys(), 1)
            raise ValueError(
                f"vllm.{name} is no argument of the installed vLLM (EngineArgs)"
                + (f": did you mean {near[0]}?" if near else ": look at `vllm serve --help`")
            )


@cache
def argument_names() -> frozenset[str]:
    """Fields of vLLM's EngineArgs, read from its source: to import it takes 13 s. Empty where it is
    not installed."""
    found = importlib.util.find_spec("vllm")
    if found is None or not found.submodule_search_locations:
        return frozenset()
    source = Path(found.submodule_search_locations[0]) / "engine" / "arg_utils.py"
    if not source.is_file():
        return frozenset()
    for node in ast.parse(source.read_text()).body:
        if isinstance(node, ast.ClassDef) and node.name == "EngineArgs":
            return frozenset(
                item.target.id
                for item in node.body
                if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
            )
    return frozenset()
