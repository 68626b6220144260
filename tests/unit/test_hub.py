"""Public datasets from a hub: whole, checked, continued, unpacked, and as rows that our reader
takes."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from avatar_rl.cluster.hub import download as downloads
from avatar_rl.cluster.hub.archives import unpack
from avatar_rl.cluster.hub.datasets import DATASETS, dataset
from avatar_rl.cluster.hub.fetch import fetch, list_datasets
from avatar_rl.common.errors import ConfigError, DataError, InputError
from avatar_rl.prompts.config import DataConfig
from avatar_rl.prompts.datasets import load_prompts
from tests.local_hub import COMMIT, LocalHub, serving
from tests.unit.published_sets import PNG

INTENT = {
    "problem_id": 7,
    "problem": "Why does she laugh?",
    "options": ["A. joke", "B. fear"],
    "solution": "<answer>A</answer>",
    "problem_type": "multiple choice",
    "data_type": "video",
    "path": "social_iq/a.mp4",
}


def zipped(**members: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as file:
        for name, content in members.items():
            file.writestr(name, content)
    return out.getvalue()


def tarred(**members: bytes) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as file:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    return out.getvalue()


@pytest.fixture(autouse=True)
def _own_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    # The library reads this once, when it is imported; other tests may have set it.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no-token"))


@pytest.fixture
def intent(monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    rows = [
        INTENT,
        INTENT | {"problem_id": 8, "problem_type": "emer_ov_mc", "solution": "A,B"},
        INTENT | {"problem_id": 9, "solution": "C"},  # none of its options
        INTENT | {"problem_id": 10, "path": "gone.mp4"},
    ]
    files = {
        ".gitattributes": b"x",
        "emer_rewrite.json": json.dumps(rows[:1]).encode(),
        "social_iq_v2_rewrite.json": json.dumps(rows[1:]).encode(),
        "videos.zip": zipped(**{"videos/social_iq/a.mp4": b"clip" * 50_000}),
    }
    hub = LocalHub(dataset("intent_train").repo, files, lfs=("videos.zip",))
    with serving(hub):
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        yield hub


def test_a_dataset_is_fetched_checked_unpacked_and_converted(
    intent: LocalHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fetch("intent_train", "main", tmp_path / "d", ()) == 0
    said = capsys.readouterr()
    assert f"--revision {COMMIT}" in said.out and "fetched        3 files" in said.out
    assert "1 x the answer 'C' is none of the options" in said.err
    assert "1 rows name media that are not here (gone.mp4)" in said.err
    [prompt] = load_prompts(tmp_path / "d/emer_rewrite.rows.jsonl", DataConfig())
    assert (prompt.id, prompt.answer, prompt.options) == ("7", "A", ("A. joke", "B. fear"))
    assert prompt.media.items[0].uri == "videos/social_iq/a.mp4"
    several, _ = load_prompts(tmp_path / "d/social_iq_v2_rewrite.rows.jsonl", DataConfig())
    assert (several.problem_type, several.answer) == ("multi_label", "A,B")
    made = json.loads((tmp_path / "d/fetched.json").read_text())
    assert made["commit"] == COMMIT and made["rows"]["social_iq_v2_rewrite.rows.jsonl"] == 2
    assert made["left_out"]["social_iq_v2_rewrite.rows.jsonl"] == 1
    assert not list((tmp_path / "d").rglob("*.part"))

    before = len(intent.asked)
    assert fetch("intent_train", COMMIT, tmp_path / "d", ()) == 0
    assert "fetched        0 files, 3 were there" in capsys.readouterr().out
    assert not any("/resolve/" in path for path, _ in intent.asked[before:])


def test_a_file_that_changed_here_is_fetched_again(intent: LocalHub, tmp_path: Path) -> None:
    fetch("intent_train", "main", tmp_path, ())
    (tmp_path / "emer_rewrite.json").write_text("[]")
    fetch("intent_train", "main", tmp_path, ())
    assert json.loads((tmp_path / "emer_rewrite.json").read_text()) == [INTENT]


def test_a_kill_leaves_a_part_that_the_next_start_continues(
    intent: LocalHub, tmp_path: Path
) -> None:
    # The hub's library writes 10 MB at a time.
    intent.files["videos.zip"] = zipped(**{"videos/social_iq/a.mp4": b"clip" * 6_000_000})
    intent.slow_after["videos.zip"] = 15_000_000
    command = [sys.executable, "-m", "avatar_rl.cluster.cli", "data", "fetch", "intent_train"]
    process = subprocess.Popen(
        [*command, "--out", str(tmp_path), "--only", "videos.zip"], stdout=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 60
        while not any(p.stat().st_size for p in tmp_path.glob(".videos.zip.*.part")):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    [part] = tmp_path.glob(".videos.zip.*.part")
    there = part.stat().st_size
    intent.slow_after.clear()
    fetch("intent_train", "main", tmp_path, ())
    assert (f"/datasets/{intent.repo}/resolve/{COMMIT}/videos.zip", f"bytes={there}-") in (
        intent.asked
    )
    assert (tmp_path / "videos.zip").read_bytes() == intent.files["videos.zip"]


def test_a_part_that_is_wrong_is_begun_anew(intent: LocalHub, tmp_path: Path) -> None:
    fetch("intent_train", "main", tmp_path, ("*.json",))
    [file] = [f for f in downloads_of(intent) if f.path == "videos.zip"]
    part = downloads._part(tmp_path, file)
    part.write_bytes(b"\0" * 1000)
    fetch("intent_train", "main", tmp_path, ())
    assert (tmp_path / "videos.zip").read_bytes() == intent.files["videos.zip"]


def test_what_another_tool_brought_is_not_fetched_again(
    intent: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files above the hub's bound for plain HTTP come that way only."""
    monkeypatch.setattr("huggingface_hub.constants.MAX_HTTP_DOWNLOAD_SIZE", 300)
    with pytest.raises(DataError, match=r"videos\.zip has 0 GB, more than a hub gives out"):
        fetch("intent_train", "main", tmp_path, ("videos.zip",))
    (tmp_path / "videos.zip").write_bytes(intent.files["videos.zip"])
    fetch("intent_train", "main", tmp_path, ("videos.zip",))
    assert not any("/resolve/" in path for path, _ in intent.asked)


def downloads_of(hub: LocalHub) -> tuple[downloads.HubFile, ...]:
    from avatar_rl.cluster.hub.snapshot import open_snapshot

    return open_snapshot(hub.repo, "main").files


@pytest.mark.parametrize("name", ["emer_rewrite.json", "videos.zip"])
def test_a_checksum_that_differs_is_named_and_nothing_stays(
    intent: LocalHub, name: str, tmp_path: Path
) -> None:
    intent.damaged.add(name)
    with pytest.raises(DataError, match=rf"{name} has the checksum \w+\.\.\., and the hub lists"):
        fetch("intent_train", "main", tmp_path, ())
    assert not (tmp_path / name).exists() and not list(tmp_path.rglob("*.part"))


def test_what_the_hub_refuses_is_named(
    intent: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DataError, match="has no revision 'v9': name a branch"):
        fetch("intent_train", "v9", tmp_path, ())
    with pytest.raises(DataError, match="not there, or not for everybody"):
        fetch("someone/else", "main", tmp_path, ())
    with pytest.raises(DataError, match="give OWNER/NAME"):
        fetch("a/b/c", "main", tmp_path, ())
    with pytest.raises(DataError, match=r"no file \*\.mp3: there are .*emer_rewrite"):
        fetch("intent_train", "main", tmp_path, ("*.mp3",))
    intent.gated = True
    with pytest.raises(DataError, match="is gated: accept its terms"):
        fetch("intent_train", "main", tmp_path, ())
    intent.gated, intent.status = False, 503
    with pytest.raises(DataError, match=r"the hub answers 503; .*try again later"):
        fetch("intent_train", "main", tmp_path, ())
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match="HF_HUB_OFFLINE is set, so nothing is fetched"):
        fetch("intent_train", "main", tmp_path, ())
    assert not list(tmp_path.iterdir())


def test_a_hub_that_is_not_there_is_named_in_seconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    begin = time.monotonic()
    with pytest.raises(DataError, match=r"http://127\.0\.0\.1:9 cannot be reached.*HF_ENDPOINT"):
        fetch("intent_train", "main", tmp_path, ())
    assert time.monotonic() - begin < 5


def test_a_token_is_sent_and_never_said(
    intent: LocalHub,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    intent.needs_token = "hf_secretsecret"
    with pytest.raises(DataError, match="set HF_TOKEN if it is private"):
        fetch("intent_train", "main", tmp_path, ())
    monkeypatch.setenv("HF_TOKEN", "hf_secretsecret")
    assert fetch("intent_train", "main", tmp_path, ("*.json",)) == 0
    assert "Bearer hf_secretsecret" in intent.tokens
    everything = capfd.readouterr().out + capfd.readouterr().err + caplog.text
    files = [p.read_text() for p in tmp_path.rglob("*.json")]
    assert "secret" not in everything + "".join(files)


def test_a_full_disk_is_named_before_and_during(
    intent: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100))
        with pytest.raises(DataError, match=r"takes 0\.0 GB and .* free some, or name another"):
            fetch("intent_train", "main", tmp_path, ())
    assert not any("/resolve/" in path for path, _ in intent.asked)

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "x")

    monkeypatch.setattr(downloads, "http_get", full)
    with pytest.raises(DataError, match="no space is left; free some, what is here stays"):
        fetch("intent_train", "main", tmp_path, ())


def test_every_dataset_of_the_papers_becomes_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of ours in each published layout, media and all."""
    avatar = {"id": "s3-1", "question": "What rings, and where?", "problem_type": "localisation"}
    avatar |= {"solution": "<answer>Left: phone</answer>", "video": "a.mp4", "hint": "Listen."}
    avatar |= {"audio_cues": "A phone rings."}
    avqa = {"problem_id": 1, "problem": "What barks?", "data_type": "image_audio"}
    avqa |= {"problem_type": "multiple choice", "options": ["A. dog", "B. car"]}
    avqa |= {"solution": "<answer>A</answer>", "path": {"image": "i/a.png", "audio": "s/a.wav"}}
    content = "<video><audio>What does she paint?\nA. a sun\nB. a tree"
    omni = {"id": "o1", "Type": "mc", "messages": [{"role": "user", "content": content}]}
    omni |= {"problem": "What?", "solution": "A. a sun", "videos": ["v/a.mp4"], "audios": ["a.wav"]}
    table = io.BytesIO()
    maths = [
        {"problem": "<image>Find x.", "answer": "12", "images": [{"bytes": PNG, "path": "x.png"}]},
        {"problem": "<image>Which?\nA. 1\nB. 2", "answer": "B", "images": [{"bytes": PNG}]},
    ]
    pq.write_table(pa.Table.from_pylist(maths), table)
    train = {"AVQA_R1/train/i/a.png": PNG, "AVQA_R1/train/s/a.wav": b"w"}
    train["AVQA_R1/train/omni_rl_format_train.json"] = json.dumps([avqa]).encode()
    line = json.dumps(omni).encode() + b"\n"
    holds: dict[str, dict[str, bytes]] = {
        "avatar_rl": {"stage3.jsonl": json.dumps(avatar).encode() + b"\n", "a.mp4": b"clip"},
        "avqa_r1_6k": {"AVQA_R1.tar.gz": tarred(**train)},
        "vision_r1_rl": {"train.parquet": table.getvalue()},
        "omnivideo_r1": {"merged_train_all_qi.jsonl": line},
    }
    assert holds.keys() | {"intent_train"} == DATASETS.keys()
    found = {}
    for name, files in holds.items():
        with serving(LocalHub(dataset(name).repo, files, lfs=tuple(files))) as hub:
            monkeypatch.setenv("HF_ENDPOINT", hub.url)
            fetch(name, "main", tmp_path / name, ())
        [rows] = (tmp_path / name).glob("*.rows.jsonl")
        found[name] = load_prompts(rows, DataConfig())
    [one] = found["avatar_rl"]
    assert (one.answer, one.hint, one.audio_caption) == ("Left: phone", "Listen.", "A phone rings.")
    [one] = found["avqa_r1_6k"]
    places = {item.kind: item.uri for item in one.media.items}
    assert places == {"image": "AVQA_R1/train/i/a.png", "audio": "AVQA_R1/train/s/a.wav"}
    assert one.answer == "A"
    number, choice = found["vision_r1_rl"]
    assert (number.problem_type, number.answer) == ("numerical", "12")
    assert (choice.problem_type, choice.answer) == ("multiple_choice", "B")
    picture = tmp_path / "vision_r1_rl" / number.media.items[0].uri
    assert not Path(number.media.items[0].uri).is_absolute() and picture.read_bytes() == PNG
    [one] = found["omnivideo_r1"]
    assert one.answer.startswith("A") and [i.kind for i in one.media.items] == ["video", "audio"]


@pytest.mark.parametrize("evil", ["../out.txt", "/tmp/avatar-evil.txt"])
def test_archives_cannot_write_outside(evil: str, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for name, content in (("a.zip", zipped(**{evil: b"x"})), ("a.tar.gz", tarred(**{evil: b"x"}))):
        (folder / name).write_bytes(content)
        if name == "a.zip" or ".." in evil:
            with pytest.raises(InputError, match="do not use this archive"):
                unpack(folder / name)
        else:
            unpack(folder / name)  # tarfile's filter puts it below the folder
        assert not (tmp_path / "out.txt").exists() and not Path("/tmp/avatar-evil.txt").exists()
    (folder / "torn.zip").write_bytes(zipped(a=b"x" * 1000)[:500])
    with pytest.raises(InputError, match=r"torn\.zip: cannot be unpacked .* fetch again"):
        unpack(folder / "torn.zip")


def test_an_unknown_dataset_lists_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match=r"did you mean 'intent_train'.*OWNER/NAME"):
        dataset("IntentTrain")
    assert list_datasets() == 0 and "jankin123/OmniVideo-R1" in capsys.readouterr().out
