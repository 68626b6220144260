"""What a training step works on: leased and drawn from the buffer, then planned, that is given
advantages and split into packs and ranks."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from avatar_rl.buffer_service.records.requests import PromptKl, Tier
from avatar_rl.buffer_service.records.trajectory import Group, Trajectory
from avatar_rl.buffer_service.store import ReplayBuffer
from avatar_rl.common.errors import ReplayBufferError
from avatar_rl.learner.batch.packing import Size, split
from avatar_rl.learner.config import LearnerConfig
from avatar_rl.learner.objective.advantages import Advantages, rewards_tensor, step_advantages
from avatar_rl.learner.objective.loss import StepTotals
from avatar_rl.learner.spec import LearnerSpec

POLL_S = 0.005  # between looks for a complete step


class Standing(NamedTuple):
    """How the buffer sees a prompt when a step is collected."""

    tier: Tier | None
    baseline: float | None  # Rbar of its visits with or without hint


@dataclass(frozen=True)
class StepWork:
    """What rank 0 leased and drew for a step, as every rank receives it: ``updates`` shares of
    replays."""

    step: int
    version: int  # policy version that is trained
    groups: tuple[Group, ...]
    replays: tuple[Trajectory, ...]
    baselines: tuple[float, ...]  # Rbar per replay
    group_baselines: tuple[float, ...] = ()  # Rbar per group; empty where nothing reads it
    replaced: tuple[Group, ...] = ()  # by dynamic sampling: generated, not trained

    def update(self, number: int, updates: int) -> StepWork:
        """The work of one of the step's optimiser updates: all groups, every ``updates``-th
        replay."""
        share = slice(number, None, updates)
        return replace(self, replays=self.replays[share], baselines=self.baselines[share])


class StepSource:
    """Rank 0's side of the buffer: one lease, one draw and one commit per step.

    Only rank 0 talks to the buffer. So the deviation of the replayed batch and the denominators of
    the loss are those of the whole step, without any further exchange (docs/method.md 1.1).
    """

    def __init__(self, buffer: ReplayBuffer, spec: LearnerSpec) -> None:
        self.buffer, self.spec = buffer, spec
        self.fencing_token = buffer.replay.new_fencing_token()

    def collect(self, step: int, waiting: Callable[[], None]) -> StepWork:
        """The step's groups, as soon as all are in, and its replays; ``waiting`` is called at every
        look. Raises ReplayBufferError when they do not arrive in time."""
        arrived = self._await_groups(step, waiting)
        groups, replaced = last_attempts(arrived, self.spec.attempts)
        replay, spec = self.buffer.replay, self.spec
        version = replay.version()
        replays: list[Trajectory] = []
        if groups:
            replays = replay.draw(
                len(groups) * spec.replayed * spec.learner.updates,
                step=step,
                seed=spec.seed,
                version=version,
                prompt_ids=[group.prompt_id for group in groups],
            )
        baselines = replay.baselines([r.prompt_id for r in replays], [r.hinted for r in replays])
        of_groups: list[float] = []
        if spec.learner.objective.fresh_advantage == "vcrs":
            of_groups = replay.baselines(
                [group.prompt_id for group in groups], [group.hinted for group in groups]
            )
        return StepWork(
            step,
            version,
            tuple(groups),
            tuple(replays),
            tuple(baselines),
            tuple(of_groups),
            tuple(replaced),
        )

    def standing(self, work: StepWork) -> dict[tuple[str, bool], Standing]:
        """Tier and Rbar of the step's prompts, by id and whether the hint was shown."""
        of_groups = [(group.prompt_id, group.hinted) for group in work.groups]
        keys = sorted({*of_groups, *((r.prompt_id, r.hinted) for r in work.replays)})
        prompts, hinted = [key[0] for key in keys], [key[1] for key in keys]
        replay = self.buffer.replay
        tiers, baselines = replay.tiers(prompts), replay.baselines(prompts, hinted)
        return {
            key: Standing(tier, baseline)
            for key, tier, baseline in zip(keys, tiers, baselines, strict=True)
        }

    def _await_groups(self, step: int, waiting: Callable[[], None]) -> Sequence[Group]:
        deadline = time.monotonic() + self.spec.step_timeout_s
        while True:
            waiting()
            share = self.buffer.replay.lease_fresh(
                "learner",
                step,
                lease_s=self.spec.learner.lease_s,
                fencing_token=self.fencing_token,
            )
            if share.ready:
                return share.groups
            if time.monotonic() > deadline:
                raise ReplayBufferError(
                    f"step {step}: {share.missing} of {share.expected} groups did not arrive "
                    f"within {self.spec.step_timeout_s:g} s: see whether rollout and reward actors "
                    "live, raise loop.step_timeout_s"
                )
            time.sleep(POLL_S)

    def commit(self, work: StepWork) -> None:
        """The step is trained; its version, which was published before, counts from now on."""
        self.buffer.replay.commit_step(
            work.step, work.version + 1, [group.id for group in work.groups], self.fencing_token
        )

    def report_behaviour_kl(self, step: int, found: Sequence[PromptKl]) -> None:
        """Each prompt's own KL to the behaviour policy, which opens its hint gate
        (docs/method.md 1.4)."""
        if found:
            self.buffer.replay.report_behaviour_kl(step, found)


def last_attempts(groups: Sequence[Group], attempts: int) -> tuple[list[Group], list[Group]]:
    """The groups that a step trains, and those that dynamic sampling replaced: of the ``attempts``
    seqs of one place in the step the last that came counts."""
    last = {group.seq // attempts: group.seq for group in sorted(groups, key=lambda g: g.seq)}
    trained = [group for group in groups if last[group.seq // attempts] == group.seq]
    kept = {group.id for group in trained}
    return trained, [group for group in groups if group.id not in kept]


@dataclass(frozen=True)
class StepPlan:
    """N completions: all fresh ones in order of their groups, then the replays."""

    trajectories: list[Trajectory]  # N
    is_replay: Tensor  # (N,) bool
    groups: Tensor  # (N,) int64, the mixed group that a completion is trained in
    advantages: Advantages
    totals: StepTotals
    ages: Tensor  # (replays,) policy versions since a replay was generated
    #: Per rank, or per group of ranks that share packs: micro-batches as indices into the N.
    shares: list[list[list[int]]]

    def sequences(self, kind: bool) -> int:
        return int((self.is_replay == kind).sum())


def plan_step(
    work: StepWork,
    config: LearnerConfig,
    *,
    ranks: int,
    max_tokens: int,
    only_advantages: bool = False,
) -> StepPlan:
    """Advantages over the whole step (docs/method.md 1.1) and a split that every rank computes
    alike; ``ranks`` that share packs count as one. With ``only_advantages`` completions whose
    advantage is 0 are in no share."""
    fresh = [trajectory for group in work.groups for trajectory in group.trajectories]
    trajectories = [*fresh, *work.replays]
    hosts = _hosts(work.groups, work.replays)
    is_replay = torch.tensor([False] * len(fresh) + [True] * len(work.replays))
    groups = torch.tensor(
        [i for i, group in enumerate(work.groups) for _ in group.trajectories] + hosts
    )
    prompts = [group.prompt_id for group in work.groups]
    same_prompt = [False] * len(fresh) + [
        replay.prompt_id == prompts[host] for replay, host in zip(work.replays, hosts, strict=True)
    ]
    objective = config.objective
    of_groups = work.group_baselines or (0.0,) * len(work.groups)
    of_fresh = [
        value
        for group, value in zip(work.groups, of_groups, strict=True)
        for _ in group.trajectories
    ]
    advantages = step_advantages(
        rewards_tensor([trajectory.reward for trajectory in trajectories]),
        groups,
        is_replay,
        torch.tensor([*of_fresh, *work.baselines], dtype=torch.float64),
        torch.tensor(same_prompt),
        scale_rewards=objective.scale_rewards,
        replay_advantage=objective.replay_advantage,
        fresh_advantage=objective.fresh_advantage,
        replay_sign=objective.replay_sign,
    )
    sizes = [Size((t.prompt_id, t.hinted), t.prompt_tokens, len(t.token_ids)) for t in trajectories]
    chosen = list(range(len(sizes)))
    if only_advantages:
        chosen = advantages.values.nonzero()[:, 0].tolist()
    shares = split([sizes[i] for i in chosen], config.pack_tokens(), ranks)
    return StepPlan(
        trajectories=trajectories,
        is_replay=is_replay,
        groups=groups,
        advantages=advantages,
        totals=StepTotals.count(
            torch.tensor([len(t.token_ids) for t in trajectories]),
            is_replay,
            objective,
            truncated=truncated(trajectories),
            max_completion_tokens=max_tokens,
        ),
        ages=torch.tensor([work.version - replay.version for replay in work.replays]),
        shares=[[[chosen[i] for i in pack] for pack in packs] for packs in shares],
    )


def truncated(trajectories: Sequence[Trajectory]) -> Tensor:
    """(N,) bool, completions that hit the length limit."""
    return torch.tensor([trajectory.finish_reason == "length" for trajectory in trajectories])


def _hosts(groups: Sequence[Group], replays: Sequence[Trajectory]) -> list[int]:
    """The mixed group each replay is trained in: one of its own prompt with room left, else the
    emptiest.

    Only ``joint`` advantages and the dead-group metrics look at this; VCRS does not depend on it.
    """
    room = -(-len(replays) // max(1, len(groups)))
    load = [0] * len(groups)
    by_prompt: dict[str, list[int]] = {}
    for index, group in enumerate(groups):
        by_prompt.setdefault(group.prompt_id, []).append(index)
    hosts: list[int] = [-1] * len(replays)
    for number, replay in enumerate(replays):
        host = next((i for i in by_prompt.get(replay.prompt_id, ()) if load[i] < room), None)
        if host is not None:
            hosts[number] = host
            load[host] += 1
    for number, host in enumerate(hosts):
        if host < 0:
            hosts[number] = min(range(len(groups)), key=lambda i: (load[i], i))
            load[hosts[number]] += 1
    return hosts
