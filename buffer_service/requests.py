"""The prompt stream: requests, their leases, and the results that acknowledge them."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Sequence
from itertools import groupby

import msgspec
from redis.client import Pipeline

from avatar_rl.buffer_service.config import DEFAULT_LEASE_S
from avatar_rl.buffer_service.errors import RecordError
from avatar_rl.buffer_service.records.codec import encode
from avatar_rl.buffer_service.records.requests import (
    EvalResults,
    GroupState,
    InsertReceipt,
    NewGroup,
    RequestLease,
    RolloutRequest,
    StoredRequest,
    advantages_of,
)
from avatar_rl.buffer_service.records.trajectory import Group
from avatar_rl.buffer_service.records.validate import (
    MAX_SEQ,
    accuracy_marks,
    check_group,
    is_success,
    zero_accuracy,
)
from avatar_rl.buffer_service.redis.connection import Connection
from avatar_rl.buffer_service.redis.scripting import UNCHECKED

_pack = msgspec.msgpack.Encoder().encode


_stored = msgspec.msgpack.Decoder(StoredRequest).decode


def _check_request(t: RolloutRequest) -> None:
    if not 0 <= t.seq < MAX_SEQ or not 0 <= t.step < 10**7 or not 0 <= t.round < 10**6:
        raise RecordError(
            f"request {t.seq}: seq must be below 1e8, step below 1e7, round below 1e6, none "
            "negative"
        )
    if t.n < 1 or t.min_version < 0 or not t.prompt_id or t.kind not in ("train", "eval"):
        raise RecordError(
            f"request {t.seq}: n {t.n}, min_version {t.min_version}, prompt {t.prompt_id!r}, kind "
            f"{t.kind}"
        )


class RequestQueue:
    """Requests are leased in order of step and seq, evaluation first. A lease ends by the clock of
    Redis alone."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._run = connection.run

    def push(self, requests: Iterable[RolloutRequest]) -> int:
        """Appends requests and returns how many were new. O(n log N).

        Those of one step or round are appended at once. Idempotent by (kind, round, seq): a request
        that waits, is held or was settled is left alone. Raises RecordError."""
        ordered = sorted(requests, key=lambda t: (t.kind, t.round, t.step, t.seq))
        for request in ordered:
            _check_request(request)
        new = 0
        for _, together in groupby(
            ordered, key=lambda t: (t.kind, t.round, t.step if t.kind == "train" else 0)
        ):
            words = [word for t in together for word in (t.key, _pack(StoredRequest.of(t)))]
            new += self._run("push", *words)
        return new

    def lease(
        self,
        consumer: str,
        count: int,
        lease_s: float = DEFAULT_LEASE_S,
        max_staleness: int = 1,
        completions: int | None = None,
    ) -> list[RequestLease]:
        """Leases up to ``count`` requests, none when nothing is admissible. O(count log N).

        A train request is admissible while ``step <= version + max_staleness`` and ``min_version <=
        version``. Expired leases go back to the queue first.

        Args:
            completions: bound of what the leases ask for together. They come in order, up to the
                first that does not fit."""
        lease_ms = int(lease_s * 1000)
        rows = self._run(
            "lease",
            consumer,
            count,
            lease_ms,
            max_staleness,
            secrets.token_hex(8),
            completions or 0,
        )
        return [_stored(raw).lease(bool(hinted)) for _, raw, hinted in rows]

    def renew(
        self, consumer: str, leases: Sequence[RequestLease], lease_s: float = DEFAULT_LEASE_S
    ) -> list[RequestLease]:
        """Extends leases and returns those still held by ``consumer``. Stop work on the others."""
        mine = [lease for lease in leases if lease.consumer == consumer]
        return self._extend("renew", mine, lease_s)

    def release(self, leases: Sequence[RequestLease]) -> int:
        """Gives leases back unfinished and returns how many were still held."""
        return len(self._extend("release", leases, 0.0))

    def abandon(self, consumer: str) -> int:
        """Gives back the leases of a consumer that is known to be dead, before they expire. Returns
        how many requests wait again. O(leases)."""
        return int(self._run("abandon", consumer))

    def outstanding(self) -> list[RolloutRequest]:
        """All requests that wait or are leased, in no order. O(requests); changes nothing."""
        found = self._connection.attempt(
            lambda: self._connection.client.hvals(self._connection.key("tickets"))
        )
        return [_stored(raw).request for raw in found]

    def unsettled(self) -> int:
        """How many requests wait or are leased. O(1); changes nothing."""
        key = self._connection.key("tickets")
        return int(self._connection.attempt(lambda: self._connection.client.hlen(key)))

    def _extend(
        self, verb: str, leases: Sequence[RequestLease], lease_s: float
    ) -> list[RequestLease]:
        if not leases:
            return []
        words = [word for lease in leases for word in (lease.request.key, lease.attempt)]
        held = {key.decode() for key in self._run("extend", verb, int(lease_s * 1000), *words)}
        return [lease for lease in leases if lease.request.key in held]

    def quarantine(self, lease: RequestLease, reason: str, detail: str = "") -> bool:
        """Gives up on the lease's prompt: it is never leased again.

        The request counts as dropped(reason) in the ledger; its step needs one group less. False
        when the request was settled before."""
        return bool(self._run("quarantine", lease.request.key, reason, detail, 0))

    def drop(self, lease: RequestLease, reason: str) -> bool:
        """Gives up on this one group; its prompt stays.

        The request counts as dropped(reason) in the ledger; its step needs one group less. False
        when the request was settled before."""
        return bool(self._run("quarantine", lease.request.key, reason, "", 1))

    def add_group(
        self,
        group: Group,
        lease: RequestLease,
        *,
        tokens_generated: int,
        bound: int | None = None,
        replace: bool = False,
    ) -> InsertReceipt:
        """Stores a scored group, updates its prompt and acknowledges the request, all or nothing.

        O(G + s log N), s the prompt's stored trajectories. Idempotent by group id. The group is
        late, so for replay only, when its step is trained or ``step + bound < version``.

        With ``replace`` a group that is not late is followed by a request for the first spare
        prompt of its own request: under the next seq, in the same step, which waits for it too.

        Raises RecordError (malformed), UnknownRequestError (not what its request asks for),
        BufferFullError; then nothing changed."""
        if tokens_generated < 0 or (bound is not None and bound < 0):
            raise RecordError(
                f"group {group.id}: tokens_generated {tokens_generated} or bound {bound} is "
                "negative"
            )
        return self._insert(group, lease.request.key, tokens_generated, bound, replace=replace)

    def add_imported(self, group: Group) -> InsertReceipt:
        """Stores a group from a file, for replay only: no request asks for it.

        Raises RecordError when it is malformed or a request of this run waits for its seq."""
        return self._insert(group, f"t:{group.id}", 0, None, imported=True)

    def _insert(
        self,
        group: Group,
        request: str,
        tokens: int,
        bound: int | None,
        *,
        imported: bool = False,
        replace: bool = False,
    ) -> InsertReceipt:
        check_group(group)
        self._connection.check_memory()
        config = self._connection.config
        component = config.hints.accuracy_component
        records = [encode(t) for t in group.trajectories]
        head = NewGroup(
            id=group.id,
            seq=group.seq,
            step=group.step,
            prompt_id=group.prompt_id,
            hinted=group.hinted,
            tokens=tokens,
            request=request,
            bound=UNCHECKED if bound is None else bound,
            imported=imported,
            rewards=[float(t.reward) for t in group.trajectories],
            marks=accuracy_marks(group, component),
            counted="".join("01"[i not in group.imputed] for i in range(len(group.trajectories))),
            replace=replace,
        )
        state = GroupState(
            prompt_id=group.prompt_id,
            step=group.step,
            hinted=group.hinted,
            n=len(group.trajectories),
            zero=zero_accuracy(group, component),
            successes=[
                int(is_success(t, component, config.success_at)) for t in group.trajectories
            ],
            versions=[t.version for t in group.trajectories],
            advantages=advantages_of(head.rewards),
        )
        status, evicted = self._run("insert", _pack(head), _pack(state), *records)
        return InsertReceipt(status.decode(), evicted)

    def add_eval(self, lease: RequestLease, payload: bytes) -> bool:
        """Stores one evaluation result and acknowledges its request. False when it was settled
        before."""
        return bool(self._run("evaluate", lease.request.key, payload))

    def eval_results(self, round: int) -> EvalResults:
        """What has arrived of an evaluation round."""
        key = self._connection.key

        def ask(pipe: Pipeline) -> None:
            pipe.hget(key("rounds"), str(round))
            pipe.hgetall(key(f"eval:{round}"))

        expected, payloads = self._connection.together(ask)
        missing = int(expected or 0) - len(payloads)
        results = {int(seq): data for seq, data in sorted(payloads.items())}
        return EvalResults(
            complete=expected is not None and missing <= 0, missing=missing, payloads=results
        )

    def clear_eval(self, round: int) -> None:
        """Forgets the payloads of a round; its requests stay settled."""
        key = self._connection.key

        def forget(pipe: Pipeline) -> None:
            pipe.sadd(key("rounds:done"), round)
            pipe.hdel(key("rounds"), str(round))
            pipe.unlink(key(f"eval:{round}"))

        self._connection.together(forget)

    def quarantined(self) -> dict[str, str]:
        """Prompts given up on, each with its reason."""
        found = self._connection.attempt(
            lambda: self._connection.client.hgetall(self._connection.key("quarantine"))
        )
        return {prompt.decode(): reason.decode() for prompt, reason in found.items()}
