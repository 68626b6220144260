"""What stored media embeddings save a learner step -> build/bench/embeddings.json; run with ``make
bench NAME=embeddings``, about four minutes.

``embeddings_vs_pixels``: seconds of a step whose frozen towers run, over those of a step that takes
stored embeddings. Both are warm, nothing is decoded, and loss and gradients were equal before. The
towers are as deep as it takes to cost, beside the language model, what they do for a 7B model on
5,500 tokens of video (``WANTED``). ``..._decoding`` is the same where both sides read files.
``decode_hidden_share``: share of the media time of worker processes that no step waited for, while
each step's prompts are new and were named one step ahead. ``pixels_hidden_share`` is the same where
the towers train: workers decode and process, the step runs the towers. docs/benchmarks.md says how
to read them."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from transformers.utils.logging import disable_progress_bar

from avatar_rl.cluster.services.services import CPU_ENVIRONMENT, ENVIRONMENT
from avatar_rl.learner.batch.microbatch import Row, collate
from avatar_rl.learner.batch.plan import StepWork
from avatar_rl.learner.config import EmbeddingsConfig
from avatar_rl.learner.media.ahead import AheadEncoder
from avatar_rl.learner.media.opening import MediaSetting, open_encoder
from avatar_rl.learner.model.media import embed
from avatar_rl.learner.spec import LearnerSpec
from avatar_rl.prompts.embeddings.names import TOWERS
from avatar_rl.prompts.encoding.template import EncodedPrompt, PromptEncoder
from avatar_rl.prompts.media.loader import MediaLoader
from avatar_rl.prompts.record import Prompt
from benchmarks.harness import Figures, parser, spread
from benchmarks.learner_side import (
    BenchLearner,
    FrozenPrompts,
    make_step,
    score,
    settings,
    with_behaviour,
)

Figure = Iterator[tuple[str, float]]

#: Seconds of the towers over those of the language model, estimated for Qwen2.5-Omni-7B: 61 to 76.
WANTED = 61 / 76
#: Tokens of a completion where media shall be hidden. A 7B model's media take as long as its
#: language model does: 40 s of decoding and 38 s of towers, once per clip, to 76 s.
LONG = (36, 84)
AGREEMENT = 1e-5  # of losses (absolute) and gradient norms (relative)


@dataclass(frozen=True)
class Sizes:
    """What is measured at which sizes."""

    clips: int = 8  # per step
    steps: int = 6  # with new prompts each, for the share that is hidden
    depth: int = 8  # of the vision tower at first
    most: int = 96  # and at most


SMOKE = Sizes(2, 3, 2, 4)


class Stage:
    """Clips with sound of the synthetic world and a Qwen2.5-Omni whose tower has ``depth``
    blocks."""

    def __init__(self, cache: Path, sizes: Sizes, threads: int) -> None:
        from avatar_rl.cluster.config import RunConfig
        from avatar_rl.cluster.recipe.assets import prepare_base_model, prepare_datasets
        from avatar_rl.cluster.workers.pool import learner_spec

        self.sizes, self.threads = sizes, threads
        learner = settings(threads, optimizer={"freeze": TOWERS})
        config = RunConfig.model_validate(
            {
                "data": {
                    "synthetic": {
                        "n_train": sizes.clips * sizes.steps,
                        "n_heldout": 1,
                        "n_sft": 0,
                    },
                    "template": {
                        "min_pixels": 784,
                        "max_pixels": 50176,
                        "max_prompt_tokens": 256,
                    },
                },
                "output": {"cache": cache},
                "learner": learner.model_dump(),
            }
        )
        datasets = prepare_datasets(config, lambda *_: None)
        base = prepare_base_model(config, lambda *_: None)
        self.spec = learner_spec(config, "bench", base, datasets, "")

    def with_depth(self, depth: int, folder: Path) -> LearnerSpec:
        """The spec with a model of random weights whose vision tower has ``depth`` blocks."""
        import transformers as hf

        path = folder / f"depth-{depth}"
        if not path.exists():
            config = hf.AutoConfig.from_pretrained(self.spec.model)
            config.thinker_config.vision_config.depth = depth
            torch.manual_seed(0)
            model = hf.Qwen2_5OmniThinkerForConditionalGeneration(config.thinker_config)
            path.mkdir(parents=True)
            _save_thinker(model, config, self.spec.model, path)
        return replace(self.spec, model=path, reference=path)


def _save_thinker(model: Any, config: Any, source: Path, path: Path) -> None:
    from safetensors.torch import save_file

    for file in source.iterdir():
        if file.suffix != ".safetensors" and file.name != "config.json":
            (path / file.name).write_bytes(file.read_bytes())
    weights = {f"thinker.{name}": value.contiguous() for name, value in model.state_dict().items()}
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(path)


def plain_encoder(spec: LearnerSpec, *, cached: bool) -> PromptEncoder:
    """Pixels; without a cache every prompt is decoded whenever it is asked for."""
    media = spec.media if cached else spec.media.model_copy(update={"memory_cache_bytes": 0})
    template = spec.template
    if not cached:
        template = template.model_copy(update={"cache_bytes": 0})
    return PromptEncoder(spec.model, MediaLoader(media, base=Path(".")), template)


def stored_encoder(
    spec: LearnerSpec, folder: Path, *, cached: bool, workers: int, pixels: bool = False
) -> AheadEncoder:
    """Embeddings, or pixels, of a store in ``folder``; without a cache they are read from disk
    every time."""
    setting = MediaSetting(
        model=spec.model,
        reference=spec.reference,
        trained=(),
        dtype="float32",
        device=torch.device("cpu"),
        media=spec.media,
        template=spec.template,
        threads=1,
    )
    mode: Literal["on", "pixels"] = "pixels" if pixels else "on"
    config = EmbeddingsConfig(mode=mode, folder=folder, workers=workers)
    encoder, _ = open_encoder(plain_encoder(spec, cached=cached), config, setting)
    assert isinstance(encoder, AheadEncoder)
    return encoder


def train_prompts(learner: BenchLearner) -> list[Prompt]:
    return [prompt for prompt in learner.prompts if prompt.id.startswith("train")]


def make_work(
    number: int,
    learner: BenchLearner,
    encoded: Mapping[str, EncodedPrompt],
    lengths: tuple[int, int] = (12, 48),
) -> StepWork:
    """Eight completions of ``lengths`` tokens for each prompt."""
    rng = np.random.default_rng(number)
    shortest, longest = lengths
    work = make_step(number, encoded, rng, shortest=shortest, longest=longest, tokens=(30, 400))
    return with_behaviour(work, score(learner.engine.policy, work, encoded))


def parts(spec: LearnerSpec, sizes: Sizes) -> tuple[float, float]:
    """Seconds of a step's towers alone, and of its language model alone."""
    learner = BenchLearner(spec)
    asked = train_prompts(learner)[: sizes.clips]
    encoded = {prompt.id: learner.encoder.encode(prompt, False) for prompt in asked}
    work = make_work(0, learner, encoded)
    # The same tokens and positions; what stands for media are ordinary embeddings here.
    blind = {name: replace(prompt, features={}) for name, prompt in encoded.items()}
    language = BenchLearner(spec, FrozenPrompts(blind))
    # One pack of all prompts, as the step below makes it: an encoder's calls are not free.
    pack = collate([Row((name, False), p, np.zeros(1, np.int32)) for name, p in encoded.items()])
    tower_s, language_s = [], []
    for turn in range(3):
        start = time.perf_counter()
        with torch.no_grad():
            embed(learner.engine.policy.model, pack, ())
        middle = time.perf_counter()
        language.update(work)
        if turn:  # the first warms both
            tower_s.append(middle - start)
            language_s.append(time.perf_counter() - middle)
    return min(tower_s), min(language_s)


def fitting(stage: Stage, folder: Path) -> tuple[LearnerSpec, float]:
    """The spec whose towers cost ``WANTED`` of the language model, and what they cost."""
    depth = stage.sizes.depth
    for _ in range(3):
        spec = stage.with_depth(depth, folder)
        tower, language = parts(spec, stage.sizes)
        found = tower / language
        better = min(stage.sizes.most, max(2, round(depth * WANTED / found)))
        if abs(found / WANTED - 1) < 0.1 or better == depth:
            break
        depth = better
    return spec, found


def embeddings_vs_pixels(spec: LearnerSpec, folder: Path, rounds: int, sizes: Sizes) -> Figure:
    """Steps by turns on the same works: pixels and stored embeddings, warm, then from files."""
    for label, cached in (("", True), ("_decoding", False)):
        sides = {"pixels": BenchLearner(spec), "stored": BenchLearner(spec)}
        encoders: dict[str, PromptEncoder | AheadEncoder] = {
            "pixels": plain_encoder(spec, cached=cached),
            "stored": stored_encoder(spec, folder / "store", cached=cached, workers=0),
        }
        for name, side in sides.items():
            side.encoder = side.trainer.encoder = encoders[name]
        asked = train_prompts(sides["pixels"])[: sizes.clips]
        encoded = {prompt.id: encoders["pixels"].encode(prompt, False) for prompt in asked}
        work = make_work(0, sides["pixels"], encoded)
        found = {name: side.update(work) for name, side in sides.items()}  # warms them as well
        (loss, norm), (other_loss, other_norm) = found["pixels"], found["stored"]
        difference = max(abs(loss - other_loss), abs(1 - other_norm / norm))
        if difference > AGREEMENT:
            raise SystemExit(
                f"loss or gradient norm differs by {difference:.2g} with stored embeddings: "
                "nothing to compare"
            )
        yield f"spread_ppm{label}", 1e6 * difference
        times: dict[str, list[float]] = {name: [] for name in sides}
        for turn in range(rounds):
            for name in list(sides) if turn % 2 else reversed(list(sides)):
                times[name] += sides[name].seconds([work])
        ratios = [p / s for p, s in zip(times["pixels"], times["stored"], strict=True)]
        yield from spread(f"embeddings_vs_pixels{label}", ratios)
        for name, values in times.items():
            yield f"step_ms_{name}{label}", 1e3 * statistics.median(values)


def decode_hidden(spec: LearnerSpec, folder: Path, sizes: Sizes, *, pixels: bool = False) -> Figure:
    """Steps of new prompts, each named to the worker while the step before is trained."""
    if pixels:
        optimizer = spec.learner.optimizer.model_copy(update={"freeze": ()})
        spec = replace(spec, learner=spec.learner.model_copy(update={"optimizer": optimizer}))
    plain = BenchLearner(spec)
    asked = train_prompts(plain)
    shares = [asked[i : i + sizes.clips] for i in range(0, len(asked), sizes.clips)]
    works = []
    for number, share in enumerate(shares):
        encoded = {prompt.id: plain.encoder.encode(prompt, False) for prompt in share}
        works.append(make_work(number, plain, encoded, LONG))
    learner = BenchLearner(spec)
    own = folder / ("pixels" if pixels else "hidden")
    encoder = stored_encoder(spec, own, cached=False, workers=1, pixels=pixels)
    learner.encoder = learner.trainer.encoder = encoder
    try:
        # The first step's prompts come while rollouts generate; its reference pass is the warm-up.
        encoder.ahead((prompt, False) for prompt in shares[0])
        for prompt in shares[0]:
            encoder.encode(prompt, False)
        busy = waited = 0.0
        encoder.seconds()
        start = time.perf_counter()
        for number, work in enumerate(works):
            if number + 1 < len(works):
                encoder.ahead((prompt, False) for prompt in shares[number + 1])
            learner.update(work)
            took = encoder.seconds()
            busy, waited = busy + took.busy, waited + took.waited
        spent = time.perf_counter() - start
    finally:
        encoder.close()
    yield ("pixels" if pixels else "decode") + "_hidden_share", max(0.0, 1 - waited / busy)
    name = "pixels" if pixels else "media"
    yield f"{name}_s_per_step", busy / max(1, len(works) - 1)
    yield f"{name}_waited_s", waited
    yield f"{name}_over_llm", busy / (len(works) - 1) / ((spent - waited) / len(works))


def main(arguments: Sequence[str] | None = None) -> None:
    options_of = parser(__doc__)
    options_of.add_argument("--rounds", type=int, default=5, help="turns per ratio")
    options_of.add_argument("--threads", type=int, default=1, help="CPU threads of the learner")
    options_of.add_argument("--cache", type=Path, help="for clips and tiny model; none: new ones")
    options = options_of.parse_args(arguments)
    sizes, rounds = (SMOKE, 1) if options.smoke else (Sizes(), options.rounds)
    for name, value in {**ENVIRONMENT, **CPU_ENVIRONMENT}.items():
        os.environ.setdefault(name, value)
    torch.set_num_threads(options.threads)
    disable_progress_bar()
    warnings.filterwarnings("ignore", category=UserWarning)
    figures = Figures("embeddings", options.out)
    figures.add({"threads": options.threads})
    with tempfile.TemporaryDirectory(prefix="avatar-bench-") as name:
        folder = Path(name)
        stage = Stage(options.cache or folder / "cache", sizes, options.threads)
        spec, found = fitting(stage, folder)
        figures.add({"tower_over_llm": found})
        for figure in embeddings_vs_pixels(spec, folder, rounds, sizes):
            figures.add(dict([figure]))
        for pixels in (False, True):
            for figure in decode_hidden(spec, folder, sizes, pixels=pixels):
                figures.add(dict([figure]))
    figures.write()


if __name__ == "__main__":
    main()
