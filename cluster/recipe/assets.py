"""What a run needs on disk before it starts: dataset, base model, cold-started policy. Made once,
found by content."""

from __future__ import annotations

import fcntl
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from avatar_rl.cluster.config import RunConfig
from avatar_rl.cluster.recipe.architecture import heads_of
from avatar_rl.cluster.recipe.content import key, model_digest
from avatar_rl.cluster.recipe.ready_start import (
    ASKED_ONLY,
    TAUGHT_ONLY,
    ready_start,
    sft_settings,
    template_settings,
)
from avatar_rl.common.errors import ConfigError, DataError, InputError, ModelError
from avatar_rl.common.stand_in import stand_in
from avatar_rl.common.types import ReadOnlyObject
from avatar_rl.common.weight_files import WeightFiles, fingerprint
from avatar_rl.learner.adapter.files import (
    AdapterFolder,
    check_targets,
    is_adapter,
    merge_adapter,
)
from avatar_rl.prompts.datasets import PromptIndex
from avatar_rl.prompts.record import check_roots
from avatar_rl.prompts.synthetic.config import WorldConfig
from avatar_rl.prompts.synthetic.tiny_model import HEADS

#: Words of a tensor's name that say it is of a tower, and words that freeze it.
TOWERS = frozenset({"visual", "audio_tower"})
Progress = Callable[[str, str], None]  # phase, detail
Advance = Callable[[int, int], None]  # done, of how many


@dataclass(frozen=True)
class Datasets:
    """Dataset files of a run; all exist."""

    train: Path
    heldout: Path | None
    sft: Path | None
    public: Path | None = None  # questions of public benchmarks; nothing of it is trained

    @property
    def answered(self) -> tuple[Path, ...]:
        """The files whose prompts rollout actors answer."""
        return self.asked if self.public is None else (*self.asked, self.public)

    @property
    def asked(self) -> tuple[Path, ...]:
        """The files whose prompts are asked during RL."""
        return (self.train,) if self.heldout is None else (self.train, self.heldout)


@contextmanager
def made_once(folder: Path, on_wait: Callable[[str], None]) -> Iterator[bool]:
    """Whether the caller has to make ``folder``; nobody else does within this block.

    ``on_wait`` is told when another run is at it. Should that one die, its lock dies with it and
    the caller takes over."""
    if folder.is_dir():
        yield False
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f".{folder.name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            on_wait(f"another run makes {folder}")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield not folder.is_dir()


def prepare_datasets(
    config: RunConfig, progress: Progress, advance: Advance = lambda done, total: None
) -> Datasets:
    """The recipe's files, or the synthetic world from the cache. Raises DataError naming a missing
    file."""
    data = config.data
    if data.synthetic is None:
        found = Datasets(_existing("train", data.train), data.heldout, data.sft)
        for name in ("heldout", "sft"):
            if getattr(found, name) is not None:
                _existing(name, getattr(found, name))
        return found
    asked = _world(config, data.synthetic, ("train", "heldout"), progress, advance)
    taught = None
    if config.cold_start is not None and ready_start(config) is None:
        taught = _world(config, data.synthetic, ("sft",), progress, advance) / "sft.jsonl"
    return Datasets(asked / "train.jsonl", asked / "heldout.jsonl", taught)


def _world(
    config: RunConfig,
    world: WorldConfig,
    splits: tuple[str, ...],
    progress: Progress,
    advance: Advance,
) -> Path:
    """The folder of some splits of the synthetic world, from the cache or made now. A cold start
    that is ready needs none of the clips that it was taught with, which are most."""
    what = "world" if "train" in splits else "world-sft"
    irrelevant = TAUGHT_ONLY if "train" in splits else ASKED_ONLY
    settings = world.model_dump(mode="json", exclude=irrelevant)
    folder = config.output.cache / f"{what}-{key(settings)}"
    with made_once(folder, lambda why: progress("waiting for the world", why)) as missing:
        if missing:
            from avatar_rl.prompts.synthetic.world import size_of, synthesize

            count = sum(size_of(split, world) for split in splits)
            progress("synthesising the world", f"{count} clips as .mp4 and .wav")
            synthesize(folder, world, splits=splits, on_clip=advance)
    return folder


def prepare_base_model(config: RunConfig, progress: Progress) -> Path:
    """The model folder, the recipe's cold start where that is ready, or the tiny Qwen2.5-Omni from
    the cache."""
    if (ready := ready_start(config)) is not None:
        progress("cold start is ready", f"{ready} (--cold_start.ready null trains it anew)")
        return ready
    if config.model.path != "tiny":
        path = Path(config.model.path)
        if not path.is_dir():
            raise ConfigError(
                f"model.path {path} is not a folder: give a Hugging Face checkpoint folder, or "
                "'tiny'"
            )
        if is_adapter(path):
            return _merged(AdapterFolder.open(path), config, progress)
        if config.model.base is not None:
            raise ConfigError(
                f"model.base {config.model.base} is for an adapter, and model.path {path} holds "
                "none: set model.base to null"
            )
        check_model_folder(path)
        return path.resolve()
    folder = config.output.cache / f"tiny-omni-{key(config.seed)}"
    with made_once(folder, lambda why: progress("waiting for the tiny model", why)) as missing:
        if missing:
            from avatar_rl.prompts.synthetic.tiny_model import build_tiny_omni

            progress("building the tiny model", "Qwen2.5-Omni, 1M parameters")
            build_tiny_omni(folder, seed=config.seed)
    return folder.resolve()


def checkpoint_folder(config: RunConfig) -> Path | None:
    """The checkpoint that ``model.path`` names: itself, or the base of its adapter; None for the
    tiny model, which is built. Raises what ``AdapterFolder.open`` and ``base`` do."""
    if config.model.path == "tiny":
        return None
    path = Path(config.model.path)
    return AdapterFolder.open(path).base(config.model.base) if is_adapter(path) else path


def check_lora(config: RunConfig, base: Path) -> None:
    """The recipe's adapters fit the model ``base``. Raises what ``check_targets`` does."""
    if config.cold_start is not None and config.cold_start.lora is not None:
        check_targets(base, config.cold_start.lora, "cold_start.lora")
    if config.learner.lora is not None:
        check_targets(base, config.learner.lora, "learner.lora")


def check_sequence_parallel(config: RunConfig) -> None:
    """The model's attention heads divide by the ranks that share a pack. Raises ConfigError, and
    what ``checkpoint_folder`` does."""
    size = config.learner.sequence_parallel
    if size == 1:
        return
    folder = checkpoint_folder(config)
    heads = HEADS if folder is None else heads_of(folder)
    if heads is not None and heads % size:
        fitting = ", ".join(str(n) for n in range(1, heads + 1) if not heads % n)
        raise ConfigError(
            f"{folder or 'the tiny model'} has {heads} attention heads, which "
            f"learner.sequence_parallel {size} does not divide: set it to one of {fitting}"
        )


def check_embeddings(config: RunConfig) -> None:
    """Embeddings that shall be stored are of frozen towers. Raises ConfigError, and what
    ``checkpoint_folder`` and ``WeightFiles.find`` do. The rank has the last word: it knows what an
    adapter lies on."""
    learner = config.learner
    if learner.embeddings.mode != "on" or learner.lora is not None:
        return
    folder = checkpoint_folder(config)
    names = sorted(TOWERS) if folder is None else WeightFiles.find(folder).tensors
    trained = sorted(
        {
            word
            for name in names
            for word in TOWERS.intersection(name.split("."))
            if not any(fragment in name for fragment in learner.optimizer.freeze)
        }
    )
    if trained:
        raise ConfigError(
            f"learner.embeddings.mode is on, but the towers train: {' and '.join(trained)}: add "
            f"{' and '.join(trained)} to learner.optimizer.freeze, or set it to auto or off"
        )


def _merged(adapter: AdapterFolder, config: RunConfig, progress: Progress) -> Path:
    """The adapter's base with the adapter in it, from the cache: everything after this reads one
    plain checkpoint. Raises what ``AdapterFolder.base`` and ``merge_adapter`` do."""
    base = adapter.base(config.model.base)
    check_model_folder(base)
    digests = {"adapter": model_digest(adapter.path), "base": fingerprint(base)}
    folder = config.output.cache / f"merged-{key(digests)}"
    with made_once(folder, lambda why: progress("waiting for the merged model", why)) as missing:
        if missing:
            progress("merging the adapter", f"{adapter.path} into {base}")
            merge_adapter(adapter, base, folder)
    return folder.resolve()


def check_model_folder(path: Path) -> None:
    """Config, weights, tokenizer and, for a model that sees or hears, processor are there. Raises
    ModelError."""
    needed = {
        "config.json": ("config.json",),
        "weights (*.safetensors)": ("*.safetensors",),
        "tokenizer": ("tokenizer.json", "vocab.json", "tokenizer.model"),
    }
    config = _model_config(path / "config.json") if (path / "config.json").is_file() else {}
    if "vision_config" in str(config):
        needed["processor (preprocessor_config.json)"] = (
            "preprocessor_config.json",
            "processor_config.json",
        )
    missing = [
        name for name, patterns in needed.items() if not any(any(path.glob(p)) for p in patterns)
    ]
    if missing:
        raise ModelError(
            f"model folder {path} has no {', no '.join(missing)}: save model, tokenizer and "
            "processor into one folder "
            "with save_pretrained"
        )
    WeightFiles.find(path)  # a pointer or a torn file is told before anything is started


def _model_config(file: Path) -> ReadOnlyObject:
    """Raises ModelError for what names no model."""
    try:
        config = json.loads(file.read_bytes())
    except ValueError as error:
        what = " ".join(stand_in(file) or ("", "")) or f"cannot be read ({error})"
        raise ModelError(f"{file} {what}: copy it again from the model's source") from error
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise ModelError(f"{file} names no model_type: copy it again from the model's source")
    return config


def cold_start_folder(config: RunConfig, base: Path, sft: Path) -> Path:
    """Where the cold-started policy of this recipe lies: equal data, model and settings find it
    again."""
    assert config.cold_start is not None
    settings: ReadOnlyObject = {
        "sft": sft_settings(config.cold_start),
        "template": template_settings(config.data.template),
        "data": hashlib.sha256(sft.read_bytes()).hexdigest(),
        "model": model_digest(base),
    }
    return config.output.cache / f"cold-start-{key(settings)}"


def read_prompts(path: Path, config: RunConfig) -> PromptIndex:
    """The dataset's prompts. Raises DataError naming the line at fault, or an empty file."""
    index = PromptIndex.read([path], config.data.reader)
    if not len(index):
        raise DataError(f"dataset {path} holds no prompt: check the file and data.reader")
    return index


def _existing(name: str, path: Path | None) -> Path:
    if path is None or not path.exists():
        raise DataError(
            f"data.{name}: {path} does not exist; give a .jsonl, .json or .parquet file or a "
            "datasets folder"
        )
    return path


def check_media(prompts: PromptIndex, roots: Sequence[Path] = ()) -> None:
    """Every media file is there, holds something and lies in one of ``roots``, where there are any.

    Raises DataError naming the first faults; workers decode."""
    seen: set[str] = set()
    faults = []
    for prompt in prompts:
        for item in prompt.media.items:
            if item.uri in seen:
                continue
            seen.add(item.uri)
            file = Path(item.uri)
            try:
                check_roots(file, roots)
            except InputError as error:
                faults.append(f"prompt {prompt.id!r}: {item.kind} {error.where} {error.what}")
                continue
            if not file.is_file():
                faults.append(f"prompt {prompt.id!r}: {item.kind} {file} is missing")
            elif file.stat().st_size == 0:
                faults.append(f"prompt {prompt.id!r}: {item.kind} {file} is empty")
    if faults:
        more = f" (and {len(faults) - 3} more)" if len(faults) > 3 else ""
        raise DataError(
            f"{'; '.join(faults[:3])}{more}: restore the files or run `avatar data validate` on "
            "the dataset"
        )


def check_hints(prompts: PromptIndex, config: RunConfig) -> None:
    """No hint says the answer, where hints may fire (docs/method.md 1.4). Raises DataError naming
    the first ones that do."""
    if not config.buffer.hints.enabled:
        return
    from avatar_rl.prompts.hints import hint_leaks

    leaks = [f"prompt {prompt.id!r}: {prompt.hint!r}" for prompt in prompts if hint_leaks(prompt)]
    if leaks:
        more = f" (and {len(leaks) - 3} more)" if len(leaks) > 3 else ""
        raise DataError(
            f"hints that give the answer away: {'; '.join(leaks[:3])}{more}; write them anew "
            "(`avatar hints generate`), drop them, or set buffer.hints.enabled: false"
        )


def check_fusion(prompts: PromptIndex, config: RunConfig) -> None:
    """Some prompt can be asked by sight alone and by sound alone, where a reward compares with that
    (docs/method.md 2.2).

    Raises DataError else: the reward would be masked for every completion.
    """
    if not config.rewards.asks_unimodal:
        return
    from avatar_rl.actors.groups import parts_of

    if not any(
        len(parts_of(prompt, unimodal=True)) > 1
        for prompt in prompts
        if config.data.select.takes(prompt)
    ):
        raise DataError(
            "rewards.weights.fusion compares with video alone and audio alone, but no training "
            "prompt has both: add "
            "such prompts, widen data.select or drop the reward"
        )
