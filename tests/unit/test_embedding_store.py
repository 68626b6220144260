"""The embedding store under torn and foreign files, kills, a full disk and several processes."""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

from avatar_rl.buffer_service.records.requests import RolloutRequest
from avatar_rl.common.errors import ConfigError, InputError
from avatar_rl.learner.config import EmbeddingsConfig, LearnerConfig
from avatar_rl.learner.media.ahead import Lookahead
from avatar_rl.learner.media.choice import why_off
from avatar_rl.prompts.datasets import PromptIndex
from avatar_rl.prompts.embeddings.store import EmbeddingStore, default_folder
from avatar_rl.prompts.record import ProblemType, Prompt

NAME = "ab" * 32
ROOM = 1 << 20


def values(seed: int = 0, size: int = 64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, 2, 8, generator=generator).to(torch.bfloat16)


def filled(folder: Path, limit: int = ROOM) -> EmbeddingStore:
    store = EmbeddingStore(folder, limit)
    assert store.put(NAME, {"embeds": values()}, {"kind": "video"})
    return store


def test_an_entry_comes_back_bit_by_bit_in_another_process(tmp_path: Path) -> None:
    filled(tmp_path)
    found = EmbeddingStore(tmp_path, ROOM).get(NAME)
    assert found is not None and found.notes["kind"] == "video"
    assert found.tensors["embeds"].dtype == torch.bfloat16
    assert torch.equal(found.tensors["embeds"], values())


def _cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


def _flip(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


@pytest.mark.parametrize("harm", [_cut, _flip, lambda data: b"", lambda data: b"PK\x03\x04 zip"])
def test_a_damaged_entry_is_a_miss_and_can_be_stored_again(
    tmp_path: Path, harm: object, caplog: pytest.LogCaptureFixture
) -> None:
    store = filled(tmp_path)
    [file] = tmp_path.glob("*.embedding")
    file.write_bytes(harm(file.read_bytes()))  # type: ignore[operator]
    assert store.get(NAME) is None and "computed again" in caplog.text
    assert store.put(NAME, {"embeds": values()}, {}) and store.get(NAME) is not None


def test_an_entry_under_another_name_is_a_miss(tmp_path: Path) -> None:
    store = filled(tmp_path)
    [file] = tmp_path.glob("*.embedding")
    file.rename(tmp_path / f"{'cd' * 32}.embedding")
    assert store.get("cd" * 32) is None


def test_files_of_others_stay(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_bytes(b"x" * 5_000)
    store = EmbeddingStore(tmp_path, 4_000)
    for number in range(6):
        store.put(f"{number:064x}", {"embeds": values(number)}, {})
    assert (tmp_path / "notes.txt").stat().st_size == 5_000
    assert sum(file.stat().st_size for file in tmp_path.glob("*.embedding")) <= 4_000


def test_the_least_recently_used_leaves_first(tmp_path: Path) -> None:
    size = (
        len(filled(tmp_path / "one").get(NAME).tensors)
        and next(  # type: ignore[union-attr]
            (tmp_path / "one").glob("*.embedding")
        )
        .stat()
        .st_size
    )
    store = EmbeddingStore(tmp_path / "two", 2 * size + size // 2)
    for number in range(2):
        store.put(f"{number:064x}", {"embeds": values(number)}, {"kind": "video"})
    os.utime(tmp_path / "two" / f"{0:064x}.embedding", (1, 1))
    assert store.get(f"{0:064x}") is not None  # used just now
    os.utime(tmp_path / "two" / f"{1:064x}.embedding", (2, 2))
    store.put(f"{2:064x}", {"embeds": values(2)}, {"kind": "video"})
    assert [store.has(f"{number:064x}") for number in range(3)] == [True, False, True]


def test_an_entry_above_the_bound_is_not_stored(tmp_path: Path) -> None:
    assert not EmbeddingStore(tmp_path, 500).put(NAME, {"embeds": values()}, {})
    assert not list(tmp_path.glob("*.embedding")) and not list(tmp_path.glob("*.tmp"))


def test_a_full_disk_is_said_once_and_reading_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = filled(tmp_path)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000, before[1]))
    try:
        for number in range(3):
            assert not store.put(f"{number:064x}", {"embeds": values(number)}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caplog.text.count("cannot be written") == 1 and "learner.embeddings" in caplog.text
    assert store.get(NAME) is not None and not list(tmp_path.glob("*.tmp"))
    assert store.put(f"{0:064x}", {"embeds": values(0)}, {})


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "taken").touch()
    with pytest.raises(InputError, match=r"taken: .*learner\.embeddings\.folder"):
        EmbeddingStore(tmp_path / "taken", ROOM)


class Listener:
    """Stands in for the rank's encoder: what it is told to prepare."""

    def __init__(self) -> None:
        self.told: list[tuple[str, bool]] = []

    def ahead(self, prompts: Iterable[tuple[Prompt, bool]]) -> None:
        self.told += [(prompt.id, hinted) for prompt, hinted in prompts]


def test_ranks_of_a_node_share_the_prompts_of_coming_steps() -> None:
    common = {"question": "q", "answer": "a", "problem_type": ProblemType.FREE_FORM}
    index = PromptIndex(
        Prompt(id=f"p{i}", hint="look twice" if i == 3 else None, **common)  # type: ignore
        for i in range(8)
    )
    waiting = [RolloutRequest(seq=i, prompt_id=f"p{i}", step=0, n=4) for i in range(8)]
    other = RolloutRequest(seq=0, prompt_id="p0", step=0, n=1, kind="eval")
    listeners = [Listener(), Listener()]
    looks = [
        Lookahead(lambda: [*waiting, other], index, listener, (rank, 2))  # type: ignore[arg-type]
        for rank, listener in enumerate(listeners)
    ]
    for look in looks:
        look.stop()
        look.look()
        look.look()  # nothing is handed over twice
    told = [listener.told for listener in listeners]
    assert {name for name, _ in told[0]}.isdisjoint(name for name, _ in told[1])
    everything = sorted(told[0] + told[1])
    assert everything == sorted([*((f"p{i}", False) for i in range(8)), ("p3", True)])
    waiting.append(RolloutRequest(seq=8, prompt_id="p1", step=2, n=4))
    assert sum(look.look() for look in looks) == 1  # asked again in a later step: looked at again


FROZEN = ["model.layers.0.mlp.weight"]
SAME = {"kind": "qwen2_5_vl", "revision": "r", "reference": "r"}


def test_frozen_towers_are_stored_and_trained_ones_say_why_not() -> None:
    auto = EmbeddingsConfig()
    assert why_off(auto, trained=FROZEN, **SAME) == ""
    assert "visual" in why_off(auto, trained=["model.visual.blocks.0.attn.qkv.lora_A"], **SAME)
    assert "audio_tower" in why_off(auto, trained=["audio_tower.conv1.weight"], **SAME)
    assert "mode is off" in why_off(EmbeddingsConfig(mode="off"), trained=FROZEN, **SAME)
    other = {**SAME, "reference": "s"}
    assert "reference" in why_off(auto, trained=FROZEN, **other)
    text = {"kind": "qwen3", "revision": "", "reference": ""}
    assert "no vision or audio tower" in why_off(auto, trained=FROZEN, **text)


def test_a_store_that_is_asked_for_and_cannot_be_is_refused() -> None:
    lora = {"rank": 4, "targets": ["llm", "vision"]}
    with pytest.raises(ValueError, match=r"lora.targets has vision"):
        LearnerConfig.model_validate({"embeddings": {"mode": "on"}, "lora": lora})
    with pytest.raises(ConfigError, match=r"mode is on, but the towers train: visual.*freeze"):
        why_off(EmbeddingsConfig(mode="on"), trained=["visual.merger.mlp.0.weight"], **SAME)
    with pytest.raises(ValueError, match=r"optimizer.freeze is empty"):
        LearnerConfig(embeddings=EmbeddingsConfig(mode="on"))


def test_the_default_folder_of_another_user_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert default_folder() == tmp_path / f"avatar-rl-{os.getuid()}" / "embeddings"
    (tmp_path / "avatar-rl-54321").mkdir()
    monkeypatch.setattr(os, "getuid", lambda: 54_321)
    with pytest.raises(InputError, match=r"another user.*learner\.embeddings\.folder"):
        default_folder()
