"""Public sets: how many are ready, how fast they are asked, whether a kill loses an answer, whether
the intervals cover -> build/bench/evaluation.json; ``make bench NAME=evaluation``, ten minutes.

``sets_ready``: sets that pass the round trip of tests/published_round_trip.py: the layout is cited,
rows of ours in it are read with every field, and the figures come out as worked out by hand. What a
set lacks is printed. ``sets_with_deviation``: those that score otherwise than their authors.
``throughput_ratio``: questions a second of `avatar evaluate --benchmark` (from the first question
to the last answer, engines up) over vLLM's own ``LLM.generate`` on the same prompts. Either side is
given clips as files and decodes, preprocesses and generates while the clock runs; the engines have
the same settings. ``answers_differ``: questions that the two answered otherwise. ``resumed_lost``
and ``resumed_twice``: answers that are missing or there twice after a kill -9 in the middle and a
second start. ``coverage`` and ``coverage_macro``: share of 2,000 simulated sets whose interval
holds the truth, of a mean over questions and of one over tasks.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from avatar_rl.actors.engine.launch import engine_arguments, model_kind, prepare_environment
from avatar_rl.cluster.benchmarks.convert import read_questions, to_prompt
from avatar_rl.cluster.benchmarks.intervals import Groups, bootstrap
from avatar_rl.cluster.benchmarks.sets import benchmark_set, benchmark_sets
from avatar_rl.cluster.config import RunConfig
from avatar_rl.cluster.recipe.load import load_recipe, parse_overrides
from avatar_rl.common.files import read_jsonl
from avatar_rl.prompts.datasets import anchored
from avatar_rl.prompts.encoding.template import PromptEncoder
from avatar_rl.prompts.media.loader import MediaLoader
from avatar_rl.prompts.readers.build import with_defaults
from avatar_rl.prompts.record import Prompt
from benchmarks.harness import Figures, parser
from tests.public_set import write_daily_omni
from tests.published_round_trip import faults
from tests.unit.published_sets import PUBLISHED

ROOT = Path(__file__).resolve().parents[1]
MODEL, RECIPE = ROOT / "recipes/assets/tiny_omni", ROOT / "recipes/local.yaml"
#: So that the clips fit the tiny engine.
SMALL = ["--data.reader.frames", "8", "--data.template.min_pixels", "2352"]
SMALL += ["--data.template.max_pixels", "50176"]
TOKENS = 48
SET = "dailyomni"


def command(folder: Path, out: str = "out") -> list[str]:
    return [
        *(sys.executable, "-m", "avatar_rl.cluster.cli", "evaluate", str(MODEL)),
        *("--recipe", str(RECIPE), "--benchmark", SET, "--sets", str(folder / "sets")),
        *("--out", str(folder / out), "--output.folder", str(folder / "runs")),
        *("--screen", "plain", *SMALL),
    ]


def ask(folder: Path, out: str = "out") -> dict[str, float]:
    """A whole evaluation as a user starts it; its result."""
    done = subprocess.run(command(folder, out), cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the evaluation ended with {done.returncode}:\n{done.stderr[-2000:]}")
    found: dict[str, float] = json.loads((folder / out / SET / "result.json").read_text())
    return found


def bare(folder: Path) -> float:
    """Questions a second of vLLM's own LLM on the same prompts, media decoded on the way."""
    code = "from pathlib import Path; import sys; from benchmarks.evaluation import bare_side; "
    code += "print('RATE', bare_side(Path(sys.argv[1])))"
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)], cwd=ROOT, capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"bare vLLM ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return float(done.stdout.rpartition("RATE")[2])


def bare_side(folder: Path) -> float:
    """The measuring of ``bare``, in a process of its own; its answers go to bare.json."""
    config = load_recipe(RECIPE, parse_overrides(SMALL))
    questions, _ = read_questions(benchmark_set(SET), folder / "sets" / SET, folder / "media")
    prompts = [to_prompt(benchmark_set(SET), q, "recipe", hears=True) for q in questions]
    loader = MediaLoader(config.data.media, folder)
    encoder = PromptEncoder(MODEL, loader, config.data.template)
    prepare_environment(config.rollout.engine, "cpu")
    from vllm import LLM, SamplingParams

    arguments = engine_arguments(MODEL, model_kind(MODEL), config.rollout.engine, "cpu")
    arguments = {k: v for k, v in arguments.items() if k != "worker_extension_cls"}
    llm = LLM(**arguments)
    greedy = SamplingParams(temperature=0.0, max_tokens=TOKENS)
    placed = [_placed(prompt, folder, config) for prompt in prompts]
    llm.generate([encoder.engine_input(placed[0], hinted=False)], greedy, use_tqdm=False)  # warm
    begin = time.perf_counter()
    inputs = [encoder.engine_input(prompt, hinted=False) for prompt in placed]
    outputs = llm.generate(inputs, greedy, use_tqdm=False)
    seconds = time.perf_counter() - begin
    texts = {q.id: out.outputs[0].text for q, out in zip(questions, outputs, strict=True)}
    (folder / "bare.json").write_text(json.dumps(texts))
    return len(prompts) / seconds


def _placed(prompt: Prompt, folder: Path, config: RunConfig) -> Prompt:
    """The prompt as a rollout actor reads it: frames of the recipe, absolute paths."""
    items = tuple(with_defaults(item, config.data.reader) for item in prompt.media.items)
    media = prompt.media.model_copy(update={"items": items})
    return anchored(prompt.model_copy(update={"media": media}), folder)


def throughput(folder: Path, questions: int, rounds: int) -> Iterator[tuple[str, float]]:
    asked = write_daily_omni(folder / "sets" / SET, questions)
    yield "questions", asked
    ours, theirs = [], []
    for number in range(rounds):
        theirs.append(bare(folder))
        result = ask(folder, f"out-{number}")
        ours.append(result["answered"] / result["seconds"])
    yield "questions_per_s", max(ours)
    yield "bare_questions_per_s", max(theirs)
    yield "throughput_ratio", max(ours) / max(theirs)
    bare_texts = json.loads((folder / "bare.json").read_text())
    journal = read_jsonl(folder / "out-0" / SET / "answers.jsonl")
    texts = {row["id"]: row["text"] for row in journal}
    yield "answers_differ", sum(text != texts.get(name) for name, text in bare_texts.items())


def resumed(folder: Path, questions: int) -> Iterator[tuple[str, float]]:
    """An evaluation killed when a third of the ``questions`` is answered, and started again."""
    journal = folder / "out" / SET / "answers.jsonl"

    def answered() -> int:
        return journal.read_bytes().count(b"\n") if journal.is_file() else 0

    process = subprocess.Popen(
        command(folder), cwd=ROOT, start_new_session=True, stdout=subprocess.DEVNULL
    )
    try:
        while process.poll() is None and answered() < questions // 3:
            time.sleep(0.02)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    kept = len(list(read_jsonl(journal)))
    result = ask(folder)
    names = Counter(row["id"] for row in read_jsonl(journal))
    yield "resumed_kept", kept
    yield "resumed_lost", result["answered"] + result["not_asked"] - len(names)
    yield "resumed_twice", sum(count - 1 for count in names.values())


def coverage(sets: int, resamples: int) -> float:
    """Share of simulated sets whose interval holds the true accuracy: 60 to 400 questions of
    accuracy 0.2 to 0.95, a third of them in fours that share a clip."""
    rng = np.random.default_rng(11)
    hits = 0
    for number in range(sets):
        accuracy, n = rng.uniform(0.2, 0.95), int(rng.integers(15, 100)) * 4
        scores, of = simulated(rng, accuracy, n, shared=number % 3 == 0)
        found = bootstrap(scores, clusters=of, seed=number, resamples=resamples)
        hits += found.low <= accuracy <= found.high
    return hits / sets


def coverage_macro(sets: int, resamples: int) -> float:
    """The same of a mean over 3 to 20 tasks of 20 to 200 questions, each task of an accuracy of its
    own; in a third of the sets questions of a task share a clip in fours."""
    rng = np.random.default_rng(12)
    hits = 0
    for number in range(sets):
        tasks = int(rng.integers(3, 21))
        accuracies, sizes = rng.uniform(0.2, 0.95, tasks), rng.integers(5, 51, tasks) * 4
        parts = [
            simulated(rng, accuracy, int(n), shared=number % 3 == 0)
            for accuracy, n in zip(accuracies, sizes, strict=True)
        ]
        found = bootstrap(
            np.concatenate([scores for scores, _ in parts]),
            clusters=[f"{task}/{one}" for task, (_, of) in enumerate(parts) for one in of],
            groups=Groups(np.repeat(np.arange(tasks), sizes), np.full(tasks, 1 / tasks)),
            seed=number,
            resamples=resamples,
        )
        hits += found.low <= accuracies.mean() <= found.high
    return hits / sets


def simulated(
    rng: np.random.Generator, accuracy: float, n: int, *, shared: bool
) -> tuple[np.ndarray, list[str]]:
    """(n,) right and wrong answers, and the clip of each: its own, or shared by four."""
    share: float | np.ndarray = accuracy
    if shared:
        share = rng.beta(6 * accuracy, 6 * (1 - accuracy), n // 4).repeat(4)
    return (rng.random(n) < share).astype(float), [str(i // 4 if shared else i) for i in range(n)]


def ready(folder: Path) -> int:
    """Sets that pass their published round trip; what the others lack is printed."""
    count = 0
    for name, one in benchmark_sets().items():
        lacks = faults(one, PUBLISHED[name], folder) if name in PUBLISHED else ["no rows to read"]
        for fault in lacks:
            print(f"{name} is not ready: {fault}", flush=True)
        count += not lacks
    return count


def main() -> None:
    options = parser(__doc__)
    chosen = options.parse_args()
    figures = Figures("evaluation", chosen.out)
    smoke = chosen.smoke
    with tempfile.TemporaryDirectory() as folder:
        figures.add({"sets_ready": ready(Path(folder))})
    deviating = [one for one in benchmark_sets().values() if one.deviation]
    figures.add({"sets_with_deviation": len(deviating)})
    sets, resamples = (60, 200) if smoke else (2000, 1000)
    figures.add({"coverage": coverage(sets, resamples)})
    figures.add({"coverage_macro": coverage_macro(sets, resamples)})
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        # Four in ten of the world's questions have options.
        found = dict(throughput(place, 30 if smoke else 3400, 1 if smoke else 2))
        figures.add(found)
        figures.add(dict(resumed(place, round(found["questions"]))))
    figures.write()


if __name__ == "__main__":
    main()
