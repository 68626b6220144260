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
from avatar_rl.cluster.machine.fit import RESERVE
from avatar_rl.cluster.recipe.architecture import Architecture, architecture_of, decoder_of
from avatar_rl.cluster.recipe.gpus import local_gpus
from avatar_rl.cluster.recipe.load import check, find_recipe, load_recipe
from avatar_rl.cluster.recipe.memory import (
    BFLOAT16,
    BOARD_VERSIONS,
    GIB,
    LearnerSetting,
    MemoryPlan,
    lasting_bytes,
)
from avatar_rl.cluster.recipe.overlays import merge
from avatar_rl.cluster.recipe.presets import stated
from avatar_rl.common.errors import AvatarError, ConfigError
from avatar_rl.common.files import replace_text
from avatar_rl.common.types import Json, JsonObject

TINY = Path("recipes") / "local.yaml"
INSTRUCTION = (
    "Think step by step inside <think> </think>, then give only the final answer inside <answer> "
    "</answer>."
)
#: Of a GPU, for what the plan does not count: activations, NCCL buffers, CUDA graphs.
ROOM = 15 * GIB
#: Tokens of a prompt with its media, and of a completion, where the model's context is long enough.
PROMPT, COMPLETION = 14_336, 2_048
#: Tokens of a pack: a longest prompt with its eight completions.
PACK = 32_768
#: Tokens of an engine's step.
BATCHED = 16_384
#: Keys and values on a GPU that is shared, the first that fits.
CACHES = tuple(size * GIB for size in (16, 8, 4, 2, 1))
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
    offload: bool = False
    shared: bool = False  # each has an engine and a rank, by turns
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
    sections, note = _sections(
        wanted, name, split, _context(config), _frozen(Path(wanted.model), config), model
    )
    body = "\n".join(_dumped(key, value) for key, value in sections.items())
    return "\n".join([*_head(out, wanted, note), body]) + "\n"


def _head(out: Path, wanted: Wanted, note: str) -> list[str]:
    where = f"{wanted.gpus} GPU(s) of {wanted.gpu_bytes / GIB:.0f} GiB" if wanted.gpus else "no GPU"
    lines = [
        modeline(),
        f"# {Path(wanted.model).name} on {where}, written by `avatar init`.",
        f"# `avatar explain KEY {out.name}` says what a key means and where its value comes from.",
    ]
    if note:
        lines.append(f"# {note}")
    if wanted.heldout is None:
        lines.append("# data.heldout is left out: without it no held-out accuracy is measured.")
    return lines


@dataclass(frozen=True)
class Lengths:
    """Tokens of a prompt and of a completion."""

    prompt: int
    completion: int

    @classmethod
    def within(cls, context: int) -> Lengths:
        completion = min(COMPLETION, context // 4)
        return cls(min(PROMPT, context - completion), completion)

    @property
    def both(self) -> int:
        return self.prompt + self.completion


def _sections(
    wanted: Wanted,
    name: str,
    split: Split,
    context: int,
    frozen: list[str],
    model: Architecture | None,
) -> tuple[JsonObject, str]:
    """The recipe, and what is to be said of it. On GPUs its cache and its packs are the largest of
    a few that the memory plan holds."""
    lengths = Lengths.within(context)
    common: JsonObject = {
        "name": name,
        "preset": wanted.preset,
        "model": {"path": wanted.model},
        "data": _data(wanted, lengths, model, frozen),
    }
    if not wanted.gpus:
        return common | _without_gpu(wanted, lengths, frozen), ""
    found: JsonObject = {}
    misfits: list[str] = []
    packs = (PACK, lengths.both) if lengths.both < PACK else (lengths.both,)
    for pack in packs:
        for cache in CACHES if split.shared else CACHES[:1]:
            parts = _on_gpus(wanted, split, lengths, frozen, model, pack=pack, cache=cache)
            found = common | parts
            plan = MemoryPlan.of(check(merge(stated(wanted.preset), found), source="of init"))
            misfits = [] if plan is None else _misfits(plan, wanted, split)
            if not misfits:
                return found, split.note
    return found, "By the memory plan it does not fit: " + "; ".join(misfits)


def _misfits(plan: MemoryPlan, wanted: Wanted, split: Split) -> list[str]:
    """Why the plan does not fit on the GPUs, each with the remedy."""
    if split.shared:
        return plan.misfits(wanted.gpu_bytes)
    if plan.learner_gpu + RESERVE <= wanted.gpu_bytes:
        return []
    return [
        f"a learner rank takes {plan.learner_gpu / GIB:.1f} GiB beside {RESERVE / GIB:.0f} GiB for "
        f"buffers, of {wanted.gpu_bytes / GIB:.0f}: use more or larger GPUs, or a smaller model"
    ]


def _data(
    wanted: Wanted, lengths: Lengths, model: Architecture | None, frozen: list[str]
) -> JsonObject:
    """With the sound of a video where the model hears, and its frames within the prompt."""
    assert wanted.train is not None
    data: JsonObject = {"train": str(wanted.train.absolute())}
    if wanted.heldout is not None:
        data["heldout"] = str(wanted.heldout.absolute())
    template: JsonObject = {"max_prompt_tokens": lengths.prompt}
    if model is not None and model.hears:
        data["reader"] = {"fps": 2.0, "audio_in_video": True}
        data["media"] = {"missing_sound": "silence"}
    if frozen or (model is not None and model.encoders > 0):
        template["total_video_tokens"] = lengths.prompt * 5 // 7
    data["template"] = {**template, "instruction": INSTRUCTION}
    return data


def _without_gpu(wanted: Wanted, lengths: Lengths, frozen: list[str]) -> JsonObject:
    engine: JsonObject = {
        "max_model_len": lengths.both,
        "max_num_seqs": 16,
        "kv_cache_memory_bytes": GIB,
    }
    return {
        "loop": {"steps": wanted.steps, "prompts_per_step": 4},
        "rollout": {
            "workers": 1,
            "max_sequences": 16,
            "engine": engine,
            "sampling": {"temperature": 1.0, "max_tokens": lengths.completion},
        },
        "learner": {
            "ranks": 1,
            "objective": {"beta": 0.04},
            "optimizer": {"lr": 1.0e-6, "freeze": list(frozen)},
        },
        "evaluation": {"every": 25},
    }


def _on_gpus(
    wanted: Wanted,
    split: Split,
    lengths: Lengths,
    frozen: list[str],
    model: Architecture | None,
    *,
    pack: int,
    cache: int,
) -> JsonObject:
    """Shared GPUs: an adapter is trained, and engine and learner take turns (docs/one-gpu.md).
    Else full training, each on GPUs of its own."""
    shared = split.shared
    engine: JsonObject = {
        "max_model_len": lengths.both,
        "max_num_seqs": 64 if shared else 256,
        "max_num_batched_tokens": max(BATCHED, lengths.both),
    }
    loop: JsonObject = {"steps": wanted.steps, "prompts_per_step": 16, "step_timeout_s": 3600}
    learner: JsonObject = {
        "ranks": split.ranks,
        "micro_batch_tokens": pack,
        "gradient_checkpointing": True,
        "objective": {"beta": 0.04},
    }
    resources: JsonObject = {"start_timeout_s": 1800}
    if shared:
        engine["kv_cache_memory_bytes"] = cache
        loop["max_staleness"] = 0
        learner["lora"] = {"rank": 32, "alpha": 64}
        learner["optimizer"] = {"lr": 1.0e-5, "freeze": list(frozen)}
        learner["embeddings"] = {"workers": 0}  # one would keep towers of its own on the GPU
        resources |= {"colocate": True, "object_store_bytes": 4 * GIB}
    else:
        weights = 0.0 if model is None else model.parameters * BFLOAT16 * BOARD_VERSIONS
        learner["optimizer"] = {
            "lr": 1.0e-6,
            "freeze": list(frozen),
            "zero_stage": 3,
            "offload_optimizer": split.offload,
        }
        resources |= {
            "rollout_gpus": 1,
            "learner_gpus": 1,
            "object_store_bytes": max(4 * GIB, (int(weights / GIB) + 2) * GIB),
        }
    return {
        "loop": loop,
        "rollout": {
            "workers": split.rollouts,
            "max_sequences": 64 if shared else 256,
            "lease_s": 300,
            "engine": engine,
            "sampling": {"temperature": 1.0, "max_tokens": lengths.completion},
        },
        "learner": learner,
        "evaluation": {"every": 25, "timeout_s": 3600},
        "supervision": {"stall_s": 600, "start_stall_s": 300},  # long completions, large models
        "resources": resources,
    }


def share_out(model: Architecture | None, gpus: int, gpu_bytes: float) -> Split:
    """Learner ranks as few as the plan of full training allows (docs/cluster.md), half of the GPUs
    at least; the rest generates. Where it does not fit, and with one GPU, they are shared."""
    if gpus < 2:
        return Split(1, 1, shared=gpus == 1)
    for offload in (False, True):
        for ranks in range(gpus // 2, gpus):
            if model is None or _lasting(model, ranks, 3, offload) + ROOM <= gpu_bytes:
                return Split(gpus - ranks, ranks, offload=offload)
    assert model is not None  # one of unknown size has left above
    note = (
        f"An adapter (LoRA): by the plan of docs/cluster.md full training of {model.name} does not "
        f"fit on {gpus} GPUs of {gpu_bytes / GIB:.0f} GiB."
    )
    return Split(gpus, gpus, shared=True, note=note)


def _lasting(model: Architecture, ranks: int, zero_stage: int, offload: bool) -> float:
    setting = LearnerSetting(ranks=ranks, zero_stage=zero_stage, offload=offload)
    return lasting_bytes(model, setting)


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


def _frozen(folder: Path, config: JsonObject) -> list[str]:
    """Names of the towers that the model's weights hold; where they are not there yet, those that a
    Qwen's config.json tells of."""
    names: set[str] = set()
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names.update(json.loads(index.read_bytes()).get("weight_map", {}))
    for file in [] if names else sorted(folder.glob("*.safetensors")):
        with file.open("rb") as stream:
            header = stream.read(int.from_bytes(stream.read(8), "little"))
        names.update(json.loads(header))
    if not names and str(config.get("model_type", "")).startswith("qwen"):
        outer = config.get("thinker_config", config)
        assert isinstance(outer, dict)
        told = {"visual": "vision_config", "audio_tower": "audio_config"}
        names = {tower for tower, key in told.items() if key in outer}
    parts = {part for name in names for part in name.split(".")}
    return [tower for tower in ENCODERS if tower in parts]


def _dumped(key: str, value: Json) -> str:
    flow = None if isinstance(value, dict) else False
    text: str = yaml.safe_dump(
        {key: value}, sort_keys=False, allow_unicode=True, width=10_000, default_flow_style=flow
    )
    return text.rstrip("\n")
