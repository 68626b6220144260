"""From the run's configuration to what each kind of actor is told."""

from __future__ import annotations

from pathlib import Path

from avatar_rl.actors.spec import RolloutSpec
from avatar_rl.cluster.config import RunConfig
from avatar_rl.cluster.recipe.assets import Datasets
from avatar_rl.learner.spec import LearnerSpec


def rollout_spec(
    config: RunConfig, run_id: str, model: Path, datasets: Datasets, redis_url: str
) -> RolloutSpec:
    rollout = config.rollout
    return RolloutSpec(
        run_id=run_id,
        seed=config.seed,
        model=model,
        datasets=datasets.asked,
        data=config.data.reader,
        media=config.data.media,
        template=config.data.template,
        engine=rollout.engine,
        sampling=rollout.sampling,
        evaluation_tokens=config.evaluation.max_tokens,
        buffer=config.buffer,
        redis_url=redis_url,
        max_sequences=rollout.max_sequences,
        max_staleness=config.loop.max_staleness,
        lease_s=rollout.lease_s,
        scores_together=config.rewards.quick,
        unimodal=config.rewards.asks_unimodal,
    )


def learner_spec(
    config: RunConfig,
    run_id: str,
    model: Path,
    datasets: Datasets,
    redis_url: str,
    *,
    cold_start: bool = False,
) -> LearnerSpec:
    assert not cold_start or datasets.sft is not None
    learner = config.learner
    if cold_start and config.cold_start is not None:
        sft = config.cold_start
        learner = learner.model_copy(
            update={"ranks": sft.ranks, "micro_batch_tokens": sft.micro_batch_tokens}
        )
    return LearnerSpec(
        run_id=run_id,
        seed=config.seed,
        model=model,
        reference=config.model.reference or model,
        datasets=(datasets.sft,) if cold_start and datasets.sft is not None else datasets.asked,
        data=config.data.reader,
        media=config.data.media,
        template=config.data.template,
        learner=learner,
        sft=config.cold_start if cold_start else None,
        buffer=config.buffer,
        redis_url=redis_url,
        steps=config.loop.steps,
        replayed=config.loop.replayed,
        max_tokens=config.rollout.sampling.max_tokens,
        step_timeout_s=config.loop.step_timeout_s,
        hold_bytes=0 if cold_start else config.checkpoint.hold_bytes,
    )
