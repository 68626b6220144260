"""Stored embeddings against pixels: same log-probabilities, losses and gradients; and the workers
that make them."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from avatar_rl.common.errors import DataError
from avatar_rl.learner.batch.microbatch import Row, collate
from avatar_rl.learner.config import EmbeddingsConfig
from avatar_rl.learner.media.ahead import AheadEncoder
from avatar_rl.learner.media.encoder import StoredEncoder
from avatar_rl.learner.media.opening import MediaSetting, open_encoder
from avatar_rl.learner.media.towers import Towers
from avatar_rl.learner.model.load import load_model
from avatar_rl.learner.model.policy import Policy, freeze
from avatar_rl.prompts.config import MediaConfig, TemplateConfig
from avatar_rl.prompts.embeddings.names import TOWERS, tower_revision
from avatar_rl.prompts.embeddings.store import EmbeddingStore
from avatar_rl.prompts.encoding.template import EncodedPrompt, PromptEncoder
from avatar_rl.prompts.media.loader import MediaLoader
from avatar_rl.prompts.record import MediaItem, MediaPlan, ProblemType, Prompt
from avatar_rl.prompts.synthetic.tiny_model import build_tiny_omni
from tests.tiny_models import (
    ArrayLoader,
    audio,
    build_vision_language,
    image,
    load_reference,
    logprobs_of,
    make_prompt,
    video,
)

pytestmark = pytest.mark.timeout(600)
KINDS = ("qwen2_5_omni", "qwen2_5_vl", "qwen3_vl")
ROOM = 1 << 28


@pytest.fixture(scope="module", params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("embeddings") / "model"
    if request.param == "qwen2_5_omni":
        return build_tiny_omni(out)
    return build_vision_language(out, request.param)


def prompts_for(folder: Path, loader: ArrayLoader) -> list[Prompt]:
    """Every kind of media that the model knows, alone and together, and a prompt without any."""
    seen = [
        make_prompt(loader, "image and video", [image(1), video(2, 4, 2.0), image(3)]),
        make_prompt(loader, "text", []),
        make_prompt(loader, "video", [video(4, 6, 2.0, 84, 56)]),
    ]
    if "omni" not in (folder / "config.json").read_text():
        return seen
    return [
        *seen,
        make_prompt(loader, "audio", [audio(5, 1.3)]),
        make_prompt(loader, "separate", [video(6, 4, 2.0), audio(7, 2.0), image(8)]),
        make_prompt(loader, "interleaved", [video(9, 8, 2.0), audio(10, 3.9)], audio_in_video=True),
    ]


def stored(
    folder: Path, loader: MediaLoader, store: Path, dtype: str, revision: str = "r"
) -> StoredEncoder:
    return StoredEncoder(
        PromptEncoder(folder, loader, TemplateConfig(cache_bytes=0)),
        EmbeddingStore(store, ROOM),
        f"{revision} {dtype}",
        lambda: Towers(folder, dtype=dtype, device=torch.device("cpu")),
    )


def rows_of(encoded: dict[str, EncodedPrompt]) -> list[Row]:
    rng = np.random.default_rng(0)
    return [
        Row(
            (name, False), prompt, rng.integers(30, 200, length).astype(np.int32), 0.9, prompt.media
        )
        for length in (3, 7)
        for name, prompt in encoded.items()
    ]


def frozen_policy(folder: Path, dtype: str) -> Policy:
    policy = Policy(load_model(folder, dtype=dtype)).eval()
    freeze(policy, TOWERS)
    return policy


def trained(policy: Policy, rows: list[Row]) -> tuple[Tensor, dict[str, Tensor]]:
    """Log-probabilities, and the gradients of a weighted sum of them."""
    policy.zero_grad()
    output = policy(collate(rows))
    weights = torch.randn(output.logprobs.shape, generator=torch.Generator().manual_seed(1))
    (output.logprobs * weights).sum().backward()
    gradients = {n: p.grad.clone() for n, p in policy.named_parameters() if p.grad is not None}
    return output.logprobs.detach(), gradients


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_stored_embeddings_train_like_pixels(folder: Path, dtype: str, tmp_path: Path) -> None:
    loader = ArrayLoader()
    prompts = prompts_for(folder, loader)
    plain = PromptEncoder(folder, loader, TemplateConfig())
    writer = stored(folder, loader, tmp_path, dtype)
    pixels, computed = {}, {}
    for prompt in prompts:
        pixels[prompt.id] = plain.encode(prompt, hinted=False)
        computed[prompt.id] = writer.compute(writer.key(prompt, False), prompt, False)
    reader = stored(folder, loader, tmp_path, dtype)
    loads, read = loader.loads, {}
    for prompt in prompts:
        found = reader.read(reader.key(prompt, False), prompt)
        assert found is not None and found.features == {}
        read[prompt.id] = found
    assert loader.loads == loads  # nothing was decoded
    for name, one in read.items():
        assert one.digest == pixels[name].digest and one.next_position == pixels[name].next_position
        assert torch.equal(one.position_ids, pixels[name].position_ids)
    policy = frozen_policy(folder, dtype)
    from_pixels, right = trained(policy, rows_of(pixels))
    for encoded in (computed, read):
        logprobs, left = trained(policy, rows_of(encoded))
        assert left.keys() == right.keys() and not any("visual" in name for name in left)
        if dtype == "bfloat16":  # one medium at a time here: the towers add up in another order
            assert (logprobs - from_pixels).abs().max() <= 0.1
            continue
        gaps = (logprobs - from_pixels).abs() / from_pixels.abs().clamp(min=1)
        assert gaps.max() <= 1e-6
        scale = max(float(g.abs().max()) for g in right.values())
        worst = max(float((left[name] - right[name]).abs().max()) for name in right)
        assert worst <= 1e-6 * max(1.0, scale)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_single_medium_is_bit_equal(folder: Path, dtype: str, tmp_path: Path) -> None:
    """One medium a prompt and a pack: both sides then run the same operations in the same order."""
    loader = ArrayLoader()
    prompt = prompts_for(folder, loader)[2]
    plain = PromptEncoder(folder, loader, TemplateConfig()).encode(prompt, hinted=False)
    encoder = stored(folder, loader, tmp_path, dtype)
    embedded = encoder.compute(encoder.key(prompt, False), prompt, False)
    policy = frozen_policy(folder, dtype)
    left, right = (trained(policy, rows_of({"video": one})) for one in (embedded, plain))
    assert torch.equal(left[0], right[0])
    assert all(torch.equal(left[1][name], gradient) for name, gradient in right[1].items())


def test_stored_embeddings_score_like_transformers_on_pixels(folder: Path, tmp_path: Path) -> None:
    loader = ArrayLoader()
    prompts = prompts_for(folder, loader)
    plain = PromptEncoder(folder, loader, TemplateConfig())
    encoder = stored(folder, loader, tmp_path, "float32")
    encoded = {p.id: encoder.compute(encoder.key(p, False), p, False) for p in prompts}
    rows = rows_of(encoded)
    with torch.no_grad():
        found = frozen_policy(folder, "float32")(collate(rows)).logprobs
    model = load_reference(folder)
    by_name = {prompt.id: prompt for prompt in prompts}
    for row, scores in zip(rows, found, strict=True):
        pixels = plain.encode(by_name[row.key[0]], hinted=False)
        expected = logprobs_of(model, pixels, row.token_ids, row.temperature)
        assert np.abs(scores[: len(expected)].numpy() - expected).max() <= 1e-5


def test_a_tower_of_another_revision_is_run_again(folder: Path, tmp_path: Path) -> None:
    """Weights that changed under stored embeddings: none of them is found."""
    loader = ArrayLoader()
    prompt = prompts_for(folder, loader)[2]
    before = stored(folder, loader, tmp_path / "s", "float32", tower_revision(folder))
    old = before.compute(before.key(prompt, False), prompt, False)
    changed = tmp_path / "changed"
    changed.mkdir()
    for file in folder.iterdir():
        if file.suffix != ".safetensors":
            (changed / file.name).write_bytes(file.read_bytes())
    weights = load_file(folder / "model.safetensors")
    name = next(n for n in sorted(weights) if "visual" in n and weights[n].dim() > 1)
    weights[name] = weights[name] * 1.5
    save_file(weights, changed / "model.safetensors", metadata={"format": "pt"})
    revision = tower_revision(changed)
    assert revision != tower_revision(folder)
    after = stored(changed, loader, tmp_path / "s", "float32", revision)
    assert after.read(after.key(prompt, False), prompt) is None
    new = after.compute(after.key(prompt, False), prompt, False)
    assert old.media is not None and new.media is not None
    assert not torch.equal(old.media.values, new.media.values)
    assert before.read(before.key(prompt, False), prompt) is not None


def test_one_medium_of_two_prompts_runs_its_tower_once(folder: Path, tmp_path: Path) -> None:
    loader = ArrayLoader()
    first, second = (make_prompt(loader, name, [image(1)]) for name in ("a", "b"))
    second = second.model_copy(update={"question": "how many blue"})
    encoder = stored(folder, loader, tmp_path, "float32")
    runs = []
    towers = Towers(folder, dtype="float32", device=torch.device("cpu"))
    embed = towers.embed
    towers.embed = lambda *given: runs.append(given) or embed(*given)  # type: ignore
    encoder._make_towers = lambda: towers
    for prompt in (first, second):
        encoder.compute(encoder.key(prompt, False), prompt, False)
    assert len(runs) == 1


_WRITER = """
import sys
from pathlib import Path
from typing import Any
import numpy as np, torch
from avatar_rl.prompts.embeddings.store import EmbeddingStore
from avatar_rl.prompts.datasets import PromptIndex
from avatar_rl.prompts.record import ProblemType, Prompt
store = EmbeddingStore(Path(sys.argv[1]), 60_000)
rng = np.random.default_rng(int(sys.argv[2]))
while True:
    n = int(rng.integers(40))
    with store.claim(f"{n:064x}"):
        found = store.get(f"{n:064x}")
        if found is None:
            store.put(f"{n:064x}", {"embeds": torch.full((750,), float(n))}, {})
        else:
            assert (found.tensors["embeds"] == n).all()
    print(n, flush=True)
"""


def test_writers_that_are_killed_leave_a_sound_store(tmp_path: Path) -> None:
    """Two at once, one after the other killed at any moment; claims come back, the bound holds."""
    for seed in range(2):
        pair = [
            subprocess.Popen(
                [sys.executable, "-c", _WRITER, str(tmp_path), str(2 * seed + number)],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for number in range(2)
        ]
        for writer in pair:
            assert writer.stdout is not None and writer.stdout.readline()
        time.sleep(0.2)
        for writer in pair:
            writer.kill()
            assert writer.wait() == -signal.SIGKILL, writer.stderr
    store = EmbeddingStore(tmp_path, 60_000)
    for number in range(40):
        with store.claim(f"{number:064x}"):
            found = store.get(f"{number:064x}")
            assert found is None or bool((found.tensors["embeds"] == number).all())
            store.put(f"{number:064x}", {"embeds": torch.full((750,), float(number))}, {})
    assert sum(file.stat().st_size for file in tmp_path.glob("*.embedding")) <= 60_000


# -- with worker processes -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_vision_language(tmp_path_factory.mktemp("workers") / "model", "qwen2_5_vl")


def picture_prompts(folder: Path, count: int) -> list[Prompt]:
    prompts = []
    for number in range(count):
        path = folder / f"{number}.png"
        pixels = np.random.default_rng(number).integers(0, 255, (84, 112, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
        item = MediaItem(kind="image", uri=str(path), min_pixels=56 * 56, max_pixels=64 * 28 * 28)
        prompts.append(
            Prompt(
                id=f"p{number}",
                question="how many red",
                answer="1",
                problem_type=ProblemType.FREE_FORM,
                media=MediaPlan(items=(item,)),
            )
        )
    return prompts


def opened(vl: Path, store: Path, **changes: object) -> AheadEncoder:
    plain = PromptEncoder(vl, MediaLoader(MediaConfig(), Path(".")), TemplateConfig(cache_bytes=0))
    config = EmbeddingsConfig.model_validate({"mode": "on", "folder": store, **changes})
    setting = MediaSetting(
        model=vl,
        reference=vl,
        trained=["model.language_model.norm.weight"],
        dtype="float32",
        device=torch.device("cpu"),
        media=MediaConfig(),
        template=TemplateConfig(),
        threads=1,
    )
    encoder, why = open_encoder(plain, config, setting)
    assert isinstance(encoder, AheadEncoder) and why == ""
    return encoder


def _await(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_workers_make_what_the_rank_reads(vl: Path, tmp_path: Path) -> None:
    prompts = picture_prompts(tmp_path, 3)
    encoder = opened(vl, tmp_path / "store")
    try:
        encoder.ahead((prompt, False) for prompt in prompts)
        _await(lambda: len(list((tmp_path / "store").glob("*.embedding"))) == 6)
        found = [encoder.encode(prompt, False) for prompt in prompts]
        took = encoder.seconds()
        assert (took.hits, took.misses) == (3, 0) and took.waited == 0
        own = opened(vl, tmp_path / "other", workers=0)
        for prompt, one in zip(prompts, found, strict=True):
            mine = own.encode(prompt, False)
            assert one.media is not None and mine.media is not None
            assert torch.equal(one.media.values, mine.media.values)
            assert torch.equal(one.input_ids, mine.input_ids)
        (tmp_path / "0.png").unlink()
        with pytest.raises(DataError, match="no such file"):
            encoder.encode(prompts[0], False)
        (tmp_path / "2.png").write_bytes(b"no picture")
        with pytest.raises(DataError, match="not a readable image"):  # raised in the worker
            encoder.encode(prompts[2], False)
    finally:
        encoder.close()


def test_a_store_without_room_and_a_killed_worker_cost_time_only(vl: Path, tmp_path: Path) -> None:
    [prompt, other] = picture_prompts(tmp_path, 2)
    encoder = opened(vl, tmp_path / "store", bytes=0)
    try:
        first = encoder.encode(prompt, False)  # comes through the pipe
        assert first.media is not None and not list((tmp_path / "store").glob("*.embedding"))
        assert encoder._workers is not None and encoder._workers.pids
        for pid in encoder._workers.pids:
            os.kill(pid, signal.SIGKILL)
        assert encoder.encode(other, False).media is not None
        took = encoder.seconds()
        assert took.misses == 2 and took.waited > 0 and took.busy > 0
    finally:
        encoder.close()


# -- pixels, where towers train --------------------------------------------------------------------


def pixels(model: Path, store: Path, device: str = "cpu", **changes: object) -> Any:
    """What a rank whose vision tower trains is given."""
    plain = PromptEncoder(
        model, MediaLoader(MediaConfig(), Path(".")), TemplateConfig(cache_bytes=0)
    )
    config = EmbeddingsConfig.model_validate({"mode": "pixels", "folder": store, **changes})
    setting = MediaSetting(
        model=model,
        reference=model,
        trained=["model.visual.blocks.0.attn.qkv.lora_A.default.weight"],
        dtype="float32",
        device=torch.device(device),
        media=MediaConfig(),
        template=TemplateConfig(),
        threads=1,
    )
    return open_encoder(plain, config, setting)


def test_workers_make_the_pixels_of_towers_that_train(vl: Path, tmp_path: Path) -> None:
    """Ahead of the step, once for a prompt with and without its hint, and bit for bit."""
    prompts = picture_prompts(tmp_path, 3)
    prompts[0] = prompts[0].model_copy(update={"hint": "look at the left"})
    plain = PromptEncoder(vl, MediaLoader(MediaConfig(), Path(".")), TemplateConfig())
    encoder, why = pixels(vl, tmp_path / "store")
    assert isinstance(encoder, AheadEncoder) and "is pixels" in why
    try:
        asked = [(prompts[0], True), *((prompt, False) for prompt in prompts)]
        encoder.ahead(asked)
        # Four layouts, three media.
        _await(lambda: len(list((tmp_path / "store").glob("*.embedding"))) == 7)
        for prompt, hinted in asked:
            found, expected = encoder.encode(prompt, hinted), plain.encode(prompt, hinted)
            assert found.media is None and found.digest == expected.digest
            assert torch.equal(found.input_ids, expected.input_ids)
            assert torch.equal(found.position_ids, expected.position_ids)
            assert found.next_position == expected.next_position
            assert found.features.keys() == expected.features.keys()
            for name, value in expected.features.items():
                assert torch.equal(found.features[name], value)
        took = encoder.seconds()
        assert (took.hits, took.misses, took.waited) == (4, 0, 0) and took.busy > 0
        assert encoder.modules == []  # no towers but the policy's
    finally:
        encoder.close()


def test_pixels_that_the_store_cannot_take_come_through_the_pipe(vl: Path, tmp_path: Path) -> None:
    [prompt] = picture_prompts(tmp_path, 1)
    encoder, _ = pixels(vl, tmp_path / "store", bytes=0)
    try:
        found = encoder.encode(prompt, False)
        assert found.features and not list((tmp_path / "store").glob("*.embedding"))
        torn = MediaItem(kind="image", uri=str(tmp_path / "none.png"))
        missing = prompt.model_copy(update={"id": "q", "media": MediaPlan(items=(torn,))})
        with pytest.raises(DataError, match="no such file"):
            encoder.encode(missing, False)
    finally:
        encoder.close()


def test_pixels_are_made_ahead_where_they_are_asked_for_or_hide(vl: Path, tmp_path: Path) -> None:
    on_cpu, why = pixels(vl, tmp_path / "store", mode="auto")
    assert isinstance(on_cpu, PromptEncoder) and "the towers train: visual" in why
    on_gpu, why = pixels(vl, tmp_path / "store", device="cuda", mode="auto")
    assert isinstance(on_gpu, AheadEncoder) and "the towers train: visual" in why
    for changes in ({"mode": "off"}, {"workers": 0}):
        assert isinstance(pixels(vl, tmp_path / "store", **changes)[0], PromptEncoder)
    # What was processed for another model is not taken.
    config = vl.parent / "other"
    shutil.copytree(vl, config)
    text = (config / "config.json").read_text()
    (config / "config.json").write_text(
        text.replace('"spatial_merge_size"', '"spatial_merge_size" ')
    )
    one, other = (pixels(path, tmp_path / "store")[0] for path in (vl, config))
    [prompt] = picture_prompts(tmp_path, 1)
    assert one._stored.key(prompt, False) != other._stored.key(prompt, False)
    assert one._stored.key(prompt, False) != opened(vl, tmp_path / "store")._stored.key(
        prompt, False
    )
