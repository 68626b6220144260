"""Words, tensors, positions and refusals of the prompt template."""

from __future__ import annotations

import copy
import json
import shutil
import struct
import zlib
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from avatar_rl.actors.feeder import Feeder
from avatar_rl.actors.shared_state import SharedState
from avatar_rl.buffer_service.records.requests import RequestLease, RolloutRequest
from avatar_rl.common.errors import DataError, ModelError
from avatar_rl.prompts.config import MediaConfig
from avatar_rl.prompts.encoding.budget import FrameGrain, VideoShape, frame_bounds
from avatar_rl.prompts.encoding.digest import prompt_digest
from avatar_rl.prompts.encoding.processor import PixelBounds
from avatar_rl.prompts.encoding.rope import PositionRule
from avatar_rl.prompts.encoding.template import PromptEncoder, TemplateConfig, _seconds_per_grid
from avatar_rl.prompts.media.loader import DecodedAudio, MediaLoader
from avatar_rl.prompts.record import MediaItem, MediaPlan, ProblemType, Prompt
from tests.tiny_models import ArrayLoader, audio, image, make_prompt, video
from tests.unit.media_files import write_video


@pytest.fixture(scope="module")
def folder(tiny_omni: Path) -> Path:
    return tiny_omni


@pytest.fixture(scope="module")
def shared(folder: Path) -> Iterator[tuple[PromptEncoder, ArrayLoader]]:
    loader = ArrayLoader()
    yield encoder(folder, loader), loader


_LOADED: dict[Path, PromptEncoder] = {}


def encoder(folder: Path, loader: MediaLoader, **config: Any) -> PromptEncoder:
    """A fresh encoder; the processor, slow to load and never changed, is read once per folder."""
    if folder not in _LOADED:
        _LOADED[folder] = PromptEncoder(folder, loader, TemplateConfig())
    fresh = copy.copy(_LOADED[folder])
    fresh.loader, fresh.config, fresh._cache, fresh._cached_bytes = (
        loader,
        TemplateConfig(**config),
        OrderedDict(),
        0,
    )
    return fresh


def test_text_holds_every_part_in_order(folder: Path) -> None:
    loader = ArrayLoader()
    fields = {
        "question": "What is it?",
        "options": ("A. cat", "B. dog"),
        "hint": "listen first",
        "audio_caption": "a bark",
        "system": "be brief",
    }
    prompt = make_prompt(loader, "p", [image(1), video(2, 4, 2.0), audio(3, 1.0)], **fields)
    parts = encoder(folder, loader, instruction="Think.", audio_caption_prefix="Sound: ")
    assert parts.text(prompt, True) == (
        "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\n"
        "<|vision_bos|><|IMAGE|><|vision_eos|><|vision_bos|><|VIDEO|><|vision_eos|><|audio_bos|><|AUDIO|><|audio_eos|>"
        "What is it?\nA. cat\nB. dog\nSound: a bark\nThink.\nHint: listen "
        "first<|im_end|>\n<|im_start|>assistant\n"
    )
    assert "listen" not in parts.text(prompt, False)
    plain = encoder(folder, loader, system="default").text(
        prompt.model_copy(update={"system": None}), False
    )
    assert (
        plain.startswith("<|im_start|>system\ndefault<|im_end|>")
        and "bark" not in plain
        and "Think" not in plain
    )


def test_interleaved_sound_has_no_placeholder_of_its_own(
    shared: tuple[PromptEncoder, ArrayLoader],
) -> None:
    parts, loader = shared
    prompt = make_prompt(loader, "av", [video(1, 8, 2.0), audio(2, 3.0)], audio_in_video=True)
    text = parts.text(prompt, False)
    assert text.count("<|VIDEO|>") == 1 and "<|AUDIO|>" not in text
    encoded = parts.encode(prompt, False)
    sound = parts.tokenizer.convert_tokens_to_ids("<|AUDIO|>")
    # 3 s = 300 mel frames -> 150 after the strided convolution -> 75 after pooling.
    assert int((encoded.input_ids == sound).sum()) == 75
    engine = parts.engine_input(prompt, False)
    assert engine["mm_processor_kwargs"]["use_audio_in_video"] is True


def test_a_hint_that_is_not_there_is_refused(shared: tuple[PromptEncoder, ArrayLoader]) -> None:
    parts, loader = shared
    with pytest.raises(DataError, match="has none"):
        parts.encode(make_prompt(loader, "p", []), True)


def test_encoded_video_has_the_size_its_bounds_ask_for(folder: Path) -> None:
    loader = ArrayLoader()
    prompt = make_prompt(loader, "p", [video(1, 4, 2.0, height=56, width=84)])
    encoded = encoder(folder, loader).encode(prompt, False)
    assert encoded.features["video_grid_thw"].tolist() == [
        [2, 4, 6]
    ]  # 4 frames / 2, 56 / 14, 84 / 14
    assert encoded.features["pixel_values_videos"].shape == (2 * 4 * 6, 3 * 2 * 14 * 14)
    assert encoded.position_ids.shape == (3, len(encoded.input_ids))
    assert encoded.next_position == int(encoded.position_ids.max()) + 1
    item = prompt.media.items[0].model_copy(update={"min_pixels": None, "max_pixels": None})
    free = prompt.model_copy(update={"media": MediaPlan(items=(item,))})
    grid = (
        encoder(folder, loader, min_pixels=100_000, max_pixels=200_000)
        .encode(free, False)
        .features["video_grid_thw"]
    )
    assert 100_000 <= int(grid[0, 1] * grid[0, 2]) * 14 * 14 <= 200_000


CLIP = (60, 720, 1280)  # frames, height, width of 30 s of 720p at 2 frames a second


def test_thirty_seconds_of_720p_fit_the_total_and_were_too_long_without_it() -> None:
    # Not for whoever collects this file: it brings half of torch.
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import smart_resize

    config, grain = TemplateConfig(), FrameGrain(2, 28)
    bounds: PixelBounds = {"shortest_edge": config.min_pixels, "longest_edge": config.max_pixels}

    def tokens(size: PixelBounds, clip: tuple[int, int, int]) -> int:
        low, high = size["shortest_edge"], size["longest_edge"]
        height, width = smart_resize(*clip[1:], factor=28, min_pixels=low, max_pixels=high)
        return clip[0] // 2 * height * width // 28**2

    assert tokens(bounds, CLIP) > config.max_prompt_tokens
    for total in (12_288, 4_096, 500, 30):
        for clips in ([CLIP], [CLIP, (20, 1280, 720)], [CLIP, CLIP, (8, 240, 320)]):
            steps = sum(clip[0] // 2 for clip in clips)
            shapes = [VideoShape(*clip) for clip in clips]
            if steps > total:
                with pytest.raises(DataError, match=f"{steps} temporal steps.*{total} tokens"):
                    frame_bounds(bounds, shapes, grain, total)
                continue
            size = frame_bounds(bounds, shapes, grain, total)
            used = sum(tokens(size, clip) for clip in clips)
            assert used <= total
            # Rounding to whole tokens wastes some; several videos share what there is.
            assert used >= 0.75 * min(total, sum(tokens(bounds, clip) for clip in clips)) or (
                total // steps < 16
            )
    # What fits is left alone.
    assert frame_bounds(bounds, [VideoShape(8, 240, 320)], grain, 12_288) == bounds


def test_videos_of_a_prompt_share_the_total_and_keep_their_place_in_time(folder: Path) -> None:
    loader = ArrayLoader()
    clips = [video(1, 16, 2.0, 112, 168), video(2, 8, 2.0, 112, 168)]
    prompt = make_prompt(loader, "p", clips)
    free = encoder(folder, loader).encode(prompt, False)
    parts = encoder(folder, loader, total_video_tokens=96)
    bound, settings = parts.process(prompt, False)
    grids = bound.features["video_grid_thw"]
    assert int(free.features["video_grid_thw"].prod(-1).sum()) // 4 == 12 * 24
    assert grids[:, 0].tolist() == [8, 4] and int(grids.prod(-1).sum()) // 4 <= 96
    given = parts.engine_input(prompt, False)
    assert given["mm_processor_kwargs"]["videos_kwargs"] == settings["videos_kwargs"]
    # The same seconds a step: the first token of each is as late as without the bound.
    token = parts.positions.config.video_token_id
    times = [p.position_ids[0, p.input_ids == token].unique() for p in (free, bound)]
    assert len(times[0]) == len(times[1]) == 12
    assert torch.equal(times[0][:8].diff(), times[1][:8].diff())
    with pytest.raises(DataError, match=r"'p': its videos have 12 .* leaves 8 tokens"):
        encoder(folder, loader, total_video_tokens=8).encode(prompt, False)


def test_a_total_that_leaves_no_room_for_the_rest_is_refused() -> None:
    with pytest.raises(ValueError, match=r"total_video_tokens 900 leaves no room .* 900: lower it"):
        TemplateConfig(total_video_tokens=900, max_prompt_tokens=900)


def test_encodes_are_cached_within_bounds(folder: Path) -> None:
    loader = ArrayLoader()
    prompts = [make_prompt(loader, f"p{i}", [video(i, 4, 2.0)]) for i in range(3)]
    size = encoder(folder, loader).encode(prompts[0], False).nbytes
    parts = encoder(folder, loader, cache_bytes=2 * size)
    loader.loads = 0
    first = parts.encode(prompts[0], False)
    assert parts.encode(prompts[0], False) is first and loader.loads == 1
    parts.encode(prompts[1], False)
    parts.encode(prompts[0], False)  # makes prompt 1 the oldest
    parts.encode(prompts[2], False)
    assert loader.loads == 3 and parts._cached_bytes == 2 * size
    assert parts.encode(prompts[0], False) is first
    parts.encode(prompts[1], False)
    assert loader.loads == 4
    nothing = encoder(folder, loader, cache_bytes=0)
    assert nothing.encode(prompts[0], False) is not nothing.encode(prompts[0], False)


def test_a_prompt_and_the_same_with_its_hint_keep_their_media_once(folder: Path) -> None:
    loader = ArrayLoader()
    prompt = make_prompt(loader, "p", [video(1, 4, 2.0), audio(2, 1.0)], hint="count the beeps")
    parts = encoder(folder, loader)
    plain, hinted = parts.encode(prompt, False), parts.encode(prompt, True)
    alone = encoder(folder, loader).encode(prompt, True)
    assert len(hinted.input_ids) > len(plain.input_ids) and torch.equal(
        hinted.input_ids, alone.input_ids
    )
    for name, tensor in hinted.features.items():
        assert tensor is plain.features[name] and torch.equal(tensor, alone.features[name])
    loader.media[prompt.media.items[0].uri] = video(3, 4, 2.0)  # the file was replaced under way
    parts._cache.popitem()
    assert not torch.equal(
        parts.encode(prompt, True).features["pixel_values_videos"],
        plain.features["pixel_values_videos"],
    )


def test_engine_ids_follow_content_and_settings(shared: tuple[PromptEncoder, ArrayLoader]) -> None:
    parts, loader = shared

    def ids(seed: int, fps: float = 2.0, **fields: Any) -> Any:
        prompt = make_prompt(loader, "same uri", [video(seed, 4, fps)], **fields)
        return parts.engine_input(prompt, False)["multi_modal_uuids"]

    assert ids(1) == ids(1, question="another question")
    assert len({str(ids(1)), str(ids(2)), str(ids(1, 4.0))}) == 3


def test_digest_is_crc32_of_little_endian_int32() -> None:
    expected = zlib.crc32(struct.pack("<3i", 5, 70_000, 1))
    assert prompt_digest([5, 70_000, 1]) == prompt_digest(torch.tensor([5, 70_000, 1])) == expected
    assert prompt_digest(np.array([5, 70_000, 1], dtype=np.int32)) == expected


def test_what_the_model_cannot_take_is_refused(folder: Path) -> None:
    loader = ArrayLoader()
    long = make_prompt(loader, "long", [], question="red " * 300)
    with pytest.raises(DataError, match=r"tokens, max_prompt_tokens is 100"):
        encoder(folder, loader, max_prompt_tokens=100).encode(long, False)
    with pytest.raises(DataError, match=r"tokens, max_prompt_tokens is 100"):
        encoder(folder, loader, max_prompt_tokens=100).engine_input(long, False)
    parts = encoder(folder, loader)
    slow = DecodedAudio(audio(1, 1.0).samples, 8_000)
    with pytest.raises(DataError, match="8000 Hz, the model hears 16000 Hz"):
        parts.encode(make_prompt(loader, "rate", [slow]), False)
    with pytest.raises(DataError, match=r"9\.0 s of audio, the model hears at most"):
        parts.encode(make_prompt(loader, "loud", [audio(1, 9.0)]), False)
    with pytest.raises(DataError, match="different rates"):
        parts.encode(make_prompt(loader, "rates", [video(1, 4, 2.0), video(2, 4, 4.0)]), False)
    mixed = make_prompt(loader, "bounds", [image(1), image(2)])
    items = (mixed.media.items[0], mixed.media.items[1].model_copy(update={"max_pixels": 9_999}))
    with pytest.raises(DataError, match="different pixel bounds"):
        parts.encode(mixed.model_copy(update={"media": MediaPlan(items=items)}), False)
    inverted = mixed.media.items[0].model_copy(update={"max_pixels": 100})
    with pytest.raises(DataError, match="above max_pixels"):
        parts.encode(mixed.model_copy(update={"media": MediaPlan(items=(inverted,))}), False)


def test_an_actor_sets_a_prompt_aside_that_its_media_make_too_long(folder: Path) -> None:
    loader = ArrayLoader()
    prompts: Any = {
        name: make_prompt(loader, name, [video(1, n, 2.0)])
        for name, n in (("short", 4), ("long", 16))
    }
    whole = encoder(folder, loader)
    limit = len(whole.encode(prompts["short"], False).input_ids)
    strict = encoder(folder, loader, max_prompt_tokens=limit)
    assert (
        len(strict.engine_input(prompts["long"], False)["prompt_token_ids"]) < limit
    )  # one placeholder per video
    kept: dict[Any, Any] = {}

    def prepare(
        engine_input: Any, name: str, key: tuple[str, bool, str]
    ) -> Any:  # expands as the processor does
        return kept.setdefault(
            key, {"prompt_token_ids": whole.encode(prompts[name], False).input_ids.tolist()}
        )

    refused: list[tuple[RequestLease, str]] = []
    state, engine = SharedState(), SimpleNamespace(prepared=kept.get, prepare=prepare, stored=None)
    feeder = Feeder(
        "a",
        SimpleNamespace(unimodal=False, confidence=False),  # type: ignore[arg-type]
        None,  # type: ignore[arg-type]
        prompts,
        strict,
        engine,  # type: ignore[arg-type]
        state,
        lambda lease, error: refused.append((lease, str(error))),
    )
    requests = [
        RolloutRequest(seq=i, prompt_id=name, step=0, n=1)
        for i, name in enumerate(("short", "long", "long"))
    ]
    leases = [
        RequestLease(request=request, attempt=1, consumer="a", hinted=False) for request in requests
    ]
    feeder.prepare(leases)  # the last finds its prompt in the engine's cache
    assert [group.lease for group in state.ready] == leases[:1]
    assert [lease for lease, _ in refused] == leases[1:]
    assert all(f"tokens, max_prompt_tokens is {limit}" in why for _, why in refused)
    held_out = RolloutRequest(
        seq=3, prompt_id="long", step=0, n=1, kind="eval"
    )  # the learner never sees it
    feeder.prepare([RequestLease(request=held_out, attempt=1, consumer="a", hinted=False)])
    assert len(refused) == 2 and state.ready[-1].lease.request is held_out


def test_videos_of_one_rate_are_found_as_the_refusal_says(folder: Path, tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", [(200, 30, 10)] * 24)  # 3 s
    parts = encoder(folder, MediaLoader(MediaConfig(), tmp_path))

    def steps(*items: dict[str, Any]) -> list[int]:
        media = MediaPlan(
            items=tuple(MediaItem(kind="video", uri="a.mp4", **item) for item in items)
        )
        prompt = make_prompt(ArrayLoader(), "p", []).model_copy(update={"media": media})
        return [int(grid[0]) for grid in parts.encode(prompt, False).features["video_grid_thw"]]

    # at 2 per second 1.5 s have three frames, made four
    with pytest.raises(
        DataError, match=r"same fps and clips for which length x fps is an even .* or even `frames`"
    ):
        steps({"fps": 2.0, "clip": (0.0, 1.5)}, {"fps": 2.0, "clip": (0.0, 2.0)})
    assert steps({"fps": 2.0, "clip": (0.0, 1.0)}, {"fps": 2.0, "clip": (0.0, 3.0)}) == [1, 3]
    assert steps({"frames": 4, "clip": (0.5, 1.5)}, {"frames": 8, "clip": (1.0, 3.0)}) == [2, 4]


@pytest.mark.parametrize(
    ("gone", "message"),
    [
        ("config.json", r"no config\.json"),
        ("tokenizer.json", r"no tokenizer\.json or vocab\.json"),
        ("processor_config.json", r"no preprocessor_config\.json or processor_config\.json"),
        ("chat_template.jinja", "no chat template"),
    ],
)
def test_an_incomplete_model_folder_names_what_is_missing(
    folder: Path, tmp_path: Path, gone: str, message: str
) -> None:
    shutil.copytree(
        folder, tmp_path / "model", ignore=shutil.ignore_patterns(gone, "*.safetensors")
    )
    with pytest.raises(ModelError, match=message):
        encoder(tmp_path / "model", ArrayLoader())


def test_a_text_model_takes_text_only(folder: Path, tmp_path: Path) -> None:
    names = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
    for name in names:
        shutil.copy(folder / name, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3", "vocab_size": 512}))
    loader = ArrayLoader()
    parts = encoder(tmp_path, loader)
    encoded = parts.encode(make_prompt(loader, "p", []), False)
    assert encoded.position_ids.tolist() == [list(range(len(encoded.input_ids)))]
    assert encoded.next_position == len(encoded.input_ids) and encoded.features == {}
    with pytest.raises(DataError, match="reads text only"):
        parts.encode(make_prompt(loader, "q", [image(1)]), False)


def vision_config(kind: str) -> SimpleNamespace:
    vision = SimpleNamespace(spatial_merge_size=2, tokens_per_second=2)
    return SimpleNamespace(
        model_type=kind, image_token_id=1, video_token_id=2, vision_config=vision
    )


def test_qwen25_vl_positions_by_hand() -> None:
    # text, a video of 3 steps of 1 x 2 merged patches at 2 s per step (4 positions), text
    ids = torch.tensor([9, 2, 2, 2, 2, 2, 2, 9, 9])
    features = {"video_grid_thw": torch.tensor([[3, 2, 4]])}
    found = PositionRule(vision_config("qwen2_5_vl"))(
        ids, features, seconds_per_grid=torch.tensor([2.0])
    )
    assert found.ids.tolist() == [
        [0, 1, 1, 5, 5, 9, 9, 10, 11],
        [0, 1, 1, 1, 1, 1, 1, 10, 11],
        [0, 1, 2, 1, 2, 1, 2, 10, 11],
    ]
    assert found.next == 12


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3_vl"])
def test_vision_positions_equal_transformers_where_a_video_is_wider_than_long(kind: str) -> None:
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLModel

    model: Any = {"qwen2_5_vl": Qwen2_5_VLModel, "qwen3_vl": Qwen3VLModel}[kind]
    config = vision_config(kind)
    image_grid, video_grid = torch.tensor([[1, 4, 6]]), torch.tensor([[2, 8, 8]])
    runs = [[2] * 32] if kind == "qwen2_5_vl" else [[2] * 16, [8, 7] + [2] * 16]
    ids = torch.tensor(
        [9, 9] + [1] * 6 + [9] + [token for run in runs for token in run] + [9, 9, 9]
    )
    stand_in = SimpleNamespace(config=config)
    stand_in.get_vision_position_ids = model.get_vision_position_ids.__get__(stand_in)
    kinds = torch.where(ids <= 2, ids, 0)[None]
    extra = {"second_per_grid_ts": torch.tensor([1.0])} if kind == "qwen2_5_vl" else {}
    expected, delta = model.get_rope_index(
        stand_in,
        ids[None],
        kinds,
        image_grid_thw=image_grid,
        video_grid_thw=video_grid.clone(),
        **extra,
    )
    features = {"image_grid_thw": image_grid, "video_grid_thw": video_grid}
    found = PositionRule(config)(ids, features, seconds_per_grid=torch.tensor([1.0]))
    torch.testing.assert_close(found.ids, expected[:, 0])
    assert found.next == len(ids) + int(delta)


@pytest.mark.parametrize(
    "fps", [0.5, 1.0, 1.7, 2.0, 3.0, 10 / 3, 4.0, 50 / 11, 5.0, 6.25, 12.5, 25.0, 30.0]
)
def test_time_positions_do_not_depend_on_float_width(fps: float) -> None:
    step = _seconds_per_grid(fps)
    assert 2 / fps <= step <= 2 / fps + 2 / 4096
    k = np.arange(64)
    wide = np.floor(k * step * 25)
    narrow = np.floor(k.astype(np.float32) * np.float32(step) * np.float32(25))
    numpy_order = np.floor(k * float(np.float32(2 / (2 / step)) * np.float32(25)))
    np.testing.assert_array_equal(wide, narrow)
    np.testing.assert_array_equal(wide, numpy_order)
    exact = (
        np.array([int(i * 50 * 1000 / round(fps * 1000)) for i in range(16)])
        if fps * 1000 % 1 == 0
        else None
    )
    if exact is not None:
        np.testing.assert_array_equal(wide[:16], exact)


def test_interleaving_needs_a_sound_for_every_video() -> None:
    with pytest.raises(ValueError, match="one audio item per video"):
        Prompt(
            id="p",
            question="q",
            answer="a",
            problem_type="free_form",
            media=MediaPlan(items=(MediaItem(kind="video", uri="v"),), audio_in_video=True),
        )


# -- what a template, a tokenizer or a processor refuses -------------------------------------------

NO_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "<|im_start|>{{ m.content if m.content is string else m.content[-1].text }}<|im_end|>"
    "{% endfor %}"
)
DROPS_SYSTEM = NO_SYSTEM.replace("{{ raise_exception('System role not supported') }}", "").replace(
    "{{ m.content if", "{{ '' if m.role == 'system' else m.content if"
)
PICKY = NO_SYSTEM + (
    "{% for m in messages %}{% if 'odd' in (m.content if m.content is string else "
    "m.content[-1].text) %}{{ raise_exception('odd words') }}{% endif %}{% endfor %}"
)
BROKEN = "{{ messages[7].content.nothing }}"
DEAF = "<|im_start|>hello<|im_end|>"


def with_template(folder: Path, out: Path, template: str, text_only: bool = False) -> Path:
    shutil.copytree(folder, out, ignore=shutil.ignore_patterns("*.safetensors"))
    (out / "chat_template.jinja").write_text(template)
    if text_only:
        (out / "config.json").write_text(json.dumps({"model_type": "qwen3", "vocab_size": 512}))
    return out


@pytest.mark.parametrize("text_only", [False, True])
@pytest.mark.parametrize(
    ("template", "system", "words"),
    [
        (NO_SYSTEM, "be brief", r"System role not supported.*data\.template\.system to null"),
        (DROPS_SYSTEM, "be brief", r"leaves the system turn out.*data\.template\.system to null"),
        (BROKEN, None, "cannot format a question.*take the template of the model's source"),
        (DEAF, None, "leaves the question out.*take the template"),
        ("{% if", None, "cannot format a question.*take the template"),
    ],
)
def test_a_template_that_can_format_no_prompt_is_said_at_once(
    folder: Path, tmp_path: Path, template: str, system: str | None, words: str, text_only: bool
) -> None:
    model = with_template(folder, tmp_path / "model", template, text_only)
    with pytest.raises(ModelError, match=words) as caught:
        PromptEncoder(model, ArrayLoader(), TemplateConfig(system=system))
    assert str(model) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("text_only", [False, True])
@pytest.mark.parametrize(
    ("template", "fields", "words"),
    [
        (NO_SYSTEM, {"system": "be brief"}, r"'p'.*System role not supported.*move its words"),
        (DROPS_SYSTEM, {"system": "be brief"}, r"'p'.*leaves the system turn out.*move its words"),
        (PICKY, {"question": "an odd one"}, r"prompt 'p'.*odd words.*correct its text"),
    ],
)
def test_a_prompt_that_the_template_refuses_is_named_on_every_path(
    folder: Path,
    tmp_path: Path,
    template: str,
    fields: dict[str, str],
    words: str,
    text_only: bool,
) -> None:
    model = with_template(folder, tmp_path / "model", template, text_only)
    loader = ArrayLoader()
    parts = PromptEncoder(model, loader, TemplateConfig())
    prompt = make_prompt(loader, "p", [], **fields)
    for path in (parts.text, parts.engine_input, parts.encode):
        with pytest.raises(DataError, match=words) as caught:
            path(prompt, False)
        assert "\n" not in str(caught.value)
    # The others of the dataset are asked.
    fine = make_prompt(loader, "q", [])
    assert (
        parts.encode(fine, False).input_ids.tolist()
        == (parts.engine_input(fine, False)["prompt_token_ids"])
    )
    # A rollout actor sets the prompt aside and prepares the next.
    refused: list[str] = []
    state = SharedState()
    engine = SimpleNamespace(
        prepared=lambda key: None, prepare=lambda given, name, key: given, stored=None
    )
    feeder = Feeder(
        "a",
        SimpleNamespace(unimodal=False, confidence=False),  # type: ignore[arg-type]
        None,  # type: ignore[arg-type]
        {"p": prompt, "q": fine},  # type: ignore[arg-type]
        parts,
        engine,  # type: ignore[arg-type]
        state,
        lambda lease, error: refused.append(lease.request.prompt_id),
    )
    requests = [RolloutRequest(seq=i, prompt_id=name, step=0, n=1) for i, name in enumerate("pq")]
    feeder.prepare(
        [RequestLease(request=r, attempt=1, consumer="a", hinted=False) for r in requests]
    )
    assert refused == ["p"] and [group.prompt.id for group in state.ready] == ["q"]


@pytest.mark.parametrize(
    "error", [ZeroDivisionError("by zero"), KeyError("pixels"), AssertionError(), OSError("a\nb")]
)
def test_whatever_a_processor_raises_is_the_prompts_fault(folder: Path, error: Exception) -> None:
    loader = ArrayLoader()
    parts = encoder(folder, loader)
    prompt = make_prompt(loader, "p", [image(1)])

    def fails(**inputs: Any) -> None:
        raise error

    parts.processor = fails
    with pytest.raises(
        DataError, match=rf"prompt 'p': .*processor refuses it \({type(error).__name__}"
    ):
        parts.encode(prompt, False)
    parts.processor = lambda **inputs: (_ for _ in ()).throw(MemoryError())
    with pytest.raises(MemoryError):  # no fault of the prompt
        parts.encode(prompt, False)
    parts = encoder(folder, loader)
    parts.tokenizer = lambda text, **settings: {}["input_ids"]
    with pytest.raises(DataError, match="prompt 'q': the model's tokenizer refuses it"):
        parts.engine_input(make_prompt(loader, "q", []), False)


@pytest.mark.parametrize(
    ("ending", "tag"),
    [
        ("", ""),
        ("<think>", "<think>"),
        ("<think>\\n", "<think>"),
        ("<thinking>\\n\\n", "<thinking>"),
        ("<think>\\nOkay, ", "<think>"),
        ("<think>\\n\\n</think>\\n\\n", ""),
    ],
)
def test_what_the_prompt_ends_with_is_known(
    folder: Path, tmp_path: Path, ending: str, tag: str
) -> None:
    plain = (folder / "chat_template.jinja").read_text()
    ending = "{% if add_generation_prompt %}{{ '" + ending + "' }}{% endif %}"
    model = with_template(folder, tmp_path / "model", plain + ending)
    found = PromptEncoder(model, ArrayLoader(), TemplateConfig())
    assert found.chat.opened_tag == tag
    skipped = "</think>" in ending  # templates of models whose thinking is switched off
    assert any("empty think block" in warning for warning in found.warnings) == skipped


@pytest.mark.parametrize(
    ("bos", "known", "template", "warned"),
    [
        ("<bos>", "<bos>", NO_SYSTEM, True),
        ("<bos>", "<bos>", "{{ bos_token }}" + NO_SYSTEM, False),
        ("<bos>", None, NO_SYSTEM, False),  # nothing says that the model knows it
        (None, "<bos>", NO_SYSTEM, False),
        ("<|im_end|>", "<|im_end|>", NO_SYSTEM, False),  # ends turns, begins nothing
    ],
)
def test_a_template_without_the_models_bos_is_warned_of(
    folder: Path, tmp_path: Path, bos: str | None, known: str | None, template: str, warned: bool
) -> None:
    from transformers import AutoTokenizer  # here: the other worker needs none of it

    model = with_template(folder, tmp_path / "model", template, text_only=True)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<bos>"]})
    tokenizer.bos_token = bos
    tokenizer.eos_token = "<|im_end|>"
    tokenizer.save_pretrained(model)
    (model / "chat_template.jinja").write_text(template)
    config = {
        "model_type": "qwen3",
        "bos_token_id": known and tokenizer.convert_tokens_to_ids(known),
    }
    (model / "config.json").write_text(json.dumps(config))
    warnings = PromptEncoder(model, ArrayLoader(), TemplateConfig()).warnings
    assert len(warnings) == warned
    if warned:
        assert "<bos>" in warnings[0] and "{{ bos_token }}" in warnings[0]
        assert "'qwen3'" in warnings[0]


DATED = "{{ strftime_now('%d %b %Y') }}{% for m in messages %}{{ m.content }}{% endfor %}"
BY_CHANCE = "{{ range(99999) | random }}{% for m in messages %}{{ m.content }}{% endfor %}"


def test_a_template_that_writes_the_date_writes_the_same_day_for_ever(
    folder: Path, tmp_path: Path
) -> None:
    model = with_template(folder, tmp_path / "model", DATED, text_only=True)
    encoder = PromptEncoder(model, ArrayLoader(), TemplateConfig())
    prompt = Prompt(id="p", question="Which?", answer="a", problem_type=ProblemType.FREE_FORM)
    assert encoder.text(prompt, False).startswith("26 Jul 2024")
    assert any("today's date" in warning for warning in encoder.warnings)
    model = with_template(folder, tmp_path / "other", BY_CHANCE, text_only=True)
    with pytest.raises(ModelError, match="renders one chat in two ways: take chance and clock"):
        PromptEncoder(model, ArrayLoader(), TemplateConfig())


def test_a_template_that_prints_parts_as_they_are_is_refused(folder: Path, tmp_path: Path) -> None:
    model = with_template(folder, tmp_path / "model", "{{ messages[-1].content }}")
    with pytest.raises(ModelError, match="prints the parts of a turn as a list: take the template"):
        PromptEncoder(model, ArrayLoader(), TemplateConfig())
