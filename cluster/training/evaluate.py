"""`avatar evaluate`: held-out accuracy of a checkpoint, also without one of its modalities; and
Stage 0 with its result."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from avatar_rl.buffer_service.store import ReplayBuffer
from avatar_rl.cluster.config import RunConfig
from avatar_rl.cluster.recipe.assets import (
    check_media,
    prepare_base_model,
    prepare_datasets,
    read_prompts,
)
from avatar_rl.cluster.recipe.ready_start import ready_start
from avatar_rl.cluster.recipe.resources import needs_of
from avatar_rl.cluster.telemetry.run_folder import RunFolder, new_run_id
from avatar_rl.cluster.telemetry.screen import Screen
from avatar_rl.cluster.training.evaluation import Evaluation, EvaluationRounds
from avatar_rl.cluster.training.system import System, recorded, running_system
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
    # Nothing is trained here: the engines have the devices for themselves.
    alone = config.resources.model_copy(update={"colocate": False})
    config = config.model_copy(update={"resources": alone})
    needs = needs_of(config)
    check_judge(config.rewards)
    datasets = prepare_datasets(config, screen.phase, screen.progress)
    heldout = None if datasets.heldout is None else read_prompts(datasets.heldout, config)
    if heldout is not None:
        check_media(heldout, config.data.media.roots)
        _check_modalities(heldout, without)
    base = prepare_base_model(config, screen.phase)
    folder = RunFolder(config.output.folder / new_run_id(config.name), on_warning=screen.event)
    folder.config(config.model_dump(mode="json"))
    trains = config.cold_start if model is None and ready_start(config) is None else None
    needs = replace(needs, learners=trains.ranks if trains is not None else 0)
    evaluations: list[Evaluation] = []
    with contextlib.closing(folder), recorded(folder):
        with running_system(config, folder, screen, datasets, needs=needs) as system:
            policy = model if model is not None else system.starting_policy(base)
            if heldout is not None:
                system.pool.start_scorers(datasets.asked)
                evaluations += [_answer(system, kinds, policy, heldout) for kinds in without]
        folder.status(state="finished")
    return PolicyResult(policy.resolve(), folder.path, evaluations)


def _answer(system: System, kinds: Kinds, model: Path, heldout: PromptIndex) -> Evaluation:
    """One evaluation by rollout actors of its own; they end when it is done."""
    config, folder, screen, pool = system.config, system.folder, system.screen, system.pool
    run_id = "-".join((folder.path.name, *(("without", *kinds) if kinds else ())))[-64:]
    media = config.data.media.model_copy(update={"blank": kinds})
    data = config.data.model_copy(update={"media": media})
    learner = config.learner.model_copy(update={"lora": None})  # nothing is trained here
    blanked = config.model_copy(update={"data": data, "learner": learner})
    what = f"without {' and '.join(kinds)}" if kinds else ""
    with ReplayBuffer.connect(config.buffer, run_id, url=system.services.redis_url) as buffer:
        rounds = EvaluationRounds(
            config.evaluation,
            buffer,
            heldout.ids[: config.evaluation.limit],
            folder,
            screen,
            selected=matching(heldout, config.data.select),
        )
        fleet = system.rollout_fleet(blanked, run_id, model, buffer)
        screen.phase(f"starting actors {what}".strip(), f"{config.rollout.workers} vLLM")
        with contextlib.closing(fleet):
            fleet.start(config.rollout.workers)
            fleet.await_ready()
            pool.wait_ready([scorer.check.remote() for scorer in pool.scorers], "reward actors")
            fleet.work()
            rounds.evaluate(step=0, phase=f"evaluation {what}".strip(), watch=fleet.watch)
    return rounds.results[-1]


def _check_modalities(heldout: PromptIndex, without: Sequence[Kinds]) -> None:
    for kind in {kind for kinds in without for kind in kinds}:
        if not any(prompt.media.of(kind) for prompt in heldout):
            raise DataError(
                f"no held-out prompt has {kind}: there is nothing to take away with `without: "
                f"{kind}`"
            )
