"""The DeepSpeed engine behind four methods, accumulate, step, score and state; and the learning
rate of an update."""

from __future__ import annotations

import contextlib
import math
import os
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

from avatar_rl.common.errors import ConfigError
from avatar_rl.common.types import JsonObject
from avatar_rl.learner.adapter.lora import Adapter, base_name, merged_name
from avatar_rl.learner.batch.microbatch import MicroBatch, Pending
from avatar_rl.learner.lockstep import Lockstep, Needs
from avatar_rl.learner.model.policy import Policy, PolicyOutput, freeze

if TYPE_CHECKING:
    from avatar_rl.learner.config import OptimizerConfig, Schedule


LossFunction = Callable[[int, MicroBatch, PolicyOutput], Tensor]

#: Parameters up to this size stay whole on every rank under ZeRO 3 (DeepSpeed's default). All those
#: of a tiny model do.
WHOLE_BELOW = 100_000
LOOPBACK = "127.0.0.1"


def init_distributed(*, on_gpu: bool, timeout: timedelta) -> None:
    """Join the process group described by RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT.

    Ranks that meet on loopback have a store that listens there only; torch's own listens on every
    interface, and anybody who reaches it may write to it."""
    import deepspeed

    if not on_gpu:
        # Its shared-memory collectives cost a minute of compiling and leak /dev/shm segments; gloo
        # does the same work.
        deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}
    backend = "nccl" if on_gpu else "gloo"
    if os.environ["MASTER_ADDR"] == LOOPBACK and not dist.is_initialized():
        world = int(os.environ["WORLD_SIZE"])
        dist.init_process_group(
            backend,
            store=_loopback_store(timeout),
            rank=int(os.environ["RANK"]),
            world_size=world,
            timeout=timeout,
            device_id=torch.device("cuda", 0) if on_gpu and world > 1 else None,
        )
    deepspeed.init_distributed(dist_backend=backend, timeout=timeout, verbose=False)


def _loopback_store(timeout: timedelta) -> dist.TCPStore:
    """Rank 0 listens at MASTER_PORT of loopback, the others find it there."""
    port, is_first = int(os.environ["MASTER_PORT"]), os.environ["RANK"] == "0"
    listening = socket.create_server((LOOPBACK, port)).detach() if is_first else None
    return dist.TCPStore(
        LOOPBACK,
        port,
        int(os.environ["WORLD_SIZE"]),
        is_first,
        timeout,
        wait_for_workers=False,
        master_listen_fd=listening,
    )


def lr_at(
    update: int, *, lr: float, warmup: int, total: int, schedule: Schedule, floor: float = 0.0
) -> float:
    """Rate of update ``update`` (0-based) of ``total``: linear warm-up from lr/warmup, then the
    schedule down to ``floor * lr`` at the last update."""
    if update < warmup:
        return lr * (update + 1) / warmup
    if schedule == "constant" or total <= warmup + 1:
        return lr
    progress = min(1.0, (update - warmup) / (total - warmup - 1))
    left = 1 - progress if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return lr * (floor + (1 - floor) * left)


def deepspeed_config(config: OptimizerConfig, world_size: int, dtype: str) -> JsonObject:
    """DeepSpeed's own configuration for one optimiser step per training step
    (docs/dependencies.md)."""
    zero: JsonObject = {"stage": config.zero_stage}
    if config.zero_stage == 3:
        zero["stage3_param_persistence_threshold"] = WHOLE_BELOW
    if config.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu"}
    half: JsonObject = {"enabled": dtype == "bfloat16"}
    exact: JsonObject = {}
    if half["enabled"] and config.accumulate_in_float32:
        # Of packs and of ranks. At once: ZeRO 1 would keep each gradient in both types until the
        # next one comes.
        exact = {
            "data_types": {"grad_accum_dtype": "fp32"},
            "communication_data_type": "fp32",
        }
        half["immediate_grad_update"] = True
    return {
        **exact,
        "train_batch_size": world_size,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        # micro-batches per step vary: our step() is the boundary
        "managed_gradient_accumulation": False,
        "gradient_clipping": config.max_grad_norm,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": half,
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }


def axes(parameter: Tensor) -> int:
    """Dimensions of a parameter, also of one that ZeRO 3 has split already."""
    return len(getattr(parameter, "ds_shape", parameter.shape))


class FrozenEngine:
    """A policy that is only scored, its weights split over the ranks by ZeRO 3."""

    def __init__(
        self, policy: Policy, config: OptimizerConfig, *, world_size: int, dtype: str
    ) -> None:
        import deepspeed

        policy.eval().requires_grad_(False)
        config = config.model_copy(
            update={"offload_optimizer": False, "accumulate_in_float32": False}
        )
        self.lockstep = Lockstep(policy, ranks=world_size, stage=3)
        self.engine, *_ = deepspeed.initialize(
            model=policy, config=deepspeed_config(config, world_size, dtype)
        )
        self.device: torch.device = self.engine.device

    @torch.no_grad()
    def score(
        self,
        micro_batches: Sequence[MicroBatch | Pending],
        spare: MicroBatch | Pending,
        wanted: Sequence[bool],
    ) -> Iterator[tuple[int, PolicyOutput]]:
        """(Number, scores) of the ``wanted`` micro-batches; see ``Lockstep.runs``."""
        for number, batch, (encoders, head_runs) in self.lockstep.runs(
            micro_batches, spare, wanted
        ):
            placed = self.engine.module.placed(batch, self.device)
            output = self.engine(placed, head_runs, encoders)
            if number < len(micro_batches):
                yield number, output


class TrainEngine:
    """A policy under DeepSpeed. Losses handed to ``accumulate`` are this rank's share of a sum over
    all ranks.

    Ranks that share packs (``Policy.sequence``) hand the same loss and count once: the backward
    pass of each brings a part of its gradient. To DeepSpeed they are ranks like others: it averages
    gradients, and splits state, over all."""

    def __init__(
        self,
        policy: Policy,
        config: OptimizerConfig,
        *,
        world_size: int,
        dtype: str,
        adapter: Adapter | None = None,
    ) -> None:
        import deepspeed

        self.config = config
        self.world_size = world_size
        self.adapter = adapter  # of the policy's model: then nothing else is trained
        trained = freeze(policy, config.freeze)
        if adapter is not None:
            trained = adapter.freeze_base(policy)
        if trained == 0:
            raise ConfigError(
                f"learner.optimizer.freeze {config.freeze} freezes every parameter: nothing is "
                "left to train"
            )
        self.lockstep = Lockstep(policy, ranks=world_size, stage=config.zero_stage)
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
            # In bfloat16 it steps once at once, without gradients, to allocate; AdamW's bias
            # correction would count it.
            self.engine.basic_optimizer.state.clear()

    def _watch(self, policy: Policy) -> None:
        """Remember which micro-batch brought a gradient that is not finite.

        A NaN runs down to the input, through a norm or a bias of every layer on its way: these
        small ones tell."""
        self._bad = torch.zeros((), dtype=torch.bool, device=self.device)
        self._flags: list[Tensor] = []  # per micro-batch of the step

        def look(gradient: Tensor) -> None:
            self._bad = self._bad | ~torch.isfinite(gradient.sum())  # no wait for the device

        trained = [p for p in policy.parameters() if p.requires_grad]
        for parameter in [p for p in trained if p.ndim < 2] or trained:
            parameter.register_hook(look)

    @property
    def suspects(self) -> list[int]:
        """This rank's micro-batches of the last step whose gradient was not finite though their
        loss was."""
        return [number for number, bad in enumerate(self._flags) if bad]

    def _optimizer(self, policy: Policy) -> torch.optim.Optimizer:
        """AdamW; no decay on vectors (norms, biases), as is usual."""
        trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
        matrices = [p for p in trained if axes(p) >= 2]
        vectors = [p for p in trained if axes(p) < 2]
        groups = [
            {"params": parameters, "weight_decay": decay}
            for parameters, decay in ((matrices, self.config.weight_decay), (vectors, 0.0))
            if parameters
        ]
        make: Callable[..., torch.optim.Optimizer] = partial(torch.optim.AdamW, fused=True)
        if self.config.offload_optimizer:
            from deepspeed.ops.adam import DeepSpeedCPUAdam

            make = partial(DeepSpeedCPUAdam, adamw_mode=True)
        # step() sets the rate: a step that DeepSpeed makes on its own must not decay weights.
        return make(groups, lr=0.0, betas=self.config.betas, eps=self.config.eps)

    @property
    def policy(self) -> Policy:
        return self.engine.module

    def forward(self, batch: MicroBatch, needs: Needs) -> PolicyOutput:
        """Log-probabilities with gradients. The policy stays in eval mode: dropout would break the
        ratio."""
        encoders, head_runs = needs
        return self.engine(self.policy.placed(batch, self.device), head_runs, encoders)

    def accumulate(
        self,
        micro_batches: Sequence[MicroBatch | Pending],
        loss: LossFunction,
        spare: MicroBatch | Pending,
    ) -> None:
        """Add the gradients of ``loss(i, micro_batch, output)`` over this rank's micro-batches.

        Every rank runs at least one backward, and under ZeRO 2 and 3, which reduce inside each, all
        ranks run equally many: the missing ones are run on ``spare`` with weight zero. Likewise
        for the encoders: one that another rank has media for runs on a blank one. A loss that is
        not finite adds nothing. What is ``Pending`` is collated in its turn."""
        self._flags = []
        if self.adapter is not None:
            self.adapter.drop(active=True)
        # Before the first backward: ranks must meet in one order.
        plan = self.lockstep.plan(micro_batches, spare)
        for number, needs in enumerate(plan):
            pending = micro_batches[number] if number < len(micro_batches) else spare
            micro_batch = pending.collate() if isinstance(pending, Pending) else pending
            output = self.forward(micro_batch, needs)
            if number >= len(micro_batches):
                self._backward(output.logprobs.sum() * 0.0)
                continue
            self._bad = torch.zeros_like(self._bad)
            value = loss(number, micro_batch, output)
            self._backward(value)
            self._flags.append(self._bad & torch.isfinite(value.detach()))
        if self.adapter is not None:
            self.adapter.drop(active=False)

    @torch.no_grad()
    def score_base(
        self,
        micro_batches: Sequence[MicroBatch | Pending],
        spare: MicroBatch | Pending,
        wanted: Sequence[bool],
    ) -> Iterator[tuple[int, PolicyOutput]]:
        """(Number, scores) of the ``wanted`` micro-batches with the adapter off; see
        ``Lockstep.runs``."""
        assert self.adapter is not None
        for number, batch, needs in self.lockstep.runs(micro_batches, spare, wanted):
            with self.adapter.off():  # the base chooses its own experts, as another reference does
                output = self.forward(replace(batch, experts=None), needs)
            if number < len(micro_batches):
                yield number, output

    def _backward(self, loss: Tensor) -> None:
        hooks = []
        if not torch.isfinite(loss):
            # The other ranks wait for this backward; zero times a NaN is a NaN, so each gradient is
            # replaced instead.
            hooks = [
                p.register_hook(torch.zeros_like)
                for p in self.policy.parameters()
                if p.requires_grad
            ]
        # DeepSpeed averages over ranks; the factor makes it the sum that the step's totals are made
        # for.
        self.engine.backward(loss * self.world_size)
        for hook in hooks:
            hook.remove()

    def _clip(self) -> None:
        self._norm = torch.nn.utils.clip_grad_norm_(
            self.policy.parameters(), self.config.max_grad_norm
        )
        if not torch.isfinite(self._norm):
            # AdamW passes over what has no gradient.
            self.engine.basic_optimizer.zero_grad(set_to_none=True)

    def step(self, lr: float) -> float:
        """Clip, update and clear; returns the global gradient norm before clipping, 0 without
        gradients.

        A norm that is not finite is returned as inf on every rank. Weights and optimiser state then
        stay as they were: DeepSpeed leaves such an update out under ZeRO and in bfloat16, and
        ``_clip`` does so for float32 without ZeRO."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.engine.step()
        self._forget_gradients()
        self.updates += 1
        norm = self.engine.get_global_grad_norm()
        found = float(self._norm if norm is None else norm)
        return found if math.isfinite(found) else math.inf

    def _forget_gradients(self) -> None:
        """Zero the gradients that DeepSpeed keeps until there are others.

        A step that does not use a parameter would apply its old gradient again. A step whose first
        micro-batch does not use it would add to the old gradient.
        """
        zero, offload = self.optimizer, self.config.offload_optimizer
        stale: list[Tensor] = []
        if self.config.zero_stage == 3:
            stale = [zero.grad_partitions_flat_buffer]
            stale += [part.grad for part in zero.fp32_partitioned_groups_flat if offload]
        elif offload:
            stale = [part.grad for part in zero.single_partition_of_fp32_groups]
            stale += zero.accumulated_grads_in_cpu.values()
        for gradient in stale:
            gradient.zero_()

    @torch.no_grad()
    def score(self, batch: MicroBatch) -> PolicyOutput:
        return self.engine(self.policy.placed(batch, self.device))

    def whole_weights(
        self, parts: Sequence[Sequence[str]] | None = None
    ) -> Iterator[dict[str, Tensor]]:
        """The policy's own tensors, whole, by our names: those of one part, and then of the next.
        A layer with an adapter is merged, by a copy.

        Without ``parts`` all come at once. Parameters and persistent buffers; a head that is tied
        to the embeddings is there under both names. Collective under ZeRO 3, where a part is
        gathered for as long as it is looked at: every rank must go through all parts.
        """
        tensors = {
            name.removeprefix("model."): tensor
            for name, tensor in self.policy.state_dict(keep_vars=True).items()
        }
        if self.adapter is None:
            yield from self._gathered(tensors, [list(tensors)] if parts is None else parts)
            return
        raw: dict[str, list[str]] = {}  # a tensor's name without adapters: all it is made of
        for name in tensors:
            raw.setdefault(merged_name(name), []).append(name)
        needed = [[n for name in part for n in raw[name]] for part in (parts or [list(raw)])]
        for found in self._gathered(tensors, needed):
            yield dict(self.adapter.merged(found))

    def adapter_weights(self) -> Iterator[dict[str, Tensor]]:
        """The adapter's own tensors in one part, ``<layer>.lora_A.weight`` and B. Collective as
        ``whole_weights``."""
        assert self.adapter is not None
        tensors = self._adapter_parameters
        for found in self._gathered(tensors, [list(tensors)]):
            yield self.adapter.tensors(found)

    @cached_property
    def _adapter_parameters(self) -> dict[str, nn.Parameter]:
        """By our names. They stay the same objects; to look for them in a model of 36 layers takes
        4 ms, which the learner would stand still with every version."""
        return {
            name.removeprefix("model."): parameter
            for name, parameter in self.policy.named_parameters()
            if base_name(name) is None
        }

    def adapter_state(self) -> dict[str, Tensor]:
        """A copy of them on the CPU. Collective under ZeRO 3."""
        [found] = [
            {name: tensor.to("cpu", copy=True) for name, tensor in part.items()}
            for part in self.adapter_weights()
        ]
        return found

    def _gathered(
        self, tensors: Mapping[str, Tensor], parts: Sequence[Sequence[str]]
    ) -> Iterator[dict[str, Tensor]]:
        """``tensors`` part by part, whole for as long as a part is looked at."""
        for part in parts:
            with contextlib.ExitStack() as stack:
                if self.config.zero_stage >= 3:
                    import deepspeed

                    gathered = {id(tensors[name]): tensors[name] for name in part}
                    parameters = [t for t in gathered.values() if isinstance(t, nn.Parameter)]
                    stack.enter_context(deepspeed.zero.GatheredParameters(parameters))
                yield {name: tensors[name].detach() for name in part}

    def state_dict(self, *, keep: bool = True) -> dict[str, Tensor]:
        """A copy of all weights on the CPU, by our names. Collective under ZeRO-3: call it on every
        rank, with ``keep`` where the copy is wanted; it is empty on the others."""
        found: dict[str, Tensor] = {}
        for weights in self.whole_weights():
            if keep:
                found |= {name: weight.to("cpu", copy=True) for name, weight in weights.items()}
        return found

    def save(self, folder: Path, tag: str) -> None:
        """Write what is trained, its optimiser's state and the counters. What is frozen is the
        model's that the run began with, and is not written."""
        self.engine.save_checkpoint(
            str(folder),
            tag=tag,
            client_state={"updates": self.updates},
            exclude_frozen_parameters=True,
        )

    def load(self, folder: Path, tag: str) -> None:
        """Load what ``save`` wrote. Raises ConfigError for what another setup wrote."""
        path, client = self.engine.load_checkpoint(
            str(folder), tag=tag, custom_load_fn=self._load_trained
        )
        if path is None:
            raise ConfigError(
                f"checkpoint {folder}/{tag} cannot be loaded: it is missing or was written by "
                "another setup"
            )
        self.updates = int(client["updates"])

    def _load_trained(self, src: Mapping[str, Tensor], dst: nn.Module) -> None:
        """Everything that trains must be there; older checkpoints hold the frozen weights, too."""
        found = dst.load_state_dict(src, strict=False)
        trained = {name for name, p in dst.named_parameters() if p.requires_grad}
        missing = sorted(trained & set(found.missing_keys))
        if missing or found.unexpected_keys:
            wrong = missing or sorted(found.unexpected_keys)
            raise ConfigError(
                f"the saved learner state trains other weights than this recipe: "
                f"{'without' if missing else 'with'} {wrong[0]!r} and {len(wrong) - 1} more; put "
                "learner.lora and learner.optimizer.freeze back as they were"
            )
