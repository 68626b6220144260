"""A group on its way: the prompt's parts in the engine, what is scored, what is stored.

With the fusion reward a prompt is generated three times: whole, and with what is seen of it and
what is heard of it alone. Only the fusion reward looks at the two unimodal parts. They have no
gradient, and the i-th of each is compared with the i-th completion of the whole prompt
(docs/method.md 2.2).
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from avatar_rl.buffer_service.records.trajectory import Group, Trajectory
from avatar_rl.common.errors import DataError
from avatar_rl.common.scoring import Completion, CompletionScore, UnscoredGroup
from avatar_rl.prompts.encoding.digest import prompt_digest
from avatar_rl.prompts.record import MediaPlan, Modality, Prompt

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from avatar_rl.actors.engine.engine import FinishedRequest
    from avatar_rl.actors.engine.prompt_cache import RenderedPrompt
    from avatar_rl.buffer_service.records.requests import RequestLease
    from avatar_rl.common.types import JsonObject

#: Text of some tokens.
Decode = Callable[[list[int]], str]
#: What is compared to find a group that teaches nothing.
DeadBy = Literal["accuracy", "reward"]
#: The part that is trained on.
WHOLE = ""
#: By unimodal part, the media it keeps.
UNIMODAL: dict[str, frozenset[Modality]] = {
    "video": frozenset({"video", "image"}),
    "audio": frozenset({"audio"}),
}
MAX_PARTS = 1 + len(UNIMODAL)  # of one prompt


def parts_of(prompt: Prompt, *, unimodal: bool) -> dict[str, Prompt]:
    """The whole prompt first and, with ``unimodal``, what is seen of it and what is heard of it.

    A prompt that cannot be both seen and heard is its only part.
    """
    parts = {WHOLE: prompt}
    if not unimodal:
        return parts
    for part, kinds in UNIMODAL.items():
        items = tuple(item for item in prompt.media.items if item.kind in kinds)
        if not items:
            return {WHOLE: prompt}
        parts[part] = prompt.model_copy(update={"media": MediaPlan(items=items)})
    return parts


@dataclass
class PendingGroup:
    """A leased prompt: one request to the engine for each of its parts, and what came of them."""

    lease: RequestLease
    prompt: Prompt
    prepared: dict[str, RenderedPrompt]  # by part, the whole prompt first
    finished: dict[str, FinishedRequest] = field(default_factory=dict)  # by part
    opened_tag: str | None = None  # the think tag that the prompt ends with, "" for none
    decode: Decode | None = None  # from tokens to text, where the answers' log-probabilities count

    @property
    def key(self) -> str:
        """The request's name in the buffer."""
        return self.lease.request.key

    @property
    def sequences(self) -> int:
        """Completions that the engine generates for it."""
        return self.lease.request.n * len(self.prepared)

    @property
    def done(self) -> bool:
        """All parts have ended."""
        return self.finished.keys() == self.prepared.keys()

    @property
    def whole(self) -> FinishedRequest:
        """What is trained on. Raises KeyError before it is finished."""
        return self.finished[WHOLE]

    @property
    def tokens(self) -> int:
        """Tokens generated for it, those of the unimodal parts included."""
        return sum(
            len(one.token_ids) for request in self.finished.values() for one in request.completions
        )

    def request_id(self, part: str) -> str:
        """The engine's name of a part; ``read_request_id`` is the way back."""
        return f"{self.key}/{part}"

    @property
    def request_ids(self) -> list[str]:
        return [self.request_id(part) for part in self.prepared]

    def unscored(self) -> UnscoredGroup:
        """The group as the reward actor takes it.

        Raises DataError for a completion whose log-probabilities are not finite.
        """
        parts = {
            part: completions_of(request, self.decode) for part, request in self.finished.items()
        }
        return UnscoredGroup(
            prompt_id=self.prompt.id,
            completions=parts[WHOLE],
            video_only=parts.get("video"),
            audio_only=parts.get("audio"),
            opened_tag=self.opened_tag,
        )


def read_request_id(request_id: str) -> tuple[str, str]:
    """(request key, part) of ``PendingGroup.request_id``."""
    key, _, part = request_id.partition("/")
    return key, part


def completions_of(finished: FinishedRequest, decode: Decode | None = None) -> list[Completion]:
    """What a reward may know of each completion. Raises DataError as ``Completion`` does."""
    return [
        Completion(
            text=item.text,
            finished=item.finish_reason == "stop",
            mean_logprob=float(item.logprobs.mean()) if len(item.token_ids) else 0.0,
            tokens=len(item.token_ids),
            answer_logprob=(
                None if decode is None else answer_logprob(item.token_ids, item.logprobs, decode)
            ),
        )
        for item in finished.completions
    ]


def answer_logprob(
    token_ids: NDArray[np.int32], logprobs: NDArray[np.float32], decode: Decode
) -> float | None:
    """Mean log-probability of the tokens between the last `<answer>` and its closing tag; None
    without such an answer.

    A token that also holds a part of a tag belongs to the answer. ``decode`` must keep every
    token's text, so that a longer run of tokens has no shorter text."""
    ids = token_ids.tolist()
    text = decode(ids)
    opened = text.rfind("<answer>")
    start, end = opened + len("<answer>"), text.find("</answer>", opened)
    if opened < 0 or end < 0 or not text[start:end].strip():
        return None

    def length(count: int) -> int:
        return len(decode(ids[:count]))

    # tokens before the answer, and up to its last character
    first = bisect_right(range(len(ids)), start, key=length) - 1
    last = bisect_left(range(len(ids) + 1), end, key=length)
    return float(logprobs[first:last].mean()) if last > first else None


class UnusableGroupError(DataError):
    """No completion of a group can be trained on, which is no fault of its prompt. ``reason`` goes
    into the ledger."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def make_group(
    finished: FinishedRequest,
    lease: RequestLease,
    scores: list[CompletionScore],
    *,
    temperature: float,
) -> Group:
    """The scored group of one request, as the buffer stores it.

    Completions whose every component is masked are left out: nothing is known of them, and a zero
    would be a lie (docs/method.md 1.5). So are those without a token, which have no
    log-probability. Raises UnusableGroupError when that is all of them: ``unscored`` (a judge was
    out), or ``empty``.
    """
    request = lease.request
    group_id = f"{request.seq:08d}"
    digest = prompt_digest(finished.prompt_token_ids)
    scored = list(zip(finished.completions, scores, strict=True))
    written = [(item, score) for item, score in scored if len(item.token_ids)]
    kept = [(item, score.reward, score) for item, score in written if score.reward is not None]
    imputed = [score.imputed for _, score in written if score.reward is not None]
    trajectories = tuple(
        Trajectory(
            id=f"{group_id}.{index}",
            group_id=group_id,
            prompt_id=request.prompt_id,
            index=index,
            hinted=lease.hinted,
            prompt_tokens=len(finished.prompt_token_ids),
            prompt_digest=digest,
            token_ids=item.token_ids,
            logprobs=item.logprobs,
            experts=item.experts,
            versions=item.versions,
            finish_reason=item.finish_reason,
            temperature=temperature,
            reward=reward,
            components=score.components,
            details=score.details,
            step=request.step,
        )
        for index, (item, reward, score) in enumerate(kept)
    )
    if not trajectories:
        what = (
            "every reward component of all its completions is masked"
            if written
            else "its completions have no token"
        )
        raise UnusableGroupError(
            "unscored" if written else "empty",
            f"group {group_id} of prompt {request.prompt_id!r}: {what}",
        )
    return Group(
        id=group_id,
        prompt_id=request.prompt_id,
        seq=request.seq,
        step=request.step,
        hinted=lease.hinted,
        trajectories=trajectories,
        imputed=tuple(index for index, flag in enumerate(imputed) if flag),
    )


def is_dead(group: Group, by: DeadBy) -> bool:
    """Whether all completions of a group got the same, so that it teaches nothing by itself: the
    same accuracy, or where one is unknown the same reward."""
    marks = [trajectory.components.get("accuracy") for trajectory in group.trajectories]
    known = [mark for mark in marks if mark is not None]
    if by == "reward" or len(known) < len(marks):
        known = [trajectory.reward for trajectory in group.trajectories]
    return max(known) == min(known)


def evaluation_payload(
    prompt: Prompt, finished: FinishedRequest, scores: list[CompletionScore]
) -> JsonObject:
    """The result of one held-out prompt, JSON-ready; accuracy is the mean over its completions.

    Without ``scores`` it holds what was said alone."""
    accuracies = [score.components.get("accuracy") for score in scores]
    known = [value for value in accuracies if value is not None]
    first = finished.completions[0]
    return {
        **prompt.label(),
        "accuracy": sum(known) / len(known) if known else None,
        "components": {**scores[0].components} if scores else {},
        "details": {**scores[0].details} if scores else {},
        "text": first.text,
        "version": first.versions[0][0],
        "tokens": sum(len(item.token_ids) for item in finished.completions),
    }
