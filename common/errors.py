"""Typed errors of the whole project. Every message names the input at fault and the remedy."""

from __future__ import annotations

from pathlib import Path

from avatar_rl.common.text import shortened


class AvatarError(Exception):
    """Base of every error a user can cause or cure."""


class ConfigError(AvatarError):
    """A recipe or an override is wrong (unknown key, impossible value, missing file)."""


class DataError(AvatarError):
    """A dataset, a prompt or a media file is missing, malformed or out of bounds."""


class InputError(DataError):
    """What is wrong with one input and what to do. Survives pickling.

    ``where`` is a file or "file:line". Place, fault and remedy are kept apart, so that a report can
    show them in columns. ``what`` may quote the input, so it is cut to ``MOST_CHARS``.
    """

    MOST_CHARS = 400

    def __init__(self, where: str | Path, what: str, remedy: str) -> None:
        what = shortened(what, self.MOST_CHARS)
        super().__init__(str(where), what, remedy)
        self.where = str(where)
        self.what = what
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.where}: {self.what}; {self.remedy}"


class ModelError(AvatarError):
    """A model folder is incomplete, or rollout and learner sides disagree about the model."""


class ResourceError(AvatarError):
    """The machine or cluster does not have what the run asks for."""


class NothingLearntError(AvatarError):
    """A run trains on nothing, or on nothing that could teach: it ends instead of going through its
    steps."""


class ReplayBufferError(AvatarError):
    """The replay buffer service is unreachable, misconfigured, full, or was handed a bad record."""
