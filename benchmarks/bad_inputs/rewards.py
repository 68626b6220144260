"""Group D: rewards and judges."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path

from avatar_rl.prompts.record import Prompt
from avatar_rl.rewards.config import RewardConfig
from avatar_rl.rewards.record import Completion, ScoreRequest
from avatar_rl.rewards.suite import RewardSuite
from avatar_rl.rewards.testing import check_reward, sample_completions, sample_prompt
from benchmarks.bad_inputs.entries import BadInput, Try, command, recipe
from tests.unit.test_rewards_judge_server import Reply, judge_server

Scores = Sequence[float | None]
HERE = "benchmarks.bad_inputs.rewards"
DEAD = "http://127.0.0.1:9/v1"
_CALLS = count()


# Reward functions as users may write them.


def raising(prompt: Prompt, completions: Sequence[Completion]) -> Scores:
    raise RuntimeError("boom")


def stopping(prompt: Prompt, completions: Sequence[Completion]) -> Scores:
    raise StopIteration


def not_a_number(prompt: Prompt, completions: Sequence[Completion]) -> Scores:
    return [float("nan")] * len(completions)


def too_short(prompt: Prompt, completions: Sequence[Completion]) -> Scores:
    return [1.0] * (len(completions) - 1)


def words(prompt: Prompt, completions: Sequence[Completion]) -> Sequence[object]:
    return ["high"] * len(completions)


def nothing(prompt: Prompt, completions: Sequence[Completion]) -> None: ...


def moving(prompt: Prompt, completions: Sequence[Completion]) -> Scores:
    return [float(next(_CALLS))] * len(completions)


def one_for_all(prompt: Prompt, completions: Sequence[Completion]) -> float:
    return 1.0


def slow(prompt: Prompt, completions: Sequence[Completion]) -> Scores:
    import time

    time.sleep(1.0)
    return [1.0] * len(completions)


class Heard(logging.Handler):
    """Everything that was logged as a warning."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@contextmanager
def heard() -> Iterator[Heard]:
    handler, root = Heard(), logging.getLogger()
    root.addHandler(handler)
    try:
        yield handler
    finally:
        root.removeHandler(handler)


def request(video_only: list[Completion] | None = None) -> ScoreRequest:
    completions = list(sample_completions())[:3]
    return ScoreRequest(prompt=sample_prompt(), completions=completions, video_only=video_only)


def in_a_run(function: str, **config: float) -> Try:
    """What a run logs of a reward that fails: its marks are masked, and that is said."""

    def act(folder: Path) -> str:
        weights = {"accuracy": 0.5, f"{HERE}:{function}": 0.5}
        suite = RewardSuite(RewardConfig.model_validate({"weights": weights, **config}))
        with heard() as handler:
            suite.score(request())
        masked = suite.stats()[f"{HERE}:{function}/masked"]
        suite.close()
        return "\n".join(handler.lines) if masked else ""

    return act


def checked(function: Callable[..., object]) -> Try:
    def act(folder: Path) -> str:
        check_reward(function)  # type: ignore[arg-type]
        return ""

    return act


def suite(**config: object) -> Try:
    def act(folder: Path) -> str:
        RewardSuite(RewardConfig.model_validate(config)).close()
        return ""

    return act


def unpaired(folder: Path) -> str:
    request(video_only=list(sample_completions())[:1])
    return ""


def no_completion(folder: Path) -> str:
    ScoreRequest(prompt=sample_prompt(), completions=[])
    return ""


def no_logprob(folder: Path) -> str:
    Completion(text="", finished=True, mean_logprob=float("nan"), tokens=1)
    return ""


def judged(reply: Reply | None, model: str = "judge", **changes: object) -> Try:
    """The check of a judge at the start of a run; None: nobody listens."""

    async def check(url: str) -> None:
        judge = {"base_url": url, "model": model, "attempts": 1, **changes}
        config = RewardConfig.model_validate({"weights": {"judge": 1.0}, "judge": judge})
        found = RewardSuite(config)
        try:
            await found.check()
        finally:
            await found.aclose()

    def act(folder: Path) -> str:
        if reply is None:
            asyncio.run(check(DEAD))
            return ""
        with judge_server(lambda n: reply) as server:
            asyncio.run(check(server.url))
        return ""

    return act


def unusable(reply: Reply) -> Try:
    """Completions whose judge gives no usable reply: masked, and that is counted and said."""

    async def score(url: str) -> str:
        judge = {"base_url": url, "model": "judge", "attempts": 1, "backoff_s": 0.01}
        config = {"weights": {"accuracy": 0.5, "judge": 0.5}, "judge": judge}
        found = RewardSuite(RewardConfig.model_validate(config))
        try:
            await found.ascore(request())
            stats = found.stats()
        finally:
            await found.aclose()
        return ", ".join(f"{name} {value:g}" for name, value in stats.items() if value)

    def act(folder: Path) -> str:
        with judge_server(lambda n: reply) as server, heard() as handler:
            said = asyncio.run(score(server.url))
        return said + "\n" + "\n".join(handler.lines) if "judge/masked" in said else ""

    return act


def imported(source: str | None, name: str) -> Try:
    """`avatar train` with a reward of this source."""

    def act(folder: Path) -> str:
        if source is not None:
            (folder / f"{name.partition(':')[0]}.py").write_text(source)
        text = f"{{data: {{synthetic: {{n_train: 4}}}}, rewards: {{weights: {{'{name}': 1.0}}}}}}"
        (folder / "recipe.yaml").write_text(text)
        return command("train", "{}/recipe.yaml", "--output.folder={}/runs")(folder)

    return act


def weights(text: str) -> Try:
    return recipe(f"rewards: {{weights: {text}}}")


CHECKED: tuple[tuple[Callable[..., object], tuple[str, ...]], ...] = (
    (raising, ("rewards:raising", "RuntimeError: boom")),
    (not_a_number, ("rewards:not_a_number", "score 0 is nan", "return None")),
    (too_short, ("rewards:too_short", "8 scores for 9 completions")),
    (words, ("rewards:words", "'high', not a number or None")),
    (nothing, ("rewards:nothing", "returned NoneType", "one score per completion")),
    (moving, ("rewards:moving", "other scores on a second call", "seed it")),
    (one_for_all, ("rewards:one_for_all", "returned float", "one score per completion")),
)
IN_A_RUN = {
    "raising": "RuntimeError: boom",
    "stopping": "StopIteration",
    "not_a_number": "score 0 is nan",
    "too_short": "2 scores for 3",
    "words": "score 0 is 'high'",
    "nothing": "returned NoneType",
}
IMPORTED: dict[str, tuple[str | None, str]] = {
    "absent_reward:fn": (None, "No module named 'absent_reward'"),
    "broken_reward:fn": ("x = (", "SyntaxError"),
    "angry_reward:fn": ("raise RuntimeError('no licence')", "RuntimeError: no licence"),
    "ending_reward:fn": ("import os; os._exit(3)", "importing it ended the process"),
    "other_reward:fn": ("def other(): ...", "has no function 'fn'"),
}
MANAGED = "rewards: {weights: {judge: 1.0}, judge: {kind: managed}}"
TABLE: tuple[tuple[str, Try, tuple[str, ...]], ...] = (
    ("unknown", weights("{acuracy: 1.0}"), ("'acuracy'", "known are format, accuracy")),
    ("sum_0", weights("{format: 0.0}"), ("sum to 0", "a weight above 0")),
    ("negative", weights("{format: -1.0}"), ("weights.format is -1", "finite number >= 0")),
    ("nan", weights("{format: .nan}"), ("weights.format", "finite number")),
    ("no_path", weights("{'my rewards:fn': 1.0}"), ("'my rewards:fn'", "import path like")),
    ("mode", recipe("rewards: {format: ternary}"), ("rewards.format", "'signed' or 'binary'")),
    ("numeric", recipe("rewards: {numeric: fuzzy}"), ("rewards.numeric", "'rmae'")),
    ("managed", recipe(MANAGED), ("rewards.judge.kind is managed", "rewards.judge.managed.path")),
    ("judge_key", recipe("rewards: {judge: {url: x}}"), ("rewards.judge.url", "base_url")),
    ("timeout_0", recipe("rewards: {custom_timeout_s: 0}"), ("custom_timeout_s", "greater than 0")),
    ("no_endpoint", suite(weights={"judge": 1.0}), ("rewards.judge.base_url is empty", "name the")),
    (
        "no_judge_model",
        suite(weights={"judge": 1.0}, judge={"base_url": DEAD}),
        ("rewards.judge.model is empty", "name the judge's endpoint and model"),
    ),
    (
        "no_key",
        suite(
            weights={"judge": 1.0},
            judge={"base_url": DEAD, "model": "m", "api_key_env": "NO_SUCH_KEY_HERE"},
        ),
        ("api_key_env names NO_SUCH_KEY_HERE", "not set in the environment"),
    ),
    (
        "segments_without_clips",
        suite(weights={"segment_consistency": 1.0}, judge={"base_url": DEAD, "model": "m"}),
        ("segment_consistency", "set rewards.judge.attach"),
    ),
    ("unpaired", unpaired, ("1 video_only rollouts for 3", "paired one to one")),
    ("no_completion", no_completion, ("prompt sample", "at least one completion")),
    ("no_logprob", no_logprob, ("mean_logprob nan",)),
    ("nobody_listens", judged(None), (DEAD, "start it, or correct rewards.judge.base_url")),
    ("other_model", judged(Reply(), "another"), ("no model 'another'", "it serves")),
    ("judge_500", unusable(Reply(status=500)), ("judge/masked 3", "http_500")),
    ("judge_html", unusable(Reply(raw="<html>bad</html>")), ("judge/masked 3", "judge/")),
    ("judge_words", unusable(Reply(content="a seven")), ("judge/masked 3", "judge/")),
    ("judge_empty", unusable(Reply(content="{}")), ("judge/masked 3", "judge/")),
    ("slow", in_a_run("slow", custom_timeout_s=0.2), ("took over 0.2 s", "custom_timeout_s")),
    *((f"checked_{fn.__name__}", checked(fn), said) for fn, said in CHECKED),
    *(
        (name, in_a_run(name), (f"{HERE}:{name}", said, "masked"))
        for name, said in IN_A_RUN.items()
    ),
)
ENTRIES = [
    *(BadInput("D", name, act, said) for name, act, said in TABLE),
    *(
        BadInput("D", name, imported(source, name), (name, said, "PYTHONPATH"), True)
        for name, (source, said) in IMPORTED.items()
    ),
]
