"""A learner rank: rank 0 leases and draws a step, all ranks train their share of it, rank 0
publishes and commits.

Only rank 0 talks to the buffer: one lease, one fence and one draw per step, so the deviation of the
replayed batch and the denominators of the loss are those of the whole step without any further
exchange (docs/method.md 1.1)."""

from __future__ import annotations

import logging
import os
import socket
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from avatar_rl.buffer_service.records.trajectory import Trajectory
from avatar_rl.buffer_service.store import ReplayBuffer
from avatar_rl.buffer_service.weights.sender import Outbox, WeightSender
from avatar_rl.common.errors import ModelError, ReplayBufferError
from avatar_rl.common.process import (
    HeapTrimmer,
    no_collections,
    sees_gpu,
    set_aside_imports,
)
from avatar_rl.learner.batch.microbatch import MicroBatch, Pending, Row, collate, padded
from avatar_rl.learner.batch.plan import StepPlan, StepWork, plan_step, truncated
from avatar_rl.learner.clock import Clock
from avatar_rl.learner.config import OptimizerConfig
from avatar_rl.learner.engine import TrainEngine, init_distributed
from avatar_rl.learner.model.export import export_checkpoint
from avatar_rl.learner.model.load import checkpoint_names, load_model, published_names
from avatar_rl.learner.model.policy import Policy, PolicyOutput
from avatar_rl.learner.model.reference import ReferencePolicy
from avatar_rl.learner.objective.loss import policy_loss
from avatar_rl.learner.objective.shaping import tas_weights
from avatar_rl.learner.objective.step_metrics import StepMetrics, reward_metrics
from avatar_rl.learner.samples import sample_row
from avatar_rl.learner.schedule import lr_at
from avatar_rl.learner.sft import ColdStart
from avatar_rl.learner.spec import LearnerSpec
from avatar_rl.learner.state import DurableState
from avatar_rl.prompts.datasets import PromptIndex
from avatar_rl.prompts.encoding.template import EncodedPrompt, PromptEncoder
from avatar_rl.prompts.media.loader import MediaLoader

log = logging.getLogger(__name__)

POLL_S = 0.005  # between looks for a complete step
#: A rank waits this long for another one; generation between steps may take minutes.
COLLECTIVE_TIMEOUT = timedelta(hours=2)


class LearnerRank(DurableState):
    """Plain class behind ``avatar_rl.learner.actor``. Methods without "rank 0" in their text run on
    every rank."""

    moves = 0  # grows whenever this rank gets somewhere

    def __init__(
        self, spec: LearnerSpec, rank: int, ranks: int, weight_store: Any, state_replica: Any = None
    ) -> None:
        self.spec, self.rank, self.ranks = spec, rank, ranks
        self.state_replica, self.replica_bytes = state_replica, spec.replica_bytes
        self.prompts = PromptIndex.read(spec.datasets, spec.data)
        self.encoder = PromptEncoder(
            spec.model, MediaLoader(spec.media, base=Path(".")), spec.template
        )
        self.engine: TrainEngine
        self.heap: HeapTrimmer
        self.reference: ReferencePolicy | None = None
        self.buffer: ReplayBuffer | None = None
        self.outbox: Outbox | None = Outbox(weight_store)
        self.sender: WeightSender | None = None
        self.cold_start: ColdStart | None = None
        self.fencing_token = 0
        self.skipped = 0
        self.clock = Clock()

    def progress(self) -> dict[str, Any]:
        """How far it has come, answered while a step is trained: a rank that hangs answers the same
        again and again."""
        return {"moves": self.moves, "host": socket.gethostname(), "pid": os.getpid()}

    def meeting_point(self) -> tuple[str, int]:
        """Rank 0: address and port where the group meets."""
        import ray

        with socket.socket() as probe:
            probe.bind(("", 0))
            return ray.util.get_node_ip_address(), probe.getsockname()[1]

    @no_collections()
    def setup(self, address: str, port: int) -> dict[str, Any]:
        """Join the group and load the policy."""
        os.environ.update(
            RANK=str(self.rank),
            LOCAL_RANK="0",
            WORLD_SIZE=str(self.ranks),
            LOCAL_SIZE="1",
            MASTER_ADDR=address,
            MASTER_PORT=str(port),
        )
        spec, on_gpu = self.spec, sees_gpu()
        if not on_gpu:
            torch.set_num_threads(spec.learner.threads)
        init_distributed(on_gpu=on_gpu, timeout=COLLECTIVE_TIMEOUT)
        set_aside_imports()
        optimizer = self._optimizer()
        dtype = (
            optimizer.dtype if optimizer.dtype != "auto" else ("bfloat16" if on_gpu else "float32")
        )
        model = load_model(spec.model, dtype=dtype)
        if spec.learner.gradient_checkpointing:
            model.train()
            model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
        else:
            model.eval()
        # The cold start has one completion per prompt: there is no prefix to share, and one pass is
        # cheaper than two.
        policy = Policy(model, share_prefix=spec.learner.share_prefix and spec.sft is None)
        self.engine = TrainEngine(policy, optimizer, world_size=self.ranks, dtype=dtype)
        names = [name.removeprefix("model.") for name, _ in policy.named_parameters()]
        if self.rank == 0:
            published = published_names(names, checkpoint_names(spec.model))
            self.sender = WeightSender(published, self.outbox, dtype=dtype)
        if spec.sft is not None:
            prompts = list(self.prompts)
            self.cold_start = ColdStart(
                self.engine, self.encoder, prompts, spec.sft, rank=self.rank
            )
        else:
            self._setup_rl(dtype)
        self.heap = HeapTrimmer(active=not on_gpu)
        return {
            "rank": self.rank,
            "dtype": dtype,
            "parameters": sum(p.numel() for p in policy.parameters()),
        }

    def _optimizer(self) -> OptimizerConfig:
        return self.spec.sft.optimizer if self.spec.sft is not None else self.spec.learner.optimizer

    def _setup_rl(self, dtype: str) -> None:
        spec = self.spec
        if spec.learner.objective.beta > 0:
            self.reference = ReferencePolicy(
                spec.reference,
                dtype=dtype,
                share_prefix=spec.learner.share_prefix,
                device=self.engine.device,
                cached=spec.learner.reference_cache,
            )
        if self.rank == 0:
            self.buffer = ReplayBuffer.connect(spec.buffer, spec.run_id, url=spec.redis_url)
            self.fencing_token = self.buffer.replay.new_fencing_token()

    # -- Stage 0 -----------------------------------------------------------------------------------

    def sft(self, first: int, count: int) -> dict[str, Any]:
        """``count`` cold-start updates from ``first``: mean loss per token and tokens seen."""
        assert self.cold_start is not None
        self.heap.trim()
        return self.cold_start.run(first, count)

    # -- RL ----------------------------------------------------------------------------------------

    def probe(self, items: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The learner's view of the engine's probe completions, for the parity probe."""
        answers = []
        for item in items:
            prompt = self.encoder.encode(self.prompts[item["prompt_id"]], hinted=False)
            row = Row((item["prompt_id"], False), prompt, item["token_ids"], item["temperature"])
            output = self.engine.score(collate([row], share_prefix=self.engine.policy.share_prefix))
            answers.append(
                {
                    "prompt_token_ids": prompt.input_ids.numpy(),
                    "placeholders": {
                        name: list(value.shape) for name, value in prompt.features.items()
                    },
                    "logprobs": output.logprobs[0].cpu().numpy(),
                }
            )
        return answers

    def train_step(self, step: int, *, samples: int = 0) -> dict[str, Any]:
        """Train ``step``, publish the next version and commit; rank 0 returns metrics,
        distributions, sampled groups.

        Raises ReplayBufferError when the step's groups do not arrive in time.
        """
        self.clock = Clock()
        with self.clock("learner_wait"):
            work = self._receive(self._collect(step) if self.rank == 0 else None)
        rate, updates = self._lr(step), self.spec.learner.updates
        step_metrics = StepMetrics()
        for number in range(updates):
            part = work.update(number, updates)
            plan = plan_step(
                part, self.spec.learner, ranks=self.ranks, max_tokens=self.spec.max_tokens
            )
            self._train(plan, step_metrics)
            with self.clock("optimizer"):
                norm = (
                    self.engine.step(rate) if plan.trajectories else 0.0
                )  # nothing was computed on any rank
            if not np.isfinite(norm):
                self._note_no_update(plan, step_metrics)
            self.moves += 1
        with self.clock("hold"):
            self.hold(work.version + 1)
        self.moves += 1
        with self.clock("publish"), self.engine.whole_weights() as weights:
            if self.rank == 0:
                self._commit(work, weights)
        self.heap.trim()
        gathered = self._gather(step_metrics)
        self._count_skipped(gathered)
        if self.rank != 0:
            return {}
        metrics = self._metrics(work, gathered) | {"lr": rate, "grad_norm": norm}
        shown = [t for group in work.groups[:samples] for t in group.trajectories]
        rows = [sample_row(t, self.prompts[t.prompt_id], self.encoder.tokenizer) for t in shown]
        return {"metrics": metrics, "samples": rows, "distributions": gathered.distributions()}

    def export(self, path: Path) -> str:
        """Write the policy as a Hugging Face checkpoint (rank 0 writes, all ranks gather)."""
        weights = self.engine.state_dict(keep=self.rank == 0)
        if self.sender is not None:
            export_checkpoint(self.sender.rename(weights), self.spec.model, path)
        return str(path)

    # -- the parts of a step -----------------------------------------------------------------------

    def _collect(self, step: int) -> StepWork:
        """Rank 0: the step's groups, as soon as all are in, and its replays."""
        buffer, spec = self.buffer, self.spec
        assert buffer is not None
        deadline = time.monotonic() + spec.step_timeout_s
        while True:
            self.moves += 1  # waiting for groups is no standstill
            share = buffer.replay.lease_fresh(
                "learner", step, lease_s=spec.learner.lease_s, fencing_token=self.fencing_token
            )
            if share.ready:
                break
            if time.monotonic() > deadline:
                raise ReplayBufferError(
                    f"step {step}: {share.missing} of {share.expected} groups did not arrive "
                    "within "
                    f"{spec.step_timeout_s:g} s: see whether rollout and reward actors live, "
                    "raise loop.step_timeout_s"
                )
            time.sleep(POLL_S)
        version = buffer.replay.version()
        replays = (
            buffer.replay.draw(
                len(share.groups) * spec.replayed * spec.learner.updates,
                step=step,
                seed=spec.seed,
                version=version,
                prompt_ids=[group.prompt_id for group in share.groups],
            )
            if share.groups
            else []
        )
        baselines = buffer.replay.baselines(
            [r.prompt_id for r in replays], [r.hinted for r in replays]
        )
        of_groups: list[float] = []
        if spec.learner.objective.fresh_advantage == "vcrs":
            of_groups = buffer.replay.baselines(
                [g.prompt_id for g in share.groups], [g.hinted for g in share.groups]
            )
        return StepWork(
            step, version, tuple(share.groups), tuple(replays), tuple(baselines), tuple(of_groups)
        )

    def _receive(self, work: StepWork | None) -> StepWork:
        if self.ranks == 1:
            assert work is not None
            return work
        box = [work]
        dist.broadcast_object_list(box, src=0)
        received = box[0]
        assert received is not None
        return received

    def _train(self, plan: StepPlan, step_metrics: StepMetrics) -> None:
        """Forward and backward over this rank's micro-batches."""
        if self.rank == 0:
            step_metrics.add_step(plan.advantages, plan.is_replay, plan.ages)
        if not plan.trajectories:
            return
        share = plan.shares[self.rank]
        with self.clock("encode"):
            rows = {i: self._row(plan.trajectories[i]) for indices in share for i in indices}
            micro_batches = [self._pending([rows[i] for i in indices]) for indices in share]
            spare = (
                micro_batches[0]
                if micro_batches
                else self._pending([self._row(plan.trajectories[0])])
            )

        def loss(number: int, micro_batch: MicroBatch, output: PolicyOutput) -> Tensor:
            indices = share[number]
            self.moves += 1
            return self._loss(
                plan, indices, [rows[i] for i in indices], micro_batch, output, step_metrics
            )

        with self.clock("forward_backward"):
            self.engine.accumulate(micro_batches, loss, spare)

    def _loss(
        self,
        plan: StepPlan,
        indices: list[int],
        rows: list[Row],
        batch: MicroBatch,
        output: PolicyOutput,
        step_metrics: StepMetrics,
    ) -> Tensor:
        config, device = self.spec.learner.objective, output.logprobs.device
        chosen = [plan.trajectories[i] for i in indices]
        mask = batch.mask.to(device)
        reference = (
            self.reference.logprobs([t.id for t in chosen], rows)
            if self.reference is not None
            else None
        )
        result = policy_loss(
            output.logprobs,
            padded([t.logprobs for t in chosen]).to(device),
            mask,
            plan.advantages.values[indices].to(device, torch.float32),
            tas_weights(mask, config.tas_shape, config.tas_lambda, config.tas_normalize),
            plan.is_replay[indices].to(device),
            reference,
            config,
            totals=plan.totals,
            truncated=truncated(chosen).to(device),
            old_logprobs=output.logprobs.detach() if config.mismatch != "none" else None,
        )
        if not torch.isfinite(result.loss):
            culprits = [
                t.id
                for t, row in zip(chosen, result.rows.tolist(), strict=True)
                if not np.isfinite(row)
            ]
            log.warning("micro-batch skipped: the loss of trajectories %s is not finite", culprits)
            step_metrics.skip(culprits)
        else:
            step_metrics.add(result, output.entropy)
        return result.loss

    def _note_no_update(self, plan: StepPlan, step_metrics: StepMetrics) -> None:
        """The engine made no update for want of a finite gradient; the step is published and
        committed all the same."""
        share = plan.shares[self.rank]
        culprits = [
            plan.trajectories[i].id for number in self.engine.suspects for i in share[number]
        ]
        log.warning(
            "no update: the gradient is not finite; on this rank it came from trajectories %s",
            culprits,
        )
        step_metrics.skip(culprits, count=int(self.rank == 0))

    def _count_skipped(self, gathered: StepMetrics) -> None:
        """Every rank knows of all that was left out, so all stop at the same step, after its
        commit."""
        self.skipped += gathered.skipped
        if gathered.skipped and self.skipped > self.spec.learner.max_skipped:
            raise ModelError(
                f"{self.skipped} times a loss or gradient was not finite, more than "
                "learner.max_skipped = "
                f"{self.spec.learner.max_skipped}; last because of trajectories "
                f"{gathered.culprits[:16]}: lower "
                "learner.optimizer.lr, or look at the rewards and media of these trajectories"
            )

    def _row(self, trajectory: Trajectory) -> Row:
        self.moves += 1
        encoded = self._encode(trajectory)
        return Row(
            (trajectory.prompt_id, trajectory.hinted),
            encoded,
            trajectory.token_ids,
            trajectory.temperature,
        )

    def _encode(self, trajectory: Trajectory) -> EncodedPrompt:
        encoded = self.encoder.encode(self.prompts[trajectory.prompt_id], hinted=trajectory.hinted)
        if encoded.digest != trajectory.prompt_digest:
            raise ModelError(
                f"trajectory {trajectory.id}: its prompt {trajectory.prompt_id!r} has other "
                "tokens than when it was "
                f"generated ({len(encoded.input_ids)} against {trajectory.prompt_tokens}): the "
                "dataset, template or "
                "pixel bounds changed; start from an empty buffer"
            )
        return encoded

    def _pending(self, rows: list[Row]) -> Pending:
        return Pending(rows, self.spec.learner.share_prefix)

    def _lr(self, step: int) -> float:
        config, steps = self.spec.learner, self.spec.steps
        return lr_at(
            step,
            lr=config.optimizer.lr,
            warmup=round(config.warmup * steps),
            total=steps,
            schedule=config.schedule,
        )

    def _commit(self, work: StepWork, weights: dict[str, Tensor]) -> None:
        """Weights first, then the version that announces them: whoever sees the number has only to
        wait for a copy."""
        assert self.sender is not None and self.buffer is not None
        self.sender.publish(work.version + 1, weights)
        self.buffer.replay.commit_step(
            work.step, work.version + 1, [group.id for group in work.groups], self.fencing_token
        )

    def _gather(self, step_metrics: StepMetrics) -> StepMetrics:
        if self.ranks == 1:
            return step_metrics
        box: list[Any] = [None] * self.ranks
        dist.all_gather_object(box, step_metrics)
        for other in box[1:]:
            box[0].merge(other)
        return box[0]

    def _metrics(self, work: StepWork, step_metrics: StepMetrics) -> dict[str, float]:
        fresh, updates = (
            [t for group in work.groups for t in group.trajectories],
            self.spec.learner.updates,
        )
        metrics = step_metrics.metrics()
        for name in ("loss/policy", "loss/kl"):  # sums of a step; mean of its updates
            metrics[name] /= updates
        metrics["loss/total"] = metrics["loss/policy"] + metrics["loss/kl"]
        if self.buffer is not None and "kl/behaviour" in metrics:
            self.buffer.replay.report_behaviour_kl(metrics["kl/behaviour"])
        if fresh:
            metrics |= reward_metrics(fresh)
            lag = [work.version - trajectory.version for trajectory in fresh]
            metrics |= {"staleness/mean": float(np.mean(lag)), "staleness/max": float(max(lag))}
            metrics["groups/fresh"] = float(len(work.groups))
        metrics["version"] = float(work.version + 1)
        trained = [*fresh * updates, *work.replays]
        metrics["replay/share"] = len(work.replays) / max(1, len(trained))
        metrics["learner/updates"] = float(updates)
        tokens = float(sum(len(t.token_ids) for t in trained))
        seconds = self.clock.spent
        metrics["tokens/trained"] = tokens
        busy = sum(value for name, value in seconds.items() if name != "learner_wait")
        metrics["learner/tokens_per_s"] = tokens / max(busy, 1e-9)
        metrics["learner/skipped"] = float(self.skipped)
        return metrics | {f"time/{name}": value for name, value in seconds.items()}
