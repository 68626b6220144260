"""What the rollout engine needs inside vLLM's workers: log-probabilities and a vocabulary like the
learner's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.sampler import Sampler

from avatar_rl.actors.engine.vllm_plugin.links import open_link
from avatar_rl.buffer_service.weights.member import Member, MemberSettings
from avatar_rl.buffer_service.weights.receiver import WeightContract

if TYPE_CHECKING:
    from vllm.config.model import LogprobsMode
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.worker_manager import WorkerLoRAManager
    from vllm.v1.outputs import SamplerOutput
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    from avatar_rl.actors.engine.vllm_plugin.routes import Routes


class RolloutSampler(Sampler):
    """Gives log softmax(logits / temperature) over the whole vocabulary, as the learner computes.

    vLLM offers log-probabilities either before the temperature or after every restriction
    (forbidden tokens, top-k, top-p). Tokens in ``forbidden`` are never drawn. Like top-k and top-p
    that restriction is not in the log-probability, so an on-policy ratio is exactly 1.
    """

    def __init__(self, stock: Sampler, forbidden: Tensor) -> None:
        super().__init__(stock.logprobs_mode, stock.use_fp64_gumbel)
        self.forbidden = forbidden  # (F,) int64 token ids
        # (B,) of the step that is being sampled; None when all are greedy
        self._temperature: Tensor | None = None

    def forward(
        self,
        logits: Tensor,
        sampling_metadata: SamplingMetadata,
        predict_bonus_token: bool = False,
        logprobs_mode_override: LogprobsMode | None = None,
    ) -> SamplerOutput:
        """As the stock sampler; notes the temperatures for ``compute_logprobs``."""
        self._temperature = sampling_metadata.temperature
        return super().forward(
            logits, sampling_metadata, predict_bonus_token, logprobs_mode_override
        )

    # Static in the base class, which calls it on self.
    def compute_logprobs(self, logits: Tensor) -> Tensor:  # type: ignore[override]
        """(B, V) log-probabilities of logits (B, V) at each row's temperature."""
        if self._temperature is not None:
            greedy = self._temperature < 1e-5  # their temperature is next to 0: use 1
            logits = logits.float() / torch.where(greedy, 1.0, self._temperature)[:, None]
        if logits.is_cuda:
            return logits.log_softmax(dim=-1, dtype=torch.float32)
        # A CPU's log_softmax adds word to word: of 262k words the unlikely ones fall below the
        # sum's last digit, and log-probabilities come out 4e-5 too high. This adds in a tree.
        logits = logits.float()
        return logits - logits.logsumexp(dim=-1, keepdim=True)

    def apply_logits_processors(
        self, logits: Tensor, sampling_metadata: SamplingMetadata, predict_bonus_token: bool
    ) -> Tensor:
        """As the stock sampler; then ``forbidden`` tokens get no probability."""
        logits = super().apply_logits_processors(logits, sampling_metadata, predict_bonus_token)
        return logits.index_fill_(1, self.forbidden, float("-inf"))


def _lora_model(
    manager: WorkerLoRAManager, version: int, tensors: dict[str, Tensor], settings: dict[str, Any]
) -> LoRAModel:
    """What vLLM makes of an adapter's folder, from its tensors. Anew for each call, with copies of
    its own: vLLM multiplies them by their scale in place when it takes them in."""
    from vllm.lora.peft_helper import PEFTHelper

    model = manager._adapter_manager.model
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    return manager._lora_model_cls.from_lora_tensors(
        version,
        {name: tensor.clone() for name, tensor in tensors.items()},
        PEFTHelper.from_dict(settings),
        device="cpu",
        dtype=cast("torch.dtype", manager.lora_config.lora_dtype),
        model_vocab_size=manager.vocab_size,
        weights_mapper=None if mapper is None else mapper.get_rename_mapper(),
        skip_prefixes=getattr(model, "lora_skip_prefixes", None),
    )


def _cache_tensors(caches: object) -> Iterator[Tensor]:
    """Keys and values of the layers; some kinds of layers have a list each."""
    if isinstance(caches, Tensor):
        yield caches
    elif isinstance(caches, list | tuple):
        for cache in caches:
            yield from _cache_tensors(cache)


class WorkerExtension:
    """Mixed into vLLM's worker (``worker_extension_cls``)."""

    model_runner: GPUModelRunner  # of which the CPU's is a kind
    rank: int
    reload_weights: Callable[..., None]  # the worker's own

    def adopt_weights(self, weights: list[tuple[str, Tensor]]) -> None:
        """Load ``weights`` (published names, all of them) in place, and leave no packed copy of
        what was there before.

        On a CPU vLLM multiplies with packed copies of its matrices. An update packs again what it
        has loaded: not a head that is tied to the embeddings, for which no tensor comes. Raises
        RuntimeError naming a layer that would go on with the weights of before.
        """
        packed = {
            name: (module, module.cpu_linear)
            for name, module in self.model_runner.get_model().named_modules()
            if hasattr(module, "cpu_linear")
        }
        self.reload_weights(weights_iterator=weights)
        for name, (module, before) in packed.items():
            if module.cpu_linear is not before:
                continue
            if module.weight.numel() == 0:  # it has its packed copy only
                raise RuntimeError(f"layer {name!r} kept the weights of before the update")
            module.quant_method.process_weights_after_loading(module)

    def free_caches(self) -> None:
        """On a CPU, where vLLM has no sleep mode: give back the memory of keys and values."""
        held = {
            tensor.data_ptr(): (tensor, tensor.untyped_storage().nbytes())
            for tensor in _cache_tensors(self.model_runner.kv_caches)
        }
        self.__dict__["_caches"] = list(held.values())
        for tensor, _ in held.values():
            tensor.untyped_storage().resize_(0)

    def restore_caches(self) -> None:
        """Take it again; keys and values are zeros, as after the start."""
        for tensor, size in self.__dict__.pop("_caches", []):
            tensor.untyped_storage().resize_(size)
            tensor.zero_()

    def join_transfers(self, transport: str, settings: MemberSettings, model: Path) -> str:
        """Take versions by ``transport`` from now on, beside the running model. Returns this
        member's name. ``model``: the folder whose tensors a version must have."""
        settings = replace(settings, name=f"{settings.name}/{self.rank}")
        staging, link = open_link(transport, self.model_runner)
        check = WeightContract(model).check
        member = self.__dict__["_member"] = Member(settings, staging, link, check=check)
        member.start()
        return settings.name

    def reserve_held(self, version: int, token: str) -> bool:
        """Whether this worker holds a version, which it then keeps for ``adopt_held``."""
        member: Member = self.__dict__["_member"]
        return member.reserve(version, token)

    def adopt_held(self) -> None:
        """Load the reserved version in place; each worker takes its own share of the tensors."""
        member: Member = self.__dict__["_member"]
        member.load(lambda pairs: self.adopt_weights(list(pairs)))

    def leave_transfers(self) -> None:
        """Take no more versions."""
        member: Member | None = self.__dict__.pop("_member", None)
        if member is not None:
            member.close()

    def hold_adapter(
        self,
        version: int,
        tensors: dict[str, Tensor],
        settings: dict[str, Any],
        needed: list[int],
    ) -> list[str]:
        """Keep a policy version's adapter for the requests that ask for it; of older ones, those
        that are ``needed``. Returns layers of it that vLLM does not adapt."""
        manager = self.model_runner.lora_manager
        held: dict[int, Callable[[], LoRAModel]]
        held = self.__dict__.setdefault("_adapters", {})
        held[version] = partial(_lora_model, manager, version, tensors, settings)
        for old in set(held) - set(needed):
            del held[old]
        # vLLM would read a folder; our adapters come as tensors.
        vars(manager)["_load_adapter"] = lambda lora_request: held[lora_request.lora_int_id]()
        places = manager._adapter_manager
        packed = {
            f"{name.rpartition('.')[0]}.{part.rpartition('.')[2]}": name
            for name, parts in places.packed_modules.items()
            for part in parts
        }
        found = held[version]().loras
        return [name for name in found if name not in places.modules and name not in packed]

    def take_experts(self, counts: Mapping[str, int]) -> dict[str, Routes]:
        """``RouteRecorder.take``; of an engine that records."""
        found: dict[str, Routes] = self.model_runner.routes.take(counts)  # type: ignore[attr-defined]
        return found

    def install_rollout_sampler(self, forbidden: list[int]) -> None:
        """Sample with ``RolloutSampler``. Raises RuntimeError where vLLM's sampler is unknown."""
        stock = self.model_runner.sampler
        if type(stock) is not Sampler:
            raise RuntimeError(
                f"vLLM samples with {type(stock).__module__}.{type(stock).__name__}, which "
                "returns other log-probabilities: set VLLM_USE_V2_MODEL_RUNNER=0"
            )
        device = self.model_runner.device
        self.model_runner.sampler = RolloutSampler(
            stock, torch.tensor(forbidden, dtype=torch.long, device=device)
        )
