"""Whether a run's media go through the embedding store, and why not where they do not."""

from __future__ import annotations

from collections.abc import Iterable

from avatar_rl.common.errors import ConfigError
from avatar_rl.learner.config import EmbeddingsConfig
from avatar_rl.prompts.embeddings.names import TOWERS


def trained_towers(trained: Iterable[str]) -> list[str]:
    """Towers with a parameter among the names ``trained``, an adapter's included."""
    parts = {part for name in trained for part in name.split(".")}
    return [word for word in TOWERS if word in parts]


def why_off(
    config: EmbeddingsConfig, *, kind: str, trained: Iterable[str], revision: str, reference: str
) -> str:
    """Why towers run in every step; empty where their embeddings are stored.

    ``trained`` are the names of the parameters that train, ``revision`` and ``reference`` those of
    the towers of policy and reference, empty where there are none. Raises ConfigError where
    learner.embeddings.mode asks for the store and it cannot be.
    """
    towers = trained_towers(trained)
    if config.mode in ("off", "pixels"):
        return f"learner.embeddings.mode is {config.mode}"
    if not revision:
        why, remedy = f"model type {kind!r} has no vision or audio tower", "set it to auto"
    elif towers:
        why = f"the towers train: {' and '.join(towers)}"
        remedy = f"add {' and '.join(towers)} to learner.optimizer.freeze (and to no adapter)"
    elif reference not in ("", revision):
        why = "the reference policy's towers have other weights than the policy's"
        remedy = "take a reference with the same towers"
    else:
        return ""
    if config.mode == "on":
        raise ConfigError(f"learner.embeddings.mode is on, but {why}: {remedy}, or set it to off")
    return why
