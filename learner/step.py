"""One training step of a learner rank. Read ``StepTrainer.train_step`` first.

Rank 0 collects the step from the buffer and sends it to the others. Every rank makes the same plan
of it, and trains its own share; under sequence parallelism the ranks of a group have one share
together."""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypedDict

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from avatar_rl.buffer_service.records.trajectory import Trajectory
from avatar_rl.common.errors import DataError, ModelError
from avatar_rl.common.process import device_name, memory_metrics
from avatar_rl.common.types import JsonObject
from avatar_rl.learner.batch.microbatch import MicroBatch, Pending, Row, padded
from avatar_rl.learner.batch.plan import StepPlan, StepSource, StepWork, plan_step, truncated
from avatar_rl.learner.engine import TrainEngine, lr_at
from avatar_rl.learner.media.ahead import AheadEncoder
from avatar_rl.learner.model.policy import PolicyOutput
from avatar_rl.learner.model.reference import ReferencePolicy
from avatar_rl.learner.model.router import Routers
from avatar_rl.learner.objective.loss import policy_loss
from avatar_rl.learner.objective.shaping import tas_weights
from avatar_rl.learner.objective.step_metrics import StepMetrics, reward_metrics
from avatar_rl.learner.old_logprobs import OldLogprobs
from avatar_rl.learner.publication import Publication
from avatar_rl.learner.samples import SampleRecorder
from avatar_rl.learner.spec import LearnerSpec
from avatar_rl.learner.state import StateReplicator
from avatar_rl.prompts.datasets import PromptIndex
from avatar_rl.prompts.encoding.template import PromptEncoder

log = logging.getLogger(__name__)


class StepReport(TypedDict):
    """What rank 0 says of a step."""

    metrics: dict[str, float]
    samples: list[JsonObject]  # completions as readable rows
    distributions: dict[str, list[float]]  # see ``StepMetrics.distributions``
    device: str  # the name of rank 0's GPU; "" on a CPU


class PhaseTimer:
    """Seconds by phase of one step."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.spent[phase] += time.perf_counter() - start


@dataclass
class StepTrainer:
    """Trains one rank's share of every step. ``source`` is rank 0's."""

    spec: LearnerSpec
    rank: int
    ranks: int
    engine: TrainEngine
    prompts: PromptIndex
    encoder: PromptEncoder | AheadEncoder
    replicator: StateReplicator
    reference: ReferencePolicy | None = None
    source: StepSource | None = None
    recorder: SampleRecorder | None = None  # of a step whose completions are shown
    publication: Publication | None = None  # None: steps are trained by hand, one by one
    routers: Routers | None = None
    moves: int = 0  # grows whenever this rank gets somewhere
    skipped: int = 0  # micro-batches and updates of all ranks and steps that were left out
    unreadable: int = 0  # completions likewise, see ``StepMetrics``
    #: The policy version that is trained, where its weights came to the engines by an update.
    generating: int | None = None
    timer: PhaseTimer = field(default_factory=PhaseTimer)
    _old: OldLogprobs | None = None  # of the step that is trained

    @property
    def share(self) -> int:
        """Which of ``StepPlan.shares`` is this rank's."""
        return self.rank // self.spec.learner.sequence_parallel

    @property
    def old(self) -> OldLogprobs:
        """What the ratios of the step that is trained are taken against."""
        if self._old is None:
            self._old = self._old_logprobs()
        return self._old

    def _old_logprobs(self) -> OldLogprobs:
        learner = self.spec.learner
        rule = learner.objective.old_rule(self.spec.engine_dtype)
        return OldLogprobs(rule, updates=learner.updates, ranks=self.ranks)

    def train_step(self, step: int, *, samples: int = 0) -> StepReport | None:
        """Train ``step``, publish the next version and commit it.

        Rank 0 returns a report that shows the completions of ``samples`` groups (samples.py); the
        others return None. Raises ReplayBufferError when the step's groups do not arrive in time,
        ModelError when a prompt has changed or too many losses or gradients were not finite.
        """
        self.timer = PhaseTimer()
        with self.timer("learner_wait"):
            work = self._broadcast(self.source.collect(step, self._move) if self.source else None)
        updates, lr, step_metrics = self.spec.learner.updates, self._lr(step), StepMetrics()
        self._old = self._old_logprobs()
        self.recorder = SampleRecorder.of(work, samples) if samples else None
        standing = self.source.standing(work) if self.source and self.recorder else {}
        for number in range(updates):
            plan = self.plan(work.update(number, updates))
            # Version 0 is what the parity probe compares; a second update has moved the weights.
            self.generating = work.version if number == 0 and work.version > 0 else None
            self.forward_backward(plan, step_metrics)
            self.old.share()
            if self.reference is not None:
                self.reference.cache.share(self.ranks)
            grad_norm = self._optimizer_step(plan, lr, step_metrics)
        with self.timer("replicate"):
            self.replicator.replicate(work.version + 1)
        self._move()
        with self.timer("publish"):
            self._publish_and_commit(work)
        gathered = self._gather(step_metrics)
        self._gather_samples()
        self._count_skipped(gathered)
        if self.source is None:
            return None
        metrics = self._metrics(work, gathered) | {"lr": lr, "grad_norm": grad_norm}
        self.source.report_behaviour_kl(step, gathered.behaviour_kl())
        return StepReport(
            metrics=metrics,
            samples=self.recorder.rows(work, standing, self.prompts, self.encoder.tokenizer)
            if self.recorder is not None
            else [],
            distributions=gathered.distributions(),
            device=device_name(),
        )

    # -- the parts of a step, in their order -------------------------------------------------------

    def _broadcast(self, work: StepWork | None) -> StepWork:
        if self.ranks > 1:
            box = [work]
            dist.broadcast_object_list(box, src=0)
            [work] = box
        assert work is not None
        return work

    def plan(self, work: StepWork) -> StepPlan:
        """Advantages and shares of one optimiser update, the same on every rank."""
        shares = self.ranks // self.spec.learner.sequence_parallel
        return plan_step(
            work,
            self.spec.learner,
            ranks=shares,
            max_tokens=self.spec.max_tokens,
            only_advantages=self.spec.only_advantages,
        )

    def forward_backward(self, plan: StepPlan, step_metrics: StepMetrics) -> None:
        """Forward and backward over this rank's micro-batches: adds to the gradients and to
        ``step_metrics``."""
        if self.rank == 0:
            step_metrics.add_step(plan.advantages, plan.is_replay, plan.ages)
        if self.recorder is not None:
            self.recorder.begin_update(plan)
        if not plan.trajectories:
            return
        with self.timer("encode"):
            rows = self._rows(plan, step_metrics)
            share = [[i for i in indices if i in rows] for indices in plan.shares[self.share]]
            share = plan.shares[self.share] = [indices for indices in share if indices]
            micro_batches = [Pending([rows[i] for i in indices]) for indices in share]
            # A rank without a share still takes part in the collectives.
            spare = micro_batches[0] if micro_batches else Pending([self._first_row(plan)])

        def loss(number: int, micro_batch: MicroBatch, output: PolicyOutput) -> Tensor:
            self._move()
            indices = share[number]
            return self.loss(
                plan, indices, [rows[i] for i in indices], micro_batch, output, step_metrics
            )

        if self.reference is not None:
            with self.timer("reference"):
                ids = [[plan.trajectories[i].id for i in indices] for indices in share]
                self.reference.prepare(ids, micro_batches, spare)
        with self.timer("forward_backward"):
            self.engine.accumulate(micro_batches, loss, spare)

    def _rows(self, plan: StepPlan, step_metrics: StepMetrics) -> dict[int, Row]:
        """This rank's completions by number, without those whose prompt cannot be encoded any more
        (a file is gone, say), here or on a rank that shares its packs: the run continues without
        them."""
        rows = {}
        mine = [i for indices in plan.shares[self.share] for i in indices]
        if isinstance(self.encoder, AheadEncoder):
            wanted = dict.fromkeys(
                (t.prompt_id, t.hinted) for t in map(plan.trajectories.__getitem__, mine)
            )
            self.encoder.ahead((self.prompts[name], hinted) for name, hinted in wanted)
        for i in mine:
            try:
                rows[i] = self.encode(plan.trajectories[i])
            except DataError as error:
                log.warning("trajectory %s left out: %s", plan.trajectories[i].id, error)
        if (sequence := self.engine.policy.sequence) is not None:
            readable = sequence.common(rows)
            rows = {i: row for i, row in rows.items() if i in readable}
        step_metrics.unreadable += len(mine) - len(rows)
        return rows

    def _first_row(self, plan: StepPlan) -> Row:
        """Any of the step's completions, the same on ranks that share their packs. Raises DataError
        when none can be encoded."""
        sequence = self.engine.policy.sequence
        failure = DataError("no completion of the step can be encoded on all ranks of a group")
        for trajectory in plan.trajectories:
            row = None
            try:
                row = self.encode(trajectory)
            except DataError as error:
                failure = error
            if sequence is not None and not sequence.common([] if row is None else [0]):
                continue  # a rank that shares the pack lacks it
            if row is not None:
                return row
        raise failure

    def encode(self, trajectory: Trajectory) -> Row:
        """The trajectory with its prompt's tokens and media. Raises ModelError when they are not
        those that it was generated for."""
        self._move()
        prompt = self.prompts[trajectory.prompt_id]
        encoded = self.encoder.encode(prompt, hinted=trajectory.hinted)
        if encoded.digest != trajectory.prompt_digest:
            raise ModelError(
                f"trajectory {trajectory.id}: its prompt {trajectory.prompt_id!r} has other "
                f"tokens than when it was generated ({len(encoded.input_ids)} against "
                f"{trajectory.prompt_tokens}): the dataset, template or pixel bounds changed; "
                "start from an empty buffer"
            )
        return Row(
            (trajectory.prompt_id, trajectory.hinted),
            encoded,
            trajectory.token_ids,
            trajectory.temperature,
            encoded.media,
            trajectory.experts if self.spec.learner.router == "replay" else None,
        )

    def loss(
        self,
        plan: StepPlan,
        indices: list[int],
        rows: list[Row],
        batch: MicroBatch,
        output: PolicyOutput,
        step_metrics: StepMetrics,
    ) -> Tensor:
        """Loss of the plan's completions ``indices``, () with gradient (docs/method.md 1.1)."""
        config, device = self.spec.learner.objective, output.logprobs.device
        for tree in batch.trees:
            step_metrics.computed.add(tree.prompt, tree.completions)
        chosen = [plan.trajectories[i] for i in indices]
        mask = batch.mask.to(device)
        reference = (
            self.reference.logprobs([t.id for t in chosen], rows)
            if self.reference is not None
            else None
        )
        weights = tas_weights(mask, config.tas_shape, config.tas_lambda, config.tas_normalize)
        if self.recorder is not None:
            self.recorder.add(indices, output, weights)
        result = policy_loss(
            output.logprobs,
            padded([t.logprobs for t in chosen]).to(device),
            mask,
            plan.advantages.values[indices].to(device, torch.float32),
            weights,
            plan.is_replay[indices].to(device),
            reference,
            config,
            totals=plan.totals,
            truncated=truncated(chosen).to(device),
            old_logprobs=self.old.of([t.id for t in chosen], output.logprobs, mask),
        )
        if torch.isfinite(result.loss):
            step_metrics.add(result, output.entropy, [t.prompt_id for t in chosen])
            self._compare(chosen, plan.is_replay[indices], output.logprobs, step_metrics)
        else:
            finite = torch.isfinite(result.rows).tolist()
            culprits = [t.id for t, fine in zip(chosen, finite, strict=True) if not fine]
            log.warning("micro-batch skipped: the loss of trajectories %s is not finite", culprits)
            step_metrics.skip(culprits)
        if self.routers is None:
            return result.loss
        # The mean of the routers' loss over the step's completions.
        return result.loss + self.routers.loss() * (len(indices) / len(plan.trajectories))

    def _compare(
        self,
        chosen: Sequence[Trajectory],
        is_replay: Tensor,
        logprobs: Tensor,
        step_metrics: StepMetrics,
    ) -> None:
        """Engine against learner where both had the same weights."""
        version = self.generating
        rows = [
            i
            for i, trajectory in enumerate(chosen)
            if not is_replay[i] and any(v == version for v, _ in trajectory.versions)
        ]
        if version is not None and rows:
            ours = logprobs[rows].detach().float().cpu().numpy()
            fresh = [chosen[i] for i in rows]
            cut = [row[: len(t.token_ids)] for row, t in zip(ours, fresh, strict=True)]
            step_metrics.add_on_policy(fresh, cut, version)

    def _optimizer_step(self, plan: StepPlan, lr: float, step_metrics: StepMetrics) -> float:
        """Update the weights; the gradient's norm before clipping, inf where it was not finite.

        Then the engine has made no update. The step is published and committed all the same.
        """
        grad_norm = 0.0  # of a plan without trajectories: no rank has computed anything
        if plan.trajectories:
            with self.timer("optimizer"):
                grad_norm = self.engine.step(lr)
        if not np.isfinite(grad_norm):
            share = plan.shares[self.share]
            suspects = [i for number in self.engine.suspects for i in share[number]]
            culprits = [plan.trajectories[i].id for i in suspects]
            log.warning(
                "no update: the gradient is not finite; on this rank it came from trajectories %s",
                culprits,
            )
            step_metrics.skip(culprits, count=int(self.rank == 0))
        self._move()
        return grad_norm

    def _publish_and_commit(self, work: StepWork) -> None:
        """Weights first, then the version that announces them: a rollout actor that sees the number
        has only to wait for a copy."""
        assert self.publication is not None
        self.publication.publish(work.version + 1)
        if self.source is not None:
            self.source.commit(work)

    def _gather(self, step_metrics: StepMetrics) -> StepMetrics:
        """What all ranks collected, on every rank. Ranks that share packs have collected the
        same."""
        if self.ranks == 1:
            return step_metrics
        of_ranks = [step_metrics] * self.ranks
        dist.all_gather_object(of_ranks, step_metrics)
        first, *others = of_ranks[:: self.spec.learner.sequence_parallel]
        for other in others:
            first.merge(other)
        return first

    def _gather_samples(self) -> None:
        """What all ranks noted of the tokens of the completions that are shown."""
        if self.recorder is None or self.ranks == 1:
            return
        of_ranks = [self.recorder.tokens] * self.ranks
        dist.all_gather_object(of_ranks, self.recorder.tokens)
        for tokens in of_ranks:
            self.recorder.tokens |= tokens

    def _count_skipped(self, gathered: StepMetrics) -> None:
        """Every rank knows of all that was left out, so all stop at the same step, after its
        commit."""
        self.skipped += gathered.skipped
        self.unreadable += gathered.unreadable
        limit = self.spec.learner.max_skipped
        if gathered.skipped and self.skipped > limit:
            raise ModelError(
                f"{self.skipped} times a loss or gradient was not finite, more than "
                f"learner.max_skipped = {limit}; last because of trajectories "
                f"{gathered.culprits[:16]}: lower learner.optimizer.lr, or look at the rewards and "
                "media of these trajectories"
            )

    # -- the report --------------------------------------------------------------------------------

    def _metrics(self, work: StepWork, gathered: StepMetrics) -> dict[str, float]:
        updates = self.spec.learner.updates
        trained_fresh = [t for group in work.groups for t in group.trajectories]
        # Rewards and lengths are those of the policy: what was generated, not what was chosen.
        fresh = [*trained_fresh, *(t for group in work.replaced for t in group.trajectories)]
        metrics = gathered.metrics()
        for name in ("loss/policy", "loss/kl"):  # sums of a step; mean of its updates
            metrics[name] /= updates
        metrics["loss/total"] = metrics["loss/policy"] + metrics["loss/kl"]
        if fresh:
            metrics |= reward_metrics(fresh)
            lag = [work.version - trajectory.version for trajectory in fresh]
            metrics |= {"staleness/mean": float(np.mean(lag)), "staleness/max": float(max(lag))}
            metrics["groups/fresh"] = float(len(work.groups))
            metrics["groups/replaced"] = float(len(work.replaced))
        metrics["version"] = float(work.version + 1)
        trained = [*trained_fresh * updates, *work.replays]
        metrics["replay/share"] = len(work.replays) / max(1, len(trained))
        metrics["learner/updates"] = float(updates)
        tokens = float(sum(len(t.token_ids) for t in trained))
        seconds = self.timer.spent
        metrics["tokens/trained"] = tokens
        busy = sum(value for name, value in seconds.items() if name != "learner_wait")
        metrics["learner/tokens_per_s"] = tokens / max(busy, 1e-9)
        metrics |= memory_metrics()
        metrics["learner/skipped"] = float(self.skipped + self.unreadable)
        if isinstance(self.encoder, AheadEncoder):
            metrics |= self.encoder.metrics()
        if self.publication is not None:
            metrics |= self.publication.metrics()
        return metrics | {f"time/{name}": value for name, value in seconds.items()}

    def _lr(self, step: int) -> float:
        config, steps = self.spec.learner, self.spec.steps
        return lr_at(
            step,
            lr=config.optimizer.lr,
            warmup=config.rising(steps),
            total=steps,
            schedule=config.schedule,
        )

    def _move(self) -> None:
        """Note progress: a rank that hangs stays at its number of moves."""
        self.moves += 1
