"""`avatar evaluate`: held-out accuracy of a checkpoint, also without one of its modalities; and
Stage 0 with its result."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from avatar_rl.buffer_service.store import ReplayBuffer
from avatar_rl.cluster.config import RunConfig
from avatar_rl.cluster.recipe.assets import (
    Datasets,
    check_media,
    prepare_base_model,
    prepare_datasets,
    read_prompts,
)
from avatar_rl.cluster.recipe.resources import needs_of
from avatar_rl.cluster.services.services import Services
from avatar_rl.cluster.telemetry.run_folder import RunFolder, new_run_id
from avatar_rl.cluster.telemetry.screen import Screen
from avatar_rl.cluster.training.coldstart import cold_start
from avatar_rl.cluster.training.evaluation import Evaluation
from avatar_rl.cluster.training.evaluation_rounds import EvaluationRounds
from avatar_rl.cluster.workers.pool import Pool
from avatar_rl.cluster.workers.rollout_fleet import Fleet
from avatar_rl.cluster.workers.specs import rollout_spec
from avatar_rl.common.errors import DataError
from avatar_rl.prompts.datasets import PromptIndex
from avatar_rl.prompts.record import Modality
from avatar_rl.prompts.selection import matching
from avatar_rl.rewards.actor import check_judge

Kinds = tuple[Modality, ...]


@dataclass(frozen=True)
class PolicyResult:
    """A policy and what it can do; ``evaluations`` in the order of the modalities that were taken
    away."""

    model: Path
    run: Path
    evaluations: list[Evaluation]


def evaluate(
    config: RunConfig,
    screen: Screen,
    *,
    model: Path | None = None,
    without: Sequence[Kinds] = ((),),
) -> PolicyResult:
    """Answer the held-out prompts greedily, once per entry of ``without`` (silence for sound, black
    for pictures).

    Without a ``model`` it is the cold start of the recipe, trained first unless the cache has it.
    Without held-out prompts there are no evaluations. Raises AvatarError children as a run does.
    """
    needs_of(config)
    check_judge(config.rewards)
    datasets = prepare_datasets(config, screen.phase)
    heldout = None if datasets.heldout is None else read_prompts(datasets.heldout, config)
    if heldout is not None:
        check_media(heldout)
        _check_modalities(heldout, without)
    base = prepare_base_model(config, screen.phase)
    run_id = new_run_id(config.name)
    folder = RunFolder(config.output.folder / run_id, on_warning=screen.event)
    folder.config(config.model_dump(mode="json"))
    try:
        services = Services(config, folder.path)
        trains = config.cold_start if model is None else None
        services.needs = replace(services.needs, learners=trains.ranks if trains is not None else 0)
        with services:
            try:
                pool = Pool(config, services)
                pool.start_weight_store()
                if model is None:
                    model = (
                        cold_start(config, pool, base, datasets, screen)
                        if config.cold_start
                        else base
                    )
                evaluations = []
                if heldout is not None:
                    pool.start_scorers(datasets.asked)
                    for kinds in without:
                        evaluations.append(
                            _answer(config, kinds, pool, model, datasets, heldout, folder, screen)
                        )
            finally:
                services.save_logs(folder.path / "logs")
        folder.status(state="finished")
    except BaseException as error:
        folder.status(
            state="interrupted" if isinstance(error, KeyboardInterrupt) else "failed",
            error=str(error),
        )
        raise
    finally:
        folder.close()
    return PolicyResult(model.resolve(), folder.path, evaluations)


def _answer(
    config: RunConfig,
    kinds: Kinds,
    pool: Pool,
    model: Path,
    datasets: Datasets,
    heldout: PromptIndex,
    folder: RunFolder,
    screen: Screen,
) -> Evaluation:
    """One evaluation by rollout actors of its own; they go when it is done."""
    run_id = "-".join((folder.path.name, *(("without", *kinds) if kinds else ())))[-64:]
    media = config.data.media.model_copy(update={"blank": kinds})
    data = config.data.model_copy(update={"media": media})
    seen = config.model_copy(update={"data": data})
    url = pool.services.redis_url
    with ReplayBuffer.connect(config.buffer, run_id, url=url) as buffer:
        chosen = heldout.ids[: config.evaluation.limit]
        trained = matching(heldout, config.data.select)
        rounds = EvaluationRounds(
            config.evaluation, buffer, chosen, folder, screen, selected=trained
        )
        spec = rollout_spec(seen, run_id, model, datasets, url)
        fleet = Fleet(pool, spec, buffer, folder, screen, scaling=config.rollout)
        what = f"without {' and '.join(kinds)}" if kinds else ""
        screen.phase(f"starting actors {what}".strip(), f"{config.rollout.workers} vLLM")
        try:
            fleet.start(config.rollout.workers)
            fleet.await_ready()
            pool.wait_ready([scorer.check.remote() for scorer in pool.scorers], "reward actors")
            fleet.work()
            rounds.whole(step=0, phase=f"evaluation {what}".strip(), watch=fleet.watch)
        finally:
            _dismiss(fleet, pool)
    return rounds.results[-1]


def _dismiss(fleet: Fleet, pool: Pool) -> None:
    """Stop the rollout actors and give their resources back."""
    import ray

    fleet.stop()
    actors: list[Any] = list(pool.rollouts.values())
    pool.rollouts.clear()
    for actor in actors:
        ray.kill(actor)


def _check_modalities(heldout: PromptIndex, without: Sequence[Kinds]) -> None:
    for kind in {kind for kinds in without for kind in kinds}:
        if not any(prompt.media.of(kind) for prompt in heldout):
            raise DataError(
                f"no held-out prompt has {kind}: there is nothing to take away with `without: "
                f"{kind}`"
            )
