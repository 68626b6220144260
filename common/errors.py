"""Typed errors of the whole project. Every message names the input at fault and the remedy."""

from __future__ import annotations


class AvatarError(Exception):
    """Base of every error a user can cause or cure."""


class ConfigError(AvatarError):
    """A recipe or an override is wrong (unknown key, impossible value, missing file)."""


class DataError(AvatarError):
    """A dataset, a prompt or a media file is missing, malformed or out of bounds."""


class ModelError(AvatarError):
    """A model folder is incomplete, or rollout and learner sides disagree about the model."""


class ResourceError(AvatarError):
    """The machine or cluster does not have what the run asks for."""


class ReplayBufferError(AvatarError):
    """The replay buffer service is unreachable, misconfigured, full, or was handed a bad record."""
