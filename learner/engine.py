"""The DeepSpeed engine behind four methods: accumulate, step, score, state."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from learner.policy import MicroBatch, Policy, PolicyOutput, freeze
from prompts.errors import ConfigError

if TYPE_CHECKING:
    from learner.config import OptimizerConfig


LossFunction = Callable[[int, MicroBatch, PolicyOutput], Tensor]

#: Features of a micro-batch and the part of the model (a word of its parameters' names) that only they use.
ENCODERS = {"pixel_values": "visual", "pixel_values_videos": "visual", "input_features": "audio_tower"}


def init_distributed(*, on_gpu: bool, timeout: timedelta) -> None:
    """Join the process group described by RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT."""
    import deepspeed

    if not on_gpu:
        # Its shared-memory collectives cost a minute of compiling and leak /dev/shm segments; gloo does the same work.
        deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}
    deepspeed.init_distributed(dist_backend="nccl" if on_gpu else "gloo", timeout=timeout, verbose=False)


def deepspeed_config(config: OptimizerConfig, world_size: int, dtype: str) -> dict[str, Any]:
    """DeepSpeed's own configuration for one optimiser step per training step (STACK "DeepSpeed")."""
    zero: dict[str, Any] = {"stage": config.zero_stage}
    if config.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu"}
    return {
        "train_batch_size": world_size,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,  # micro-batches per step vary: our step() is the boundary
        "gradient_clipping": config.max_grad_norm,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": dtype == "bfloat16"},
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }


class TrainEngine:
    """A policy under DeepSpeed. Losses handed to ``accumulate`` are this rank's share of a sum over all ranks."""

    def __init__(self, policy: Policy, config: OptimizerConfig, *, world_size: int, dtype: str) -> None:
        import deepspeed

        self.config = config
        self.world_size = world_size
        if freeze(policy, config.freeze) == 0:
            raise ConfigError(
                f"learner.optimizer.freeze {config.freeze} freezes every parameter: nothing is left to train"
            )
        policy.uniform = config.zero_stage == 3
        # Encoders that ranks exchange something for: gradients, under ZeRO 3 the weights themselves.
        self._shared = {
            word
            for word in ENCODERS.values()
            if any(word in n and (p.requires_grad or config.zero_stage == 3) for n, p in policy.named_parameters())
        }
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=policy,
            optimizer=self._optimizer(policy),
            config=deepspeed_config(config, world_size, dtype),
        )
        self.device = self.engine.device
        self.updates = 0
        self._norm = torch.zeros(())
        self._watch(policy)
        # Without ZeRO, DeepSpeed clips float32 gradients but keeps no record of their norm.
        self.engine.clip_fp32_gradients = self._clip
        if config.zero_stage == 0:
            # In bfloat16 it steps once at once, without gradients, to allocate; AdamW's bias correction would count it.
            self.engine.basic_optimizer.state.clear()

    def _watch(self, policy: Policy) -> None:
        """Remember which micro-batch brought a gradient that is not finite.

        A NaN runs down to the input, through a norm or a bias of every layer on its way: these small ones tell.
        """
        self._bad = torch.zeros((), dtype=torch.bool, device=self.device)
        self._flags: list[Tensor] = []  # per micro-batch of the step

        def look(gradient: Tensor) -> None:
            self._bad = self._bad | ~torch.isfinite(gradient.sum())  # no wait for the device

        trained = [p for p in policy.parameters() if p.requires_grad]
        for parameter in [p for p in trained if p.ndim < 2] or trained:
            parameter.register_hook(look)

    @property
    def suspects(self) -> list[int]:
        """This rank's micro-batches of the last step whose gradient was not finite though their loss was."""
        return [number for number, bad in enumerate(self._flags) if bad]

    def _optimizer(self, policy: Policy) -> torch.optim.Optimizer:
        """AdamW; no decay on vectors (norms, biases), as is usual."""
        trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
        groups: list[dict[str, Any]] = [
            {"params": [p for p in trained if p.ndim >= 2], "weight_decay": self.config.weight_decay},
            {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
        ]
        groups = [group for group in groups if group["params"]]
        # step() sets the rate: a step that DeepSpeed makes on its own must not decay weights.
        arguments: dict[str, Any] = {"lr": 0.0, "betas": self.config.betas, "eps": self.config.eps}
        if self.config.offload_optimizer:
            from deepspeed.ops.adam import DeepSpeedCPUAdam

            return DeepSpeedCPUAdam(groups, adamw_mode=True, **arguments)
        return torch.optim.AdamW(groups, **arguments)

    @property
    def policy(self) -> Policy:
        return self.engine.module

    def forward(self, batch: MicroBatch) -> PolicyOutput:
        """Log-probabilities with gradients. The policy stays in eval mode: dropout would break the ratio."""
        return self.engine(batch.to(self.device))

    def accumulate(self, micro_batches: Sequence[MicroBatch], loss: LossFunction, spare: MicroBatch) -> None:
        """Add the gradients of ``loss(i, micro_batch, output)`` over this rank's micro-batches.

        Every rank runs at least one backward, and under ZeRO 2 and 3, which reduce inside each, all ranks run equally
        many: the missing ones are run on ``spare`` with weight zero. A loss that is not finite adds nothing.
        """
        self._flags = []
        most = self._agree(micro_batches, spare)  # before the first backward: ranks must meet in one order
        for number, micro_batch in enumerate(micro_batches):
            self._bad = torch.zeros_like(self._bad)
            value = loss(number, micro_batch, self.forward(micro_batch))
            self._backward(value)
            self._flags.append(self._bad & torch.isfinite(value.detach()))
        for _ in range(most - len(micro_batches)):
            self._backward(self.forward(spare).logprobs.sum() * 0.0)

    def _agree(self, micro_batches: Sequence[MicroBatch], spare: MicroBatch) -> int:
        """Backwards that every rank runs. Raises ConfigError, on all ranks, where they would wait for each other."""
        stage = self.config.zero_stage
        mine = [self._encoders(batch) for batch in micro_batches or [spare]]
        if self.world_size == 1 or stage == 0:
            return len(mine)
        ranks: list[Any] = [None] * self.world_size
        dist.all_gather_object(ranks, (mine, self._encoders(spare)))
        # ZeRO 1 exchanges gradients once per step, 2 and 3 do so in every backward.
        most = max(len(used) for used, _ in ranks) if stage > 1 else len(mine)
        rows = [used + [fill] * (most - len(used)) if stage > 1 else [set().union(*used)] for used, fill in ranks]
        if any(len(set(map(frozenset, meeting))) > 1 for meeting in zip(*rows, strict=True)):
            raise ConfigError(
                f"zero_stage {stage} needs all ranks to use the same encoders at the same time, but this step mixes "
                "prompts with different media: set learner.optimizer.zero_stage 0, freeze the encoders (zero_stage 1 "
                "and 2), or train on one kind of media at a time"
            )
        return most

    def _encoders(self, batch: MicroBatch) -> set[str]:
        return {ENCODERS[name] for name in batch.features if name in ENCODERS} & self._shared

    def _backward(self, loss: Tensor) -> None:
        hooks = []
        if not torch.isfinite(loss):
            # The other ranks wait for this backward; zero times a NaN is a NaN, so each gradient is replaced instead.
            hooks = [p.register_hook(torch.zeros_like) for p in self.policy.parameters() if p.requires_grad]
        # DeepSpeed averages over ranks; the factor makes it the sum that the step's totals are made for.
        self.engine.backward(loss * self.world_size)
        for hook in hooks:
            hook.remove()

    def _clip(self) -> None:
        self._norm = torch.nn.utils.clip_grad_norm_(self.policy.parameters(), self.config.max_grad_norm)
        if not torch.isfinite(self._norm):
            self.engine.basic_optimizer.zero_grad(set_to_none=True)  # AdamW passes over what has no gradient

    def step(self, lr: float) -> float:
        """Clip, update and clear; returns the global gradient norm before clipping, 0 without gradients.

        A norm that is not finite is returned as inf on every rank: weights and optimiser state then stay as they were
        (ZeRO and bfloat16 have DeepSpeed leave such an update out; ``_clip`` does it for float32 without ZeRO).
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.engine.step()
        self.updates += 1
        norm = self.engine.get_global_grad_norm()
        found = float(self._norm if norm is None else norm)
        return found if math.isfinite(found) else math.inf

    @torch.no_grad()
    def score(self, batch: MicroBatch) -> PolicyOutput:
        return self.engine(batch.to(self.device))

    @contextlib.contextmanager
    def whole_weights(self) -> Iterator[dict[str, Tensor]]:
        """The parameters themselves, whole, by our names, inside the ``with``. Collective under ZeRO-3."""
        with contextlib.ExitStack() as stack:
            if self.config.zero_stage >= 3:
                import deepspeed

                stack.enter_context(deepspeed.zero.GatheredParameters(list(self.policy.parameters())))
            yield {name.removeprefix("model."): p.detach() for name, p in self.policy.named_parameters()}

    def state_dict(self) -> dict[str, Tensor]:
        """A copy of all weights on the CPU, by our names. Collective under ZeRO-3: call it on every rank."""
        with self.whole_weights() as weights:
            return {name: weight.to("cpu", copy=True) for name, weight in weights.items()}

    def save(self, folder: Path, tag: str) -> None:
        self.engine.save_checkpoint(str(folder), tag=tag, client_state={"updates": self.updates})

    def load(self, folder: Path, tag: str) -> None:
        path, client = self.engine.load_checkpoint(str(folder), tag=tag)
        if path is None:
            raise ConfigError(
                f"checkpoint {folder}/{tag} cannot be loaded: it is missing or was written by another setup"
            )
        self.updates = int(client["updates"])
