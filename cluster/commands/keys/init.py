"""`avatar init`: writes a first recipe for a model, a dataset and a machine."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

from avatar_rl.cluster.commands.doctor import shortcomings
from avatar_rl.cluster.commands.keys.schema import modeline
from avatar_rl.cluster.config import RunConfig
from avatar_rl.cluster.recipe.architecture import Architecture, architecture_of, decoder_of
from avatar_rl.cluster.recipe.gpus import local_gpus
from avatar_rl.cluster.recipe.load import find_recipe, load_recipe
from avatar_rl.cluster.recipe.memory import (
    BFLOAT16,
    BOARD_VERSIONS,
    GIB,
    LearnerSetting,
    lasting_bytes,
)
from avatar_rl.common.errors import AvatarError, ConfigError
from avatar_rl.common.files import replace_text
from avatar_rl.common.types import JsonObject

TINY = Path("recipes") / "local.yaml"
INSTRUCTION = (
    "Think step by step inside <think> </think>, then give only the final answer inside <answer> "
    "</answer>."
)
#: Of a GPU, for what the plan does not count: activations, NCCL buffers, CUDA graphs.
ROOM = 15 * GIB
#: Tokens of a prompt with its media, and of a completion, where the model's context is long enough.
PROMPT, COMPLETION = 14_336, 2_048
#: Rows of the dataset that are read before the recipe is written.
LOOKED_AT = 100
ENCODERS = ("visual", "vision_tower", "audio_tower", "vision_model")


@dataclass(frozen=True)
class Wanted:
    """What the recipe is for."""

    model: str  # a folder, or tiny
    train: Path | None
    heldout: Path | None
    gpus: int
    gpu_bytes: float  # of each
    preset: str
    steps: int


@dataclass(frozen=True)
class Split:
    """How the GPUs are shared out."""

    rollouts: int
    ranks: int
    rollout_gpus: float
    learner_gpus: float
    offload: bool = False
    note: str = ""


def machine() -> tuple[int, float]:
    """GPUs of this machine, and the bytes of the smallest; (0, 0) without."""
    found, _ = local_gpus()
    return len(found), min((gpu.bytes for gpu in found), default=0)


def write(out: Path, wanted: Wanted, *, force: bool = False) -> int:
    """Write the recipe, then say what is still missing to run it; exit code 0.

    Raises ConfigError for a file that is there already (unless ``force``), for a model or a dataset
    that cannot be used, and for an unknown preset."""
    if out.exists() and not force:
        raise ConfigError(f"{out} is there already: choose another name, or give --force")
    if out.suffix not in (".yaml", ".yml"):
        raise ConfigError(f"{out}: a recipe's name ends in .yaml")
    text = _tiny() if wanted.model == "tiny" else _recipe(out, wanted)
    out.parent.mkdir(parents=True, exist_ok=True)
    replace_text(out, text)
    print(f"wrote {out}")
    config = load_recipe(out)
    missing = [*shortcomings(config), *_unreadable(config)]
    for line in missing:
        print(f"  missing  {line}")
    if wanted.model != "tiny":
        print(f"  check the data   avatar data validate {wanted.train} --recipe {out}")
    print(f"  look at it       avatar train {out} --dry-run")
    print(f"  {'then run it      ' if missing else 'run it           '}avatar train {out}")
    return 0


def _tiny() -> str:
    """The demo's recipe, to be changed."""
    lines = find_recipe(TINY).read_text(encoding="utf-8").splitlines()
    return "\n".join([modeline(), *lines[1:]]) + "\n"


def _recipe(out: Path, wanted: Wanted) -> str:
    if wanted.train is None:
        raise ConfigError("a recipe for a model of your own needs --data FILE")
    for path in (wanted.train, wanted.heldout):
        if path is not None and not path.exists():
            raise ConfigError(f"{path} does not exist: give a .jsonl, .json or .parquet file")
    config = _model_config(Path(wanted.model))
    model = architecture_of(wanted.model)
    split = share_out(model, wanted.gpus, wanted.gpu_bytes)
    name = re.sub(r"[^a-z0-9.]+", "-", Path(wanted.model).name.lower()).strip("-.") or "mine"
    sections = _sections(wanted, name, split, _context(config), _frozen(Path(wanted.model)), model)
    body = "\n".join(_dumped(key, value) for key, value in sections)
    return "\n".join([*_head(out, wanted, split), body]) + "\n"


def _head(out: Path, wanted: Wanted, split: Split) -> list[str]:
    where = f"{wanted.gpus} GPU(s) of {wanted.gpu_bytes / GIB:.0f} GiB" if wanted.gpus else "no GPU"
    lines = [
        modeline(),
        f"# {Path(wanted.model).name} on {where}, written by `avatar init`.",
        f"# `avatar explain KEY {out.name}` says what a key means and where its value comes from.",
    ]
    if split.note:
        lines.append(f"# {split.note}")
    if wanted.heldout is None:
        lines.append("# data.heldout is left out: without it no held-out accuracy is measured.")
    return lines


def _sections(
    wanted: Wanted,
    name: str,
    split: Split,
    context: int,
    frozen: list[str],
    model: Architecture | None,
) -> Iterator[tuple[str, JsonObject | str]]:
    completion = min(COMPLETION, context // 4)
    prompt = min(PROMPT, context - completion)
    assert wanted.train is not None
    data: JsonObject = {"train": str(wanted.train.absolute())}
    if wanted.heldout is not None:
        data["heldout"] = str(wanted.heldout.absolute())
    data["template"] = {"max_prompt_tokens": prompt, "instruction": INSTRUCTION}
    small = not wanted.gpus
    engine: JsonObject = {"max_model_len": prompt + completion, "max_num_seqs": 16 if small else 64}
    if small:
        engine["kv_cache_memory_bytes"] = 1 << 30
    elif split.rollout_gpus < 1:
        engine["gpu_memory_utilization"] = 0.4
    optimizer: JsonObject = {"lr": 1.0e-6, "freeze": list(frozen)}
    if not small:
        optimizer["zero_stage"] = 3
        optimizer["offload_optimizer"] = split.offload
    yield "name", name
    yield "preset", wanted.preset
    yield "model", {"path": wanted.model}
    yield "data", data
    yield "loop", {"steps": wanted.steps, "prompts_per_step": 4 if small else 16}
    yield (
        "rollout",
        {
            "workers": split.rollouts,
            "max_sequences": 16 if small else 64,
            "engine": engine,
            "sampling": {"temperature": 1.0, "max_tokens": completion},
        },
    )
    learner: JsonObject = {"ranks": split.ranks}
    if not small:
        learner |= {"gradient_checkpointing": True, "micro_batch_tokens": prompt + completion}
    yield "learner", {**learner, "objective": {"beta": 0.04}, "optimizer": optimizer}
    yield "evaluation", {"every": 25}
    if not small:
        weights = 0.0 if model is None else model.parameters * BFLOAT16 * BOARD_VERSIONS
        yield (
            "resources",
            {
                "rollout_gpus": split.rollout_gpus,
                "learner_gpus": split.learner_gpus,
                "object_store_bytes": max(4 * GIB, (int(weights / GIB) + 2) * GIB),
            },
        )


def share_out(model: Architecture | None, gpus: int, gpu_bytes: float) -> Split:
    """Learner ranks as few as the plan allows (docs/cluster.md), half of the GPUs at least; the
    rest generates. One GPU is shared."""
    if gpus == 0:
        return Split(1, 1, 0.0, 0.0)
    if gpus == 1:
        fits = model is None or _lasting(model, 1, 0, True) + ROOM < gpu_bytes * 0.55
        note = "" if fits else _too_small(model, gpus, gpu_bytes)
        return Split(1, 1, 0.45, 0.45, offload=True, note=note)
    for offload in (False, True):
        for ranks in range(gpus // 2, gpus):
            if model is None or _lasting(model, ranks, 3, offload) + ROOM <= gpu_bytes:
                return Split(gpus - ranks, ranks, 1.0, 1.0, offload=offload)
    ranks = gpus - 1
    return Split(1, ranks, 1.0, 1.0, offload=True, note=_too_small(model, gpus, gpu_bytes))


def _lasting(model: Architecture, ranks: int, zero_stage: int, offload: bool) -> float:
    setting = LearnerSetting(ranks=ranks, zero_stage=zero_stage, offload=offload)
    return lasting_bytes(model, setting)


def _too_small(model: Architecture | None, gpus: int, gpu_bytes: float) -> str:
    name = model.name if model is not None else "the model"
    return (
        f"By the plan of docs/cluster.md {name} does not fit on {gpus} GPU(s) of "
        f"{gpu_bytes / GIB:.0f} GiB: use more or larger ones, or a smaller model."
    )


def _model_config(folder: Path) -> JsonObject:
    """The model's config.json. Raises ConfigError for what is no model folder."""
    try:
        found = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"--model {folder} is no Hugging Face checkpoint folder (its config.json cannot be "
            "read): download one with `hf download ORG/NAME --local-dir FOLDER`, or give tiny"
        ) from error
    if not isinstance(found, dict):
        raise ConfigError(f"--model {folder}: config.json is not a mapping")
    return found


def _unreadable(config: RunConfig) -> Iterator[str]:
    """Why the first rows of a dataset cannot be read as prompts, with the remedy."""
    from avatar_rl.prompts.datasets import PromptIndex

    reader = config.data.reader.model_copy(update={"limit": LOOKED_AT})
    for name in ("train", "heldout"):
        path = getattr(config.data, name)
        if path is None:
            continue
        try:
            if not len(PromptIndex.read([path], reader)):
                yield f"data.{name}: {path} holds no prompt; fill it"
        except AvatarError as error:
            yield f"data.{name}: {error}"


def _context(config: JsonObject) -> int:
    """Tokens of a prompt and its completion: those we ask for, or fewer where the model takes no
    more."""
    longest = decoder_of(config).get("max_position_embeddings")
    asked = PROMPT + COMPLETION
    return min(asked, longest) if isinstance(longest, int) else asked


def _frozen(folder: Path) -> list[str]:
    """Names of the towers that the model's weights hold."""
    names: set[str] = set()
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names.update(json.loads(index.read_bytes()).get("weight_map", {}))
    for file in [] if names else sorted(folder.glob("*.safetensors")):
        with file.open("rb") as stream:
            header = stream.read(int.from_bytes(stream.read(8), "little"))
        names.update(json.loads(header))
    parts = {part for name in names for part in name.split(".")}
    return [tower for tower in ENCODERS if tower in parts]


def _dumped(key: str, value: JsonObject | str) -> str:
    flow = None if isinstance(value, dict) else False
    text: str = yaml.safe_dump(
        {key: value}, sort_keys=False, allow_unicode=True, width=10_000, default_flow_style=flow
    )
    return text.rstrip("\n")
