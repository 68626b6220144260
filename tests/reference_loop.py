"""AVATAR as one plain loop in one process: no Ray, no Redis, no DeepSpeed, no threads. What a run
must reproduce.

``python -m tests.reference_loop RECIPE OUT`` trains what ``avatar train RECIPE`` does at
``loop.max_staleness: 0``; it writes OUT/model.safetensors under the published names and
OUT/steps.json. Prompt order, admission, sampling seeds, learning rate, optimiser, clipping and
weight adoption are written out here again; the objective's formulas, which have tests of their own,
are shared."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from avatar_rl.actors.config import RequestSampling
from avatar_rl.actors.engine.engine import FinishedRequest, RolloutEngine
from avatar_rl.buffer_service.records.requests import RequestLease, RolloutRequest
from avatar_rl.buffer_service.records.trajectory import Group, Trajectory
from avatar_rl.cluster.config import RunConfig
from avatar_rl.cluster.recipe.load import load_recipe
from avatar_rl.learner.batch.microbatch import Row, collate, padded
from avatar_rl.learner.batch.plan import StepPlan, StepWork, plan_step
from avatar_rl.learner.model.policy import Policy, PolicyOutput
from avatar_rl.learner.objective.loss import policy_loss
from avatar_rl.learner.objective.shaping import tas_weights
from avatar_rl.prompts.datasets import PromptIndex
from avatar_rl.prompts.encoding.digest import prompt_digest
from avatar_rl.prompts.encoding.template import PromptEncoder
from avatar_rl.prompts.media.loader import MediaLoader
from avatar_rl.rewards.record import Completion, ScoreRequest
from avatar_rl.rewards.suite import RewardSuite
from tests.reference_buffer import ReferenceBuffer
from tests.tiny_models import load_reference


class ReferenceLoop:
    """The state of the loop: two policies, an engine, an optimiser and the buffer in plain
    dictionaries."""

    def __init__(self, config: RunConfig) -> None:
        assert config.data.train is not None and config.loop.max_staleness == 0
        self.config = config
        self.prompts = PromptIndex.read([config.data.train], config.data.reader)
        model = Path(config.model.path)
        self.encoder = PromptEncoder(
            model, MediaLoader(config.data.media, Path(".")), config.data.template
        )
        self.policy = Policy(load_reference(model))
        for name, parameter in self.policy.named_parameters():
            frozen = any(word in name for word in config.learner.optimizer.freeze)
            parameter.requires_grad_(not frozen)
        self.reference = Policy(load_reference(model))
        self.engine = RolloutEngine(model, config.rollout.engine)
        self.rewards = RewardSuite(config.rewards)
        self.buffer = ReferenceBuffer(config.buffer)
        self.fencing_token = self.buffer.replay.new_fencing_token()
        settings = config.learner.optimizer
        assert settings.weight_decay == 0
        self.trained = [p for p in self.policy.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.trained,
            lr=settings.lr,
            betas=settings.betas,
            eps=settings.eps,
            weight_decay=0,
        )

    def weights(self) -> dict[str, Tensor]:
        """The policy under its published names."""
        named = self.policy.named_parameters()
        return {
            "thinker." + name.removeprefix("model."): value.detach().clone()
            for name, value in named
        }

    def step(self, step: int) -> dict[str, Any]:
        """Ask, generate, score, insert, draw, train, adopt, commit."""
        loop = self.config.loop
        requests = self._requests(step)
        self.buffer.requests.push(requests)
        for lease in self.buffer.requests.lease("reference", len(requests), max_staleness=0):
            group = self._score(lease, self._generate(lease))
            generated = sum(len(t.token_ids) for t in group.trajectories)
            self.buffer.requests.add_group(group, lease, tokens_generated=generated)
        groups = self.buffer.replay.lease_fresh("reference", step).groups
        replays = self.buffer.replay.draw(
            len(groups) * loop.replayed,
            step=step,
            seed=self.config.seed,
            version=step,
            prompt_ids=[group.prompt_id for group in groups],
        )
        baselines = self.buffer.replay.baselines(
            [r.prompt_id for r in replays], [r.hinted for r in replays]
        )
        work = StepWork(step, step, tuple(groups), tuple(replays), tuple(baselines))
        loss, norm = self._train(work)
        self.engine.adopt(step + 1, self.weights().items())
        self.buffer.replay.commit_step(
            step, step + 1, [group.id for group in groups], self.fencing_token
        )
        fresh = [t for group in groups for t in group.trajectories]
        return {
            "loss": loss,
            "grad_norm": norm,
            "reward": float(np.mean([t.reward for t in fresh])),
            "fresh": len(fresh),
            "replayed": len(replays),
            "hinted": sum(t.hinted for t in fresh),
            "tokens": sum(len(t.token_ids) for t in [*fresh, *replays]),
        }

    def _requests(self, step: int) -> list[RolloutRequest]:
        """Prompts of a step: endless epochs, each shuffled from (seed, epoch). Whole groups until
        replay is warm."""
        loop, count = self.config.loop, self.config.loop.prompts_per_step
        group = loop.fresh + loop.replayed
        cold = loop.replayed > 0 and step * count * group < self.config.buffer.warm_up
        requests = []
        for seq in range(step * count, (step + 1) * count):
            epoch, position = divmod(seq, len(self.prompts))
            order = np.random.default_rng((self.config.seed, epoch)).permutation(len(self.prompts))
            prompt_id = self.prompts.ids[int(order[position])]
            requests.append(
                RolloutRequest(
                    seq=seq,
                    prompt_id=prompt_id,
                    step=step,
                    epoch=epoch,
                    n=group if cold else loop.fresh,
                )
            )
        return requests

    def _generate(self, lease: RequestLease) -> FinishedRequest:
        request = lease.request
        seed = (
            int(np.random.SeedSequence((self.config.seed, request.seq)).generate_state(1)[0]) >> 1
        )
        sampling = RequestSampling.of(self.config.rollout.sampling, request.n)
        engine_input = self.encoder.engine_input(
            self.prompts[request.prompt_id], hinted=lease.hinted
        )
        self.engine.submit(request.key, engine_input, sampling, seed=seed)
        finished: list[FinishedRequest] = []
        while not finished:
            finished = self.engine.step()
        return finished[0]

    def _score(self, lease: RequestLease, finished: FinishedRequest) -> Group:
        request, parts = lease.request, finished.completions
        completions = [
            Completion(
                text=part.text,
                finished=part.finish_reason == "stop",
                mean_logprob=float(part.logprobs.mean()),
                tokens=len(part.token_ids),
            )
            for part in parts
        ]
        asked = ScoreRequest(
            prompt=self.prompts[request.prompt_id], completions=completions, opened_tag=""
        )
        name = f"{request.seq:08d}"
        trajectories = []
        for index, (part, scored) in enumerate(zip(parts, self.rewards.score(asked), strict=True)):
            assert scored.reward is not None
            trajectories.append(
                Trajectory(
                    id=f"{name}.{index}",
                    group_id=name,
                    prompt_id=request.prompt_id,
                    index=index,
                    hinted=lease.hinted,
                    prompt_tokens=len(finished.prompt_token_ids),
                    prompt_digest=prompt_digest(finished.prompt_token_ids),
                    token_ids=part.token_ids,
                    logprobs=part.logprobs,
                    versions=part.versions,
                    finish_reason=part.finish_reason,
                    temperature=self.config.rollout.sampling.temperature,
                    reward=scored.reward,
                    components=scored.components,
                    step=request.step,
                )
            )
        return Group(
            id=name,
            prompt_id=request.prompt_id,
            seq=request.seq,
            step=request.step,
            hinted=lease.hinted,
            trajectories=tuple(trajectories),
        )

    def _train(self, work: StepWork) -> tuple[float, float]:
        """One AdamW step on the clipped gradient of the whole step's loss; returns loss and norm
        before clipping."""
        config = self.config.learner
        plan = plan_step(work, config, ranks=1, max_tokens=self.config.rollout.sampling.max_tokens)
        total = 0.0
        for indices in plan.shares[0]:
            loss = self._loss(plan, indices)
            loss.backward()
            total += float(loss.detach())
        norm = torch.nn.utils.clip_grad_norm_(self.trained, config.optimizer.max_grad_norm)
        steps, warmup = self.config.loop.steps, round(config.warmup * self.config.loop.steps)
        assert config.schedule == "constant" and work.step < steps
        for group in self.optimizer.param_groups:
            group["lr"] = config.optimizer.lr * min(1.0, (work.step + 1) / max(warmup, 1))
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total, float(norm)

    def _loss(self, plan: StepPlan, indices: list[int]) -> Tensor:
        config = self.config.learner.objective
        chosen = [plan.trajectories[i] for i in indices]
        rows = [self._row(t) for t in chosen]
        batch = collate(rows)
        output: PolicyOutput = self.policy(batch)
        with torch.no_grad():
            reference = self.reference(batch).logprobs
        return policy_loss(
            output.logprobs,
            padded([t.logprobs for t in chosen]),
            batch.mask,
            plan.advantages.values[indices].float(),
            tas_weights(batch.mask, config.tas_shape, config.tas_lambda, config.tas_normalize),
            plan.is_replay[indices],
            reference,
            config,
            totals=plan.totals,
        ).loss

    def _row(self, t: Trajectory) -> Row:
        encoded = self.encoder.encode(self.prompts[t.prompt_id], hinted=t.hinted)
        assert encoded.digest == t.prompt_digest
        return Row((t.prompt_id, t.hinted), encoded, t.token_ids, t.temperature)


def main(recipe: Path, out: Path) -> None:
    torch.set_num_threads(1)
    config = load_recipe(recipe)
    loop = ReferenceLoop(config)
    steps = [loop.step(step) for step in range(config.loop.steps)]
    out.mkdir(parents=True)
    save_file(loop.weights(), out / "model.safetensors")
    (out / "steps.json").write_text(json.dumps(steps, indent=1))
    loop.engine.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
