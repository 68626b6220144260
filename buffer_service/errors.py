"""Typed errors of the replay buffer. Each says which input was wrong, and what to do."""

from __future__ import annotations

from avatar_rl.common.errors import ReplayBufferError


class BufferUnreachableError(ReplayBufferError):
    """Redis did not answer within the deadline."""


class BufferAccessError(ReplayBufferError):
    """Redis answered but will not serve us: wrong password, missing permission, read-only
    replica."""


class BufferSetupError(ReplayBufferError):
    """The server or the namespace does not fit: too old, evicting, another run's configuration or
    format."""


class BufferFullError(ReplayBufferError):
    """Redis has no room: its memory or its disk is full; nothing was written."""


class RecordError(ReplayBufferError):
    """A record is malformed, corrupt, foreign or of a newer format."""


class UnknownRequestError(ReplayBufferError):
    """A group or lease does not belong to a request of this run."""


class FencedError(ReplayBufferError):
    """A learner that was declared dead tried to continue: a newer one has the fencing token."""


class LeaseHeldError(ReplayBufferError):
    """Another consumer holds this share of the step."""


class StepTrainedError(ReplayBufferError):
    """The step was acknowledged before; its fresh groups and draws are over."""


class VersionError(ReplayBufferError):
    """A policy version would go backwards."""


class LedgerError(ReplayBufferError):
    """The ledger does not balance: some generated groups are unaccounted for."""
