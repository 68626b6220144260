"""The judge under fire -> build/bench/judge.json; run with ``make bench NAME=judge``, under a
minute.

A local OpenAI-compatible server over real HTTP fails in every way we know of: 500s, 429 with
Retry-After, hangs, half a reply, invalid JSON, no JSON, scores out of range, missing criteria.
``silent_zeros`` and ``crashes`` must be 0: what cannot be scored is masked. docs/benchmarks.md says
how to read the rest."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Sequence

from avatar_rl.prompts.record import ProblemType, Prompt
from avatar_rl.rewards.config import RewardConfig
from avatar_rl.rewards.record import Completion, Scored, ScoreRequest
from avatar_rl.rewards.suite import RewardSuite
from benchmarks.harness import Figures, parser
from tests.unit.test_rewards_judge_server import GOOD, Reply, judge_server

#: Reward of the server's good reply: the mean of its four scores.
GOOD_REWARD = 0.5
#: Replies that can be read; the last lacks a criterion, which by docs/method.md 1.5 counts 0: (0.5
#: + 1.0 + 0.0 + 0) / 4.
READABLE = (
    Reply(),
    Reply(content=f"```json\n{GOOD}\n```"),
    Reply(content=f"<think>hm</think>Here it is: {GOOD}"),
    Reply(
        content='{"audio_grounding_score": 0.5, "visual_id_score": 1.0, "location_acc_score": 0.0}'
    ),
)
ALLOWED = {GOOD_REWARD, 0.375}
#: Replies that cannot.
FAULTS = (
    Reply(status=500),
    Reply(status=503),
    Reply(status=429, headers={"Retry-After": "0.02"}),
    Reply(hang_s=3.0),
    Reply(cut=True),
    Reply(raw='{"id": "x", "choi'),
    Reply(raw="<html>bad gateway</html>"),
    Reply(content=GOOD[:50]),
    Reply(content="I would give it a seven."),
    Reply(content=GOOD.replace("1.0", "7")),
    Reply(content=GOOD.replace("0.5", "-0.5")),
    Reply(content="{}"),
)
GROUP, AT_ONCE = 4, 100
DEADLINE_S = 300.0


def requests(count: int, *, distinct: bool = True) -> list[ScoreRequest]:
    """``count`` groups of 4 completions; all the same ones unless ``distinct``."""
    return [
        ScoreRequest(
            prompt=Prompt(
                id=f"p{n if distinct else 0}",
                question="What beeps?",
                answer="red",
                problem_type=ProblemType.FREE_FORM,
            ),
            completions=[
                Completion(
                    text=f"<think>idea {n if distinct else 0}.{i}</think><answer>red</answer>",
                    finished=True,
                    mean_logprob=-0.5,
                    tokens=9,
                )
                for i in range(GROUP)
            ],
        )
        for n in range(count)
    ]


def fire(
    script: Callable[[int], Reply], asked: list[ScoreRequest]
) -> tuple[list[Scored], int, dict[str, float], float]:
    """(scored completions, groups that raised, the judge's counters, seconds) of groups asked for
    100 at a time."""
    with judge_server(script) as server:
        judge = {
            "base_url": server.url,
            "model": "judge",
            "request_timeout_s": 1.0,
            "deadline_s": 60.0,
            "attempts": 4,
            "backoff_s": 0.01,
            "concurrency": AT_ONCE,
            "breaker_failures": 1000,
        }

        async def run() -> tuple[list[list[Scored] | BaseException], dict[str, float], float]:
            suite = RewardSuite(
                RewardConfig.model_validate({"weights": {"judge": 1.0}, "judge": judge})
            )
            gate = asyncio.Semaphore(AT_ONCE // GROUP)

            async def one(request: ScoreRequest) -> list[Scored]:
                async with gate:
                    return await suite.ascore(request)

            started = time.perf_counter()
            groups = await asyncio.wait_for(
                asyncio.gather(*(one(request) for request in asked), return_exceptions=True),
                DEADLINE_S,
            )
            seconds = time.perf_counter() - started
            await suite.aclose()
            return list(groups), suite.stats(), seconds

        groups, stats, seconds = asyncio.run(run())
    scored = [one for group in groups if not isinstance(group, BaseException) for one in group]
    return scored, sum(isinstance(group, BaseException) for group in groups), stats, seconds


def under_fire(share: float, groups: int, seed: int) -> dict[str, float]:
    """Figures with that share of replies failing, drawn from a seed."""
    draw = random.Random(seed)
    scored, crashes, stats, seconds = fire(
        lambda n: draw.choice(FAULTS) if draw.random() < share else draw.choice(READABLE),
        requests(groups),
    )
    known = [one.reward for one in scored if one.reward is not None]
    return {
        "silent_zeros": sum(
            reward not in ALLOWED for reward in known
        ),  # no good reply comes to any other value
        "crashes": crashes,
        "scored_share": len(known) / len(scored),
        "masked_share": 1 - len(known) / len(scored),
        "requests_per_completion": stats["judge/requests"] / len(scored),
        "completions_per_s": len(scored) / seconds,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    options_of = parser(__doc__)
    options_of.add_argument("--groups", type=int, default=150, help="of 4 completions, per figure")
    options_of.add_argument("--seed", type=int, default=0)
    options = options_of.parse_args(arguments)
    if options.smoke:
        options.groups = 8
    figures = Figures("judge", options.out)
    figures.add(under_fire(0.3, options.groups, options.seed))
    harder = under_fire(0.6, options.groups, options.seed + 1)
    figures.add({f"{name}_at_60": value for name, value in harder.items()})
    scored, crashes, _, _ = fire(
        lambda n: FAULTS[n % 2], requests(options.groups // 4)
    )  # nothing but 500 and 503
    figures.add(
        {
            "dead_masked_share": sum(one.reward is None for one in scored) / len(scored),
            "dead_crashes": crashes,
        }
    )
    _, _, stats, seconds = fire(lambda n: Reply(), requests(options.groups))
    figures.add({"requests_per_s": stats["judge/requests"] / seconds})
    _, _, stats, _ = fire(lambda n: Reply(), requests(options.groups, distinct=False))
    figures.add({"cache_hit_share": stats["judge/cache_hits"] / (options.groups * GROUP)})
    figures.write()


if __name__ == "__main__":
    main()
