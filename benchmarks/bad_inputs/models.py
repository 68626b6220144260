"""Group E: model folders, chat templates, published weights."""

from __future__ import annotations

import functools
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import nn

from avatar_rl.buffer_service.weights.receiver import WeightContract
from avatar_rl.common.types import JsonObject
from avatar_rl.learner.model.load import load_model
from avatar_rl.learner.model.names import NameMap
from avatar_rl.prompts.config import MediaConfig, TemplateConfig
from avatar_rl.prompts.encoding.template import PromptEncoder
from avatar_rl.prompts.media.loader import MediaLoader
from avatar_rl.prompts.record import Prompt
from avatar_rl.prompts.synthetic.tiny_model import build_tiny_omni
from benchmarks.bad_inputs.entries import BadInput, Try, command
from tests.unit.media_files import tone, write_video, write_wav

SIZES: dict[str, Any] = {
    "vocab_size": 200,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
KEPT = tempfile.TemporaryDirectory(prefix="bad_input_models_")  # gone when the process ends
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"
Change = Callable[[Path], object]


@functools.cache
def kept(make: Callable[[Path], None]) -> Path:
    """A folder that ``make`` filled, once for all entries."""
    folder = Path(KEPT.name) / make.__name__
    make(folder)
    return folder


def text_model(folder: Path) -> None:
    hf.MistralForCausalLM(hf.MistralConfig(**SIZES)).save_pretrained(folder)


def omni(folder: Path) -> None:
    build_tiny_omni(folder)


def without_head(folder: Path) -> None:
    config = hf.RwkvConfig(vocab_size=200, hidden_size=32, num_hidden_layers=2)
    hf.RwkvForCausalLM(config).save_pretrained(folder)


def with_state(folder: Path) -> None:
    config = hf.Lfm2Config(**SIZES, layer_types=["conv", "full_attention"])
    hf.Lfm2ForCausalLM(config).save_pretrained(folder)


def changed(make: Callable[[Path], None], change: Change, folder: Path) -> Path:
    shutil.copytree(kept(make), folder / "model")
    change(folder / "model")
    return folder / "model"


def loaded(change: Change, make: Callable[[Path], None] = text_model) -> Try:
    """The learner's load of a folder that ``change`` spoilt."""

    def act(folder: Path) -> str:
        load_model(changed(make, change, folder))
        return ""

    return act


def encoded(change: Change, prompt: Prompt | None = None, **config: object) -> Try:
    """A prompt in the tiny Omni's template and processor, spoilt by ``change``."""

    def act(folder: Path) -> str:
        write_video(folder / "clip.mp4", [(200, 30, 10)] * 8)
        write_wav(folder / "sound.wav", tone(440, 2.0, 16_000), 16_000)
        loader = MediaLoader(MediaConfig(), folder)
        model = changed(omni, change, folder)
        encoder = PromptEncoder(model, loader, TemplateConfig.model_validate(config))
        encoder.encode(prompt or asked(), hinted=prompt is not None and not prompt.media.items)
        return ""

    return act


def trained(change: Change, *words: str) -> Try:
    """`avatar train` over a tiny Omni that ``change`` spoilt, with these ``words`` besides."""

    def act(folder: Path) -> str:
        (folder / "recipe.yaml").write_text("data: {synthetic: {n_train: 8}}\n")
        model = changed(omni, change, folder)
        out = f"--output.folder={folder}/runs"
        return command("train", "{}/recipe.yaml", f"--model.path={model}", out, *words)(folder)

    return act


def published(change: Callable[[dict[str, torch.Tensor]], list[tuple[str, torch.Tensor]]]) -> Try:
    """What a rollout actor says to weights that ``change`` spoilt."""

    def act(folder: Path) -> str:
        path = kept(text_model)
        WeightContract(path).check(change(load_file(path / WEIGHTS)))
        return ""

    return act


def asked(**more: object) -> Prompt:
    fields = {"id": "p", "question": "Which?", "answer": "a", "problem_type": "free_form"}
    return Prompt.model_validate(fields | more)


def with_media(*items: JsonObject) -> Prompt:
    return asked(media={"items": list(items)})


def same(folder: Path) -> None: ...


def removed(*names: str) -> Change:
    def change(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return change


def written(name: str, text: str) -> Change:
    return lambda folder: (folder / name).write_text(text)


def configured(**values: object) -> Change:
    def change(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | values))

    return change


def cut(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: len(data) // 2])


def lacking_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    del tensors["lm_head.weight"]
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def sharded(index: bool, first: bool = True, second: bool = True, swapped: bool = False) -> Change:
    """Two shards and an index that names both, less what is left out."""

    def change(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        (folder / WEIGHTS).unlink()
        names = sorted(tensors)
        parts = {FIRST: names[::2], SECOND: names[1::2]}
        for shard, written in ((FIRST, first), (SECOND, second)):
            if written:
                part = {name: tensors[name] for name in parts[shard]}
                save_file(part, folder / shard, metadata={"format": "pt"})
        if index:
            shards = dict(zip(parts, reversed(parts) if swapped else parts, strict=True))
            weight_map = {name: shards[shard] for shard in parts for name in parts[shard]}
            (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))

    return change


def twice(folder: Path) -> None:
    """A consolidated file beside shards, and nothing says which counts."""
    whole = (folder / WEIGHTS).read_bytes()
    sharded(index=False)(folder)
    (folder / "policy.safetensors").write_bytes(whole)


def eight_bits(folder: Path) -> None:
    tensors = {name: t.to(torch.int8) for name, t in load_file(folder / WEIGHTS).items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def not_numbers(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    tensors["lm_head.weight"] *= float("nan")
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def without_tensors(folder: Path) -> None:
    save_file({}, folder / WEIGHTS, metadata={"format": "pt"})


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()


def other_checkpoint(folder: Path) -> str:
    """Names of one model against the checkpoint of another."""
    with torch.device("meta"):
        model: nn.Module = hf.GPT2LMHeadModel(hf.GPT2Config(n_layer=1, n_embd=32, n_head=2))
    NameMap.of(model, kept(text_model))
    return ""


def template(text: str) -> Change:
    return written("chat_template.jinja", text)


NO_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% if m.content is string %}{{ m.content }}{% else %}{% for c in m.content %}"
    "{{ c.get('text', '') }}{% endfor %}{% endif %}{% endfor %}"
)
VIDEO: JsonObject = {"kind": "video", "uri": "clip.mp4", "frames": 4}
SOUND: JsonObject = {"kind": "audio", "uri": "sound.wav", "sample_rate": 8000}
BOUNDS = with_media(VIDEO | {"min_pixels": 90_000, "max_pixels": 5_000})
TWO_RATES = with_media(VIDEO, VIDEO | {"frames": 2})
TABLE: tuple[tuple[str, Try, tuple[str, ...]], ...] = (
    ("no_config", loaded(removed("config.json")), ("no config.json", "checkpoint folder")),
    ("config_torn", trained(written("config.json", '{"model_ty')), ("config.json", "model.path")),
    (
        "config_list",
        trained(written("config.json", "[]")),
        ("no model_type", "copy it again"),
    ),
    ("weights_lfs", trained(written(WEIGHTS, LFS)), (WEIGHTS, "Git LFS", "git lfs pull")),
    ("weights_lfs_learner", loaded(written(WEIGHTS, LFS)), (WEIGHTS, "Git LFS", "git lfs pull")),
    (
        "weights_8_bit",
        loaded(eight_bits),
        ("as I8", "quantised", "it was made from"),
    ),
    ("weights_nan", loaded(not_numbers), ("'mistral'", "NaN or infinity", "copy the checkpoint")),
    ("hidden_text", loaded(configured(hidden_size="32")), ("'mistral'", "correct its config.json")),
    ("no_tensors", loaded(without_tensors), ("'mistral'", "copy the folder again")),
    ("no_weights", loaded(removed(WEIGHTS)), ("no *.safetensors", "save_pretrained")),
    ("pickle_only", loaded(pickled), ("no *.safetensors", "convert it with save_pretrained")),
    ("adapter", loaded(written("adapter_config.json", "{}")), ("adapter", "merge it into")),
    ("weights_cut", loaded(cut), (WEIGHTS, "cut short or damaged", "copy it again")),
    ("weights_text", loaded(written(WEIGHTS, "nonsense")), (WEIGHTS, "copy it again")),
    ("tensor_lost", loaded(lacking_a_tensor), ("'lm_head.weight'", "copy the checkpoint again")),
    ("quantised", loaded(configured(quantization_config={"bits": 4})), ("quantised", "made from")),
    ("unknown_type", loaded(configured(model_type="nosuch")), ("'nosuch'", "cannot be loaded")),
    ("index_torn", loaded(written(INDEX, '{"weight')), (INDEX, "copy it again")),
    ("index_empty", loaded(written(INDEX, '{"weight_map": {}}')), (INDEX, "copy it again")),
    ("shard_lost", loaded(sharded(True, second=False)), (SECOND, "copy it from the model's")),
    ("shard_swapped", loaded(sharded(True, swapped=True)), (INDEX, "copy both again")),
    ("shard_lost_no_index", loaded(sharded(False, second=False)), ("lacks the shard", "copy it")),
    ("two_checkpoints", loaded(twice), ("policy.safetensors", "restore the index, or remove")),
    ("no_head", loaded(same, without_head), ("RwkvForCausalLM has no lm_head",)),
    (
        "state",
        loaded(same, with_state),
        ("model type 'lfm2'", "layers of kind conv", "another type"),
    ),
    (
        "heads_of_shared_packs",
        trained(same, "--learner.ranks=3", "--learner.sequence_parallel=3"),
        ("has 4 attention heads", "sequence_parallel 3", "set it to one of 1, 2, 4"),
    ),
    (
        "adapter_on_nothing",
        trained(same, "--learner.lora.targets=[nosuch]"),
        ("learner.lora.targets: 'nosuch' matches no linear layer", "there are the parts llm"),
    ),
    (
        "adapter_of_too_high_a_rank",
        trained(same, "--learner.lora.rank=4096"),
        ("learner.lora.rank 4096 is above the width", "lower the rank to"),
    ),
    (
        "store_of_a_tower_that_trains",
        trained(same, "--learner.embeddings.mode=on", "--learner.optimizer.freeze=[visual]"),
        ("learner.embeddings.mode", "audio_tower", "add audio_tower to learner.optimizer.freeze"),
    ),
    (
        "other_names",
        other_checkpoint,
        ("do not make the model's", "use a checkpoint of a supported"),
    ),
    ("no_tokenizer", encoded(removed("tokenizer.json")), ("no tokenizer.json", "base model")),
    ("tokenizer_torn", encoded(written("tokenizer.json", "{")), ("tokenizer", "cannot be loaded")),
    ("no_template", encoded(removed("chat_template.jinja")), ("no chat template", "base model")),
    ("tokenizer_lfs", encoded(written("tokenizer.json", LFS)), ("tokenizer", "files again")),
    ("processor_list", encoded(written("processor_config.json", "[]")), ("processor", "files aga")),
    ("no_processor", encoded(removed("processor_config.json")), ("no preprocessor", "base mo")),
    ("template_syntax", encoded(template("{% for")), ("chat template", "correct it")),
    ("template_raises", encoded(template("{{ nosuch.x.y }}")), ("chat template", "correct it")),
    (
        "template_by_chance",
        encoded(template("{{ range(99999) | random }}{% for m in messages %}Question{% endfor %}")),
        ("renders one chat in two ways", "take chance and clock out"),
    ),
    (
        "template_parts",
        encoded(template("{{ messages[-1].content }}")),
        ("prints the parts of a turn as a list", "which joins their texts"),
    ),
    ("template_mute", encoded(template("hello")), ("leaves the question out", "correct it")),
    (
        "no_system_turn",
        encoded(template(NO_SYSTEM), system="be brief"),
        ("System role not supported", "data.template.instruction"),
    ),
    (
        "no_system_turn_of_a_row",
        encoded(template(NO_SYSTEM), asked(system="be brief", hint="x"), system=None),
        ("prompt 'p' brings a system turn", "into the question"),
    ),
    ("other_rate", encoded(same, with_media(SOUND)), ("audio at 8000 Hz", "sample_rate")),
    ("bounds", encoded(same, BOUNDS), ("min_pixels 90000", "above max_pixels 5000")),
    ("two_rates", encoded(same, TWO_RATES), ("sampled at different rates", "same fps")),
    (
        "too_long",
        encoded(same, asked(question="a " * 900, hint="x"), max_prompt_tokens=64),
        ("max_prompt_tokens is 64", "raise the limit"),
    ),
    ("no_hint", encoded(same, asked()), ("prompt 'p' was asked with its hint", "generate hints")),
    ("lost", published(lambda t: list(t.items())[1:]), ("first 'lm_head.weight'", "publish every")),
    (
        "extra",
        published(lambda t: [*t.items(), ("x", t["lm_head.weight"])]),
        ("first 'x'", "publish every"),
    ),
    (
        "twice",
        published(lambda t: [*t.items(), ("lm_head.weight", t["lm_head.weight"])]),
        ("'lm_head.weight' comes twice",),
    ),
    (
        "shape",
        published(lambda t: list((t | {"lm_head.weight": t["lm_head.weight"][1:]}).items())),
        ("'lm_head.weight' has shape", "was another model published?"),
    ),
    (
        "not_finite",
        published(lambda t: list((t | {"lm_head.weight": t["lm_head.weight"] / 0}).items())),
        ("'lm_head.weight' holds NaN", "look at the learner's loss"),
    ),
    (
        "evaluate_no_folder",
        command("evaluate", "{}/no", "--recipe", "recipes/local.yaml"),
        ("no is not a checkpoint folder",),
    ),
)
ENTRIES = [BadInput("E", name, act, words) for name, act, words in TABLE]
