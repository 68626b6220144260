"""User-defined rewards by import path: found at start, and kept from harming the run
(docs/method.md 1.5, README)."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import logging
import math
import threading
from collections import Counter
from collections.abc import Callable, Sequence

from avatar_rl.common.errors import ConfigError
from avatar_rl.prompts.record import Prompt
from avatar_rl.rewards.record import Completion, Mark, ScoreRequest

#: What a user writes: one score per completion, in order; None leaves a completion unscored.
RewardFunction = Callable[[Prompt, Sequence[Completion]], Sequence[float | None]]

log = logging.getLogger(__name__)


def load_reward(path: str) -> RewardFunction:
    """The function behind 'pkg.mod:fn'. Raises ConfigError naming what could not be imported, and
    why."""
    module_name, _, name = path.partition(":")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # whatever the user's module raises while it is imported
        raise ConfigError(
            f"reward {path!r}: importing {module_name} failed with {type(error).__name__}: "
            f"{error}; "
            "is it on the workers' PYTHONPATH?"
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        raise ConfigError(f"reward {path!r}: {module_name} has no function {name!r}")
    return function  # type: ignore[no-any-return]


def checked(values: object, count: int) -> list[float | None]:
    """A reward function's return value as finite floats or None. Raises ValueError saying what is
    wrong with it."""
    if (
        isinstance(values, str | bytes)
        or not hasattr(values, "__len__")
        or not hasattr(values, "__iter__")
    ):
        raise ValueError(
            f"returned {type(values).__name__}, not a sequence with one score per completion"
        )
    if len(values) != count:
        raise ValueError(f"returned {len(values)} scores for {count} completions")
    scores: list[float | None] = []
    for index, value in enumerate(values):
        try:
            score = None if value is None else float(value)
        except (TypeError, ValueError) as error:
            raise ValueError(f"score {index} is {value!r}, not a number or None") from error
        if score is not None and not math.isfinite(score):
            raise ValueError(
                f"score {index} is {score}; return None for a completion that cannot be scored"
            )
        scores.append(score)
    return scores


class CustomReward:
    """A user's function as a component. Whatever goes wrong in it masks that group, is counted, and
    is told once.

    It runs in a thread, one group at a time, so that a slow one holds up neither the judge nor
    other groups."""

    def __init__(self, path: str, timeout_s: float) -> None:
        self.name = path
        self.failures: Counter[str] = Counter()
        self._function = load_reward(path)
        self._timeout_s = timeout_s
        self._turn = asyncio.Lock()
        self._hung: threading.Thread | None = None

    async def score(self, request: ScoreRequest) -> list[Mark]:
        count = len(request.completions)
        try:
            async with self._turn:
                scores = checked(await self._call(request), count)
        except TimeoutError as error:
            return self._masked(request, "timeout", str(error))
        except ValueError as error:
            return self._masked(request, "invalid", str(error))
        except (
            Exception
        ) as error:  # user code may raise anything; the group is masked and the error told
            return self._masked(request, "raised", f"{type(error).__name__}: {error}")
        return [Mark(score) for score in scores]

    async def _call(self, request: ScoreRequest) -> object:
        if self._hung is not None and self._hung.is_alive():
            raise TimeoutError("is still busy with a group that timed out")
        loop = asyncio.get_running_loop()
        reply: asyncio.Future[object] = loop.create_future()

        def settle(value: object, error: BaseException | None) -> None:
            if not reply.done():
                reply.set_exception(error) if error is not None else reply.set_result(value)

        def work() -> None:
            value: object = None
            failure: BaseException | None = None
            try:
                value = self._function(request.prompt, tuple(request.completions))
            except Exception as error:  # handed to the waiting coroutine
                failure = (
                    RuntimeError("StopIteration") if isinstance(error, StopIteration) else error
                )
            with contextlib.suppress(
                RuntimeError
            ):  # the loop closed meanwhile: nobody waits any more
                loop.call_soon_threadsafe(settle, value, failure)

        # A daemon thread, not an executor: one that hangs must not hold up the exit of the process.
        thread = threading.Thread(target=work, name=f"reward {self.name}", daemon=True)
        thread.start()
        try:
            return await asyncio.wait_for(reply, self._timeout_s)
        except TimeoutError:
            if not reply.cancelled():  # the function itself raised TimeoutError
                raise
            self._hung = thread
            raise TimeoutError(
                f"took over {self._timeout_s} s (rewards.custom_timeout_s)"
            ) from None

    def _masked(self, request: ScoreRequest, kind: str, what: str) -> list[Mark]:
        if not self.failures[kind]:
            log.warning(
                "reward %s, prompt %s: %s. These completions are masked, not scored 0; further "
                "cases are only counted. "
                "Try rewards.testing.check_reward on it.",
                self.name,
                request.prompt.id,
                what,
            )
        self.failures[kind] += 1
        return [Mark(None)] * len(request.completions)
