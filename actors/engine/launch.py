"""From EngineConfig to a vLLM start: environment, engine arguments, the tokens to sample from."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from avatar_rl.actors.config import EngineConfig
from avatar_rl.actors.engine.vllm_plugin.routes import KEY
from avatar_rl.common.errors import ModelError, ResourceError
from avatar_rl.common.process import sees_gpu
from avatar_rl.common.weight_files import loadable_folder
from avatar_rl.prompts.encoding.rope import MULTIMODAL, OMNI

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: Where a CPU engine's config leaves them open.
CPU_KV_CACHE_BYTES = 256 << 20
CPU_BLOCK_SIZE = 32
#: Tokens of a step on a GPU: vLLM's own default for an engine like ours, 2,048, halves the speed of
#: long prompts.
GPU_BATCHED_TOKENS = 8192


def pick_device(config: EngineConfig) -> str:
    """The engine's device, "cpu" or "cuda".

    Raises ResourceError when a GPU is asked for and absent, or vLLM is not installed.
    """
    if importlib.util.find_spec("vllm") is None:
        raise ResourceError("vLLM is not installed: pip install -e '.[cpu]' or '.[gpu]'")
    import torch

    if config.device == "cuda" and not torch.cuda.is_available():
        raise ResourceError(
            "engine.device is cuda but torch sees no GPU: check the driver, or set device to cpu"
        )
    device = config.device if config.device != "auto" else ("cuda" if sees_gpu() else "cpu")
    if device == "cpu" and config.quantization is not None:
        raise ResourceError(
            f"rollout.engine.quantization {config.quantization} needs a GPU: set it to null"
        )
    if device == "cpu" and config.async_scheduling:
        raise ResourceError(
            "rollout.engine.async_scheduling needs a GPU, vLLM's CPU build has none: set it to "
            "false"
        )
    if device == "cuda" and config.tensor_parallel_size > torch.cuda.device_count():
        raise ResourceError(
            f"tensor_parallel_size {config.tensor_parallel_size} needs as many GPUs in the actor, "
            f"which sees {torch.cuda.device_count()}: lower it, or raise resources.rollout_gpus"
        )
    return device


def check_heads(model_path: Path, shares: int) -> None:
    """Raises ModelError when the attention heads of a model do not divide by ``shares``."""
    settings = json.loads((model_path / "config.json").read_text())
    while "text_config" in settings or "thinker_config" in settings:
        settings = settings.get("thinker_config") or settings["text_config"]
    heads = settings.get("num_attention_heads")
    if not isinstance(heads, int):
        return
    pairs = settings.get("num_key_value_heads") or heads  # of keys and values; may be copied, too
    fitting = [n for n in range(1, heads + 1) if not heads % n and (not pairs % n or not n % pairs)]
    if shares not in fitting:
        raise ModelError(
            f"model folder {model_path}: {heads} attention heads ({pairs} of keys and values) do "
            f"not divide by tensor_parallel_size {shares}: set it to one of "
            f"{', '.join(map(str, fitting))}"
        )


def prepare_environment(config: EngineConfig, device: str) -> None:
    """Set what vLLM reads from the environment while it is imported. A value the user set wins."""
    settings = {
        "HF_HUB_OFFLINE": "1",  # model folders are local
        "VLLM_NO_USAGE_STATS": "1",
        # in this process: weights and tokens cross no boundary
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_USE_V2_MODEL_RUNNER": "0",  # its sampler cannot be replaced by ours
        "VLLM_LOGGING_LEVEL": "WARNING",
    }
    if device == "cpu":
        settings |= {
            "TORCH_COMPILE_DISABLE": "1",  # else the sampler is compiled: 36 s at the first request
            "OMP_NUM_THREADS": str(config.threads),
            # several engines on a machine would all bind to core 0
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        }
        if "vllm" not in sys.modules:
            import torch

            torch.set_num_threads(config.threads)
    for name, value in settings.items():
        os.environ.setdefault(name, value)


def quieten() -> None:
    """Silence three vLLM warnings that say nothing: one per prompt with media, three per weight
    update, one per layer of a tower.

    Call it after vLLM's import and again after its start: both reset the levels of its loggers.
    """
    # "torch.set_num_threads after the thread binding": the thread count is what we set it to.
    logging.getLogger("vllm.v1.worker.cpu_worker").setLevel(logging.ERROR)
    # "RotaryEmbedding: Failed to load weights": of modules that have none in a checkpoint;
    # WeightContract has checked that none is missing.
    logging.getLogger("vllm.model_executor.model_loader.reload.layerwise").setLevel(logging.ERROR)
    # "visual.blocks.0.attn.qkv will be ignored": a tower's adapter is merged.
    logging.getLogger("vllm.lora.model_manager").setLevel(logging.ERROR)


def engine_arguments(
    model_path: Path, kind: str, config: EngineConfig, device: str
) -> dict[str, Any]:
    """Keyword arguments of vLLM's EngineArgs."""
    cpu = device == "cpu"
    arguments: dict[str, Any] = {
        "model": str(loadable_folder(model_path)),
        "dtype": config.dtype_on(device),
        "max_model_len": config.max_model_len,
        "max_num_seqs": config.sequences_on(device),
        "enforce_eager": cpu if config.enforce_eager is None else config.enforce_eager,
        "tensor_parallel_size": config.tensor_parallel_size,
        "seed": 0,  # every request brings its own
        "generation_config": "vllm",  # sampling is ours alone, never the folder's defaults
        "logprobs_mode": "raw_logprobs",  # RolloutSampler decides what that means
        # vLLM would choose it on a GPU. RolloutEngine.adopt keeps versions exact with it.
        "async_scheduling": config.async_scheduling,
        "disable_log_stats": True,
        "mm_processor_cache_gb": 0,  # PromptCache keeps whole prompts
        "worker_extension_cls": "avatar_rl.actors.engine.vllm_plugin.worker.WorkerExtension",
    }
    if kind in MULTIMODAL:
        kinds = ("image", "video", "audio") if kind in OMNI else ("image", "video")
        arguments["limit_mm_per_prompt"] = dict.fromkeys(kinds, config.media_per_prompt)
    sizes = {
        "kv_cache_memory_bytes": config.kv_cache_memory_bytes,
        "max_num_batched_tokens": config.max_num_batched_tokens,
        "block_size": config.block_size,
    }
    if cpu:
        sizes = {
            "kv_cache_memory_bytes": config.kv_cache_memory_bytes or CPU_KV_CACHE_BYTES,
            "max_num_batched_tokens": max(config.max_num_batched_tokens or 0, config.max_model_len),
            "block_size": config.block_size or CPU_BLOCK_SIZE,
        }
        # A partial prefill rewinds the request's generator, which CPU generators cannot do.
        arguments |= {"enable_chunked_prefill": False, "skip_mm_profiling": True}
    else:
        arguments["gpu_memory_utilization"] = config.gpu_memory_utilization
        sizes["max_num_batched_tokens"] = config.max_num_batched_tokens or GPU_BATCHED_TOKENS
        if config.quantization is not None:
            arguments["quantization"] = config.quantization
    arguments |= {name: size for name, size in sizes.items() if size is not None}
    return arguments | config.vllm


def sleep_arguments(device: str) -> dict[str, Any]:
    """Further arguments of an engine that sleeps while the learner has its device.

    vLLM refuses to start when less than its share of the GPU is free. Here keys and values have
    their bytes by name, and the memory plan has been checked: nothing is left for it to judge. On a
    CPU it has no sleep mode.
    """
    return {} if device == "cpu" else {"enable_sleep_mode": True, "gpu_memory_utilization": 0.01}


def recording_arguments(arguments: dict[str, Any]) -> dict[str, Any]:
    """Further arguments of an engine that records which experts tokens take."""
    return {"additional_config": (arguments.get("additional_config") or {}) | {KEY: True}}


def model_kind(model_path: Path) -> str:
    """``model_type`` of a model folder. Raises ModelError without a config."""
    file = model_path / "config.json"
    if not file.is_file():
        raise ModelError(
            f"model folder {model_path} has no config.json: give a Hugging Face checkpoint folder"
        )
    return str(json.loads(file.read_text()).get("model_type", ""))


def stop_token_ids(model_path: Path, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Tokens that end a turn: the tokenizer's and those of generation_config.json.

    Raises ModelError when there is none.
    """
    found = {tokenizer.eos_token_id}
    file = model_path / "generation_config.json"
    if file.is_file():
        declared = json.loads(file.read_text()).get("eos_token_id", [])
        found |= set(declared if isinstance(declared, list) else [declared])
    found.discard(None)
    if not found:
        raise ModelError(
            f"model folder {model_path} names no end-of-turn token: set eos_token in its tokenizer"
        )
    return frozenset(int(token) for token in found)


def forbidden_token_ids(
    tokenizer: PreTrainedTokenizerBase, stop_ids: frozenset[int], vocabulary: int
) -> list[int]:
    """Tokens that a completion must not hold, sorted.

    They are the special tokens but the stop tokens, media placeholders among them, and the rows
    that pad the embedding beyond the tokenizer. A barely trained model does sample them, and the
    learner's forward then fails for want of media.
    """
    special = set(tokenizer.all_special_ids)
    special |= {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    padding = set(range(len(tokenizer), vocabulary))
    return sorted(token for token in (special | padding) - stop_ids if token < vocabulary)
