"""What is wrong is said before anything starts: every fault at once, each with its remedy."""

from __future__ import annotations

import http.server
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from avatar_rl.buffer_service.config import BufferConfig
from avatar_rl.cluster.cli import main
from avatar_rl.cluster.commands import doctor_inputs, doctor_network, doctor_plan
from avatar_rl.cluster.commands.doctor import examine, preflight
from avatar_rl.cluster.commands.doctor_plan import Gpu
from avatar_rl.cluster.commands.doctor_redis import redis_findings
from avatar_rl.cluster.commands.findings import Finding
from avatar_rl.cluster.config import RunConfig
from avatar_rl.cluster.recipe.architecture import architecture_of
from avatar_rl.cluster.services.private_node import PrivateNode, has_home
from avatar_rl.common.endpoint_config import EndpointConfig
from avatar_rl.common.errors import AvatarError

ROOT = Path(__file__).parents[2]
OMNI = ROOT / "recipes" / "qwen2_5_omni_7b.yaml"


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, empty, whose runs and cache lie below it."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def written(folder: Path, **sections: Any) -> str:
    """A recipe of the synthetic world with these sections."""
    raw = {"data": {"synthetic": {"n_train": 4}}, **sections}
    raw.setdefault("output", {"folder": str(folder / "runs"), "cache": str(folder / "cache")})
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(raw))
    return str(file)


def refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What a command that exits with 1 says."""
    capsys.readouterr()
    assert main(words) == 1
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return said


def findings_of(config: RunConfig) -> dict[str, Finding]:
    return {item.subject: item for item in doctor_network.cluster(config)}


def config_of(**sections: Any) -> RunConfig:
    return RunConfig.model_validate({"data": {"synthetic": {"n_train": 4}}, **sections})


# -- what the recipe names -------------------------------------------------------------------------


def test_every_missing_path_is_named_at_once_and_nothing_is_made(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = written(
        here,
        data={
            "train": "no/train.jsonl",
            "heldout": "no/heldout.jsonl",
            "sft": "no/sft.jsonl",
            "reader": {"media_root": "no/media"},
            "media": {"roots": ["no/root"]},
        },
        model={"path": "no/model", "reference": "no/reference"},
        loop={"replay_from": "no/replay.parquet"},
        rewards={
            "weights": {"accuracy": 1.0, "judge": 1.0},
            "judge": {"kind": "managed", "managed": {"path": "no/judge"}},
        },
        cold_start={"steps": 1},
    )
    began = time.monotonic()
    said = refused(["train", recipe], capsys)
    assert time.monotonic() - began < 30  # no process was started
    for words in (
        "data.train: no/train.jsonl is missing; set data.train",
        "data.heldout: no/heldout.jsonl is missing",
        "data.sft: no/sft.jsonl is missing",
        "data.reader.media_root: no/media is missing",
        "data.media.roots: ",
        "model: no/model is not a folder",
        "model.reference: no/reference is not a folder",
        "loop.replay_from: no/replay.parquet is missing",
        "rewards.judge.managed.path: no/judge is not a folder",
    ):
        assert words in said
    assert [path.name for path in here.iterdir()] == ["recipe.yaml"]
    assert refused(["runs", "resume", "x", "--folder", str(here)], capsys)


@pytest.mark.parametrize(
    ("source", "name", "words"),
    [
        (None, "absent_reward:fn", "ModuleNotFoundError: No module named 'absent_reward'"),
        ("x = (", "broken_reward:fn", "SyntaxError"),
        ("raise RuntimeError('no licence')", "angry_reward:fn", "RuntimeError: no licence"),
        ("import os; os._exit(3)", "ending_reward:fn", "importing it ended the process"),
        ("def other(): ...", "other_reward:fn", "has no function 'fn'"),
    ],
)
def test_a_reward_that_cannot_be_imported_is_told_in_a_line(
    here: Path, capsys: pytest.CaptureFixture[str], source: str | None, name: str, words: str
) -> None:
    if source is not None:
        (here / f"{name.partition(':')[0]}.py").write_text(source)
    said = refused(["train", written(here, rewards={"weights": {name: 1.0}})], capsys)
    [line] = [line for line in said.splitlines() if name in line]
    assert words in line and "PYTHONPATH" in line and len(line) < 500
    assert not (here / "runs").exists() and not (here / "cache").exists()


def test_a_reward_in_the_current_folder_is_found_as_in_a_worker(here: Path) -> None:
    (here / "my_rewards.py").write_text("def fn(prompt, completions):\n    return [0.0]\n")
    weights = {"weights": {"my_rewards:fn": 1.0}}
    preflight({"": config_of(rewards=weights, output={"folder": str(here / "runs")})})


def test_a_bad_row_leaves_no_run_folder(
    here: Path, tiny_omni: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "train.jsonl").write_text('{"id": "a", "question": "q", "answer": "b", "nonsense": [\n')
    said = refused(
        ["train", written(here, data={"train": "train.jsonl"}, model={"path": str(tiny_omni)})],
        capsys,
    )
    assert "train.jsonl" in said
    assert not (here / "runs").exists()


def test_stage_names_are_checked_before_a_dry_run(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = str(ROOT / "recipes" / "curriculum_local.yaml")
    for option in ("--stage", "--from-stage"):
        said = refused(["train", recipe, option, "typo", "--dry-run"], capsys)
        assert f"{option} typo" in said and "sft" in said
    assert main(["train", recipe, "--stage", "sft", "--dry-run"]) == 0


def test_a_run_is_evaluated_by_its_export(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = written(here)
    run = here / "runs" / "toy-1"
    run.mkdir(parents=True)
    (run / "status.json").write_text("{}")
    said = refused(["evaluate", str(run), "--recipe", recipe], capsys)
    assert "is a run without an export" in said and f"avatar runs resume {run}" in said
    (run / "checkpoint").mkdir()
    said = refused(["evaluate", str(run), "--recipe", recipe], capsys)
    assert f"its export {run}/checkpoint is evaluated" in said and "has no config.json" in said
    said = refused(["evaluate", str(here / "runs"), "--recipe", recipe], capsys)
    assert "has no config.json" in said
    assert not (here / "cache").exists()  # no world was made
    assert sorted(path.name for path in (here / "runs").iterdir()) == ["toy-1"]


# -- the machine -----------------------------------------------------------------------------------


def test_the_doctor_tells_the_truth_of_a_7b_recipe_without_gpus(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(doctor_plan, "local_gpus", lambda: ([], "no nvidia-smi"))
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    joined = {item.subject: item for item in examine(OMNI)}
    assert joined["GPU"].level == "fail"
    # 26.0 while a step is computed, 2.9 of a media worker.
    for words in ("12 GPUs", "8 learner ranks", "4 rollout actors", "28.9 GiB", "Qwen2.5-Omni-7B"):
        assert words in joined["GPU"].found
    assert "49.9 GiB" in joined["memory"].found
    monkeypatch.delenv("RAY_ADDRESS")
    alone = {
        item.subject: item
        for item in examine(OMNI, [("resources.address", "null"), ("buffer.url", "null")])
    }
    assert alone["GPU"].level == "fail" and "12 GPUs" in alone["GPU"].found
    assert alone["memory"].level == "fail" and "Qwen2.5-Omni-7B" in alone["memory"].found
    assert alone["/dev/shm"].level == "fail" and "object_store_bytes" in alone["/dev/shm"].remedy
    assert "3 checkpoints of Qwen2.5-Omni-7B" in alone["disk"].found


@pytest.mark.parametrize(
    ("have", "words"),
    [
        ([Gpu("H200", 141 << 30, 570)] * 2, "driver 570, but CUDA 13 needs 580"),
        ([Gpu("H200", 141 << 30, 590)], "needs 2 GPUs, here are 1"),
        ([Gpu("T4", 16 << 30, 590)] * 2, "a learner rank of Qwen2.5-VL-7B needs"),
    ],
)
def test_gpus_are_held_against_recipe_and_plan(
    monkeypatch: pytest.MonkeyPatch, have: list[Gpu], words: str
) -> None:
    monkeypatch.setattr(doctor_plan, "local_gpus", lambda: (have, ""))
    monkeypatch.setattr(doctor_plan, "flavour", lambda: "gpu")
    config = config_of(
        model={"path": "/models/Qwen2.5-VL-7B-Instruct"}, learner={"gradient_checkpointing": True}
    )
    [found] = doctor_plan.gpu(config)
    assert found.level == "fail" and words in found.found and found.remedy
    monkeypatch.setattr(doctor_plan, "local_gpus", lambda: ([Gpu("H200", 300 << 30, 590)] * 2, ""))
    [found] = doctor_plan.gpu(config)
    assert found.level == "ok"


def test_hidden_gpus_do_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text(
        "#!/bin/sh\necho 'NVIDIA H200, 143771, 580.65.06'\necho 'NVIDIA H200, 143771, 580.65.06'\n"
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert doctor_plan.local_gpus() == ([Gpu("NVIDIA H200", 143771 << 20, 580)] * 2, "")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert len(doctor_plan.local_gpus()[0]) == 1
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert doctor_plan.local_gpus()[0] == []


def test_a_model_folder_is_planned_by_its_own_numbers(tmp_path: Path, tiny_omni: Path) -> None:
    seen = architecture_of(str(tiny_omni))
    config = json.loads((tiny_omni / "config.json").read_text())["thinker_config"]["text_config"]
    assert seen is not None
    assert (seen.layers, seen.vocabulary) == (config["num_hidden_layers"], config["vocab_size"])
    assert 0 < seen.encoders < 2e6
    assert architecture_of("tiny") is None
    (tmp_path / "config.json").write_text("[]")
    assert architecture_of(str(tmp_path)) is None


def test_heads_that_ranks_cannot_share_are_refused_before_anything_starts(
    here: Path, tiny_omni: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shared = {"ranks": 3, "sequence_parallel": 3}
    for path, name in (("tiny", "the tiny model"), (str(tiny_omni), str(tiny_omni))):
        said = refused(["train", written(here, model={"path": path}, learner=shared)], capsys)
        assert f"learner.sequence_parallel: {name} has 4 attention heads" in said
        assert "set it to one of 1, 2, 4" in said
    assert [path.name for path in here.iterdir()] == ["recipe.yaml"]
    fitting = config_of(learner={"ranks": 4, "sequence_parallel": 4})
    assert not list(doctor_inputs.learner(fitting))


@pytest.mark.parametrize(("frozen", "left"), [("visual", "audio_tower"), ("audio", "visual")])
def test_stored_embeddings_of_towers_that_train_are_refused_before_anything_starts(
    tiny_omni: Path, frozen: str, left: str
) -> None:
    for path in ("tiny", str(tiny_omni)):
        config = config_of(
            model={"path": path},
            learner={"embeddings": {"mode": "on"}, "optimizer": {"freeze": [frozen]}},
        )
        [found] = doctor_inputs.learner(config)
        assert found.subject == "learner.embeddings.mode" and f"train: {left}" in found.found
        assert found.remedy.startswith(f"add {left} to learner.optimizer.freeze")
        both = {"embeddings": {"mode": "on"}, "optimizer": {"freeze": ["visual", "audio_tower"]}}
        assert not list(doctor_inputs.learner(config_of(model={"path": path}, learner=both)))


def test_shared_memory_and_disk_are_held_against_the_recipe(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = {"object_store_bytes": 1 << 50}
    said = refused(["train", written(here, resources=store)], capsys)
    assert "/dev/shm: " in said and "resources.object_store_bytes asks for 1048576.0 GiB" in said
    config = config_of(model={"path": "/m/Qwen2.5-Omni-3B"}, checkpoint={"keep": 1000})
    [found] = doctor_plan.disk(config)
    assert found.level == "fail" and "1001 checkpoints" in found.found
    assert "checkpoint.keep" in found.remedy


# -- sockets, proxies, the cluster -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("http://127.0.0.1:8265", "is the dashboard, where `ray job submit` goes"),
        ("ray://127.0.0.1:10001", "is for Ray Client"),
        ("127.0.0.1:9", "nothing answers there"),
        ("127.0.0.1:999999", "nothing answers there"),
        ("no-such-host.invalid:6379", "nothing answers there"),
        ("6379", "is no address"),
    ],
)
def test_a_wrong_address_is_a_sentence_in_seconds(
    here: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    address: str,
    words: str,
) -> None:
    said = refused(["train", written(here, resources={"address": address})], capsys)
    assert words in said and "resources.address" in said
    monkeypatch.setenv("RAY_ADDRESS", address)
    began = time.monotonic()
    said = refused(["train", written(here)], capsys)
    assert words in said and "RAY_ADDRESS" in said and time.monotonic() - began < 15
    assert not (here / "runs").exists() and not (here / "cache").exists()


def test_something_that_is_no_ray_is_told_from_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_network, "NODES_S", 4.0)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        found = findings_of(config_of(resources={"address": address}))
    assert found["Ray cluster"].level == "fail" and "no Ray answered" in found["Ray cluster"].found


def test_nodes_are_held_against_the_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    node: doctor_network.ClusterNode = {"resources": {"CPU": 64, "GPU": 8}, "labels": {"pool": "a"}}
    monkeypatch.setattr(doctor_network, "_located", lambda address, key: address)
    monkeypatch.setattr(doctor_network, "_nodes", lambda address: [node])
    asked = {"address": "head:6379", "learner_gpus": 1, "rollout_gpus": 1}
    fits = findings_of(config_of(resources=asked))
    assert fits["cluster resources"].level == "ok"
    large = findings_of(
        config_of(
            resources={**asked, "learner_labels": {"pool": "b"}},
            learner={"ranks": 8},
            rollout={"workers": 4},
        )
    )["cluster resources"]
    assert large.level == "fail" and "12 GPU asked, 8 there" in large.found
    assert "no node carries the label pool=b (resources.learner_labels)" in large.found


def test_a_long_temporary_folder_is_refused_by_name(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    long = here / ("x" * 60)
    long.mkdir()
    monkeypatch.setenv("TMPDIR", str(long))
    said = refused(["train", written(here)], capsys)
    assert f"TMPDIR: {long} is" in said and "RAY_TMPDIR=/tmp" in said
    monkeypatch.setenv("RAY_TMPDIR", "/tmp")
    [found] = doctor_network.sockets()
    assert (found.subject, found.level) == ("RAY_TMPDIR", "ok")


def test_a_user_without_a_home_gets_one_for_the_run(
    tmp_path: Path, without_ray_token: pytest.MonkeyPatch
) -> None:
    monkeypatch = without_ray_token
    monkeypatch.setenv("HOME", str(tmp_path / "absent"))
    assert not has_home()
    [found] = doctor_network.home()
    assert found.level == "warn" and "cannot be written" in found.found
    before, node = dict(os.environ), PrivateNode()
    node.start()
    token = Path(os.environ["RAY_AUTH_TOKEN_PATH"])
    assert len(token.read_text()) == 64 and token.stat().st_mode & 0o777 == 0o600
    assert token.parent.stat().st_mode & 0o777 == 0o700
    assert os.access(os.environ["HOME"], os.W_OK) and os.environ["LOGNAME"]
    node.stop()
    node.stop()
    assert dict(os.environ) == before and not token.exists()
    monkeypatch.setenv("RAY_AUTH_TOKEN", "mine")
    node.start()
    assert "RAY_AUTH_TOKEN_PATH" not in os.environ and "RAY_AUTH_MODE" not in os.environ
    node.stop()


@pytest.fixture
def proxied(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """The port of a server on loopback, behind a proxy that is not there."""

    class Models(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(b'{"object": "list", "data": [{"id": "judge", "object": "model"}]}')

        def log_message(self, *_: object) -> None: ...

    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with http.server.HTTPServer(("127.0.0.1", 0), Models) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server.server_port
        server.shutdown()


async def _models(port: int) -> list[str]:
    from avatar_rl.common.chat_client import ChatClient

    endpoint = EndpointConfig(base_url=f"http://127.0.0.1:{port}/v1", model="judge")
    client = ChatClient(endpoint, role="judge", named=str)
    return [model.id async for model in await client._client.models.list()]


def test_loopback_is_asked_without_the_proxy(proxied: int, tmp_path: Path) -> None:
    import asyncio

    from avatar_rl.cluster.services.judge_server import JudgeServer
    from avatar_rl.rewards.config import JudgeConfig

    server = JudgeServer(JudgeConfig(), tmp_path / "log", port=proxied, command=["true"])
    assert server._healthy()
    assert asyncio.run(_models(proxied)) == ["judge"]
    assert not EndpointConfig(base_url="http://judge:8000/v1").on_loopback
    [found] = doctor_network.proxies(None)
    assert "http_proxy" in found.found and "loopback is asked directly" in found.found


def test_a_redis_on_the_network_without_a_password_is_warned_of(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Client:
        def info(self) -> dict[str, Any]:
            return {
                "redis_version": "7.2",
                "used_memory": 1,
                "maxmemory": 1 << 30,
                "aof_enabled": 1,
            }

        def eval(self, *_: object) -> None: ...
        def unlink(self, *_: object) -> None: ...
        def time(self) -> None: ...
        def close(self) -> None: ...

    monkeypatch.setattr(
        "avatar_rl.cluster.commands.doctor_redis.open_client", lambda config, url: Client()
    )

    def subjects(url: str) -> dict[str, str]:
        return {item.subject: item.level for item in redis_findings(BufferConfig(url=url))}

    assert subjects("redis://db:6379")["redis login"] == "warn"
    assert "redis login" not in subjects("redis://:secret@db:6379")
    assert "redis login" not in subjects("redis://127.0.0.1:6379")
    assert subjects("redis://127.0.0.2:6379").keys() == subjects("unix:///tmp/x").keys()


def test_preflight_names_the_stage(here: Path) -> None:
    good = config_of(output={"folder": str(here / "runs")})
    bad = good.model_copy(update={"model": good.model.model_copy(update={"path": "no/model"})})
    with pytest.raises(AvatarError, match="stage two: model: no/model is not a folder"):
        preflight({"one": good, "two": bad})


def test_rows_outside_the_media_roots_are_told_at_the_start(
    here: Path, tiny_omni: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "a.wav").write_bytes(b"RIFF")
    row = {"id": "a", "question": "q", "answer": "b", "problem_type": "free_form"}
    row |= {"audios": [str(here / "a.wav")]}
    (here / "train.jsonl").write_text(json.dumps(row) + "\n")
    (here / "allowed").mkdir()
    data = {"train": "train.jsonl", "media": {"roots": ["allowed"]}}
    said = refused(["train", written(here, data=data, model={"path": str(tiny_omni)})], capsys)
    assert "lies outside data.media.roots" in said and f"{here}/a.wav" in said
    assert not (here / "runs").exists()
