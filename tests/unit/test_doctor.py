"""`avatar doctor` finds what is wrong, says the remedy, and fails only for what stops a run."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import redis

from avatar_rl.buffer_service.config import BufferConfig
from avatar_rl.buffer_service.redis.server import EmbeddedRedis
from avatar_rl.cluster.cli import main
from avatar_rl.cluster.commands import doctor_machine
from avatar_rl.cluster.commands.doctor import examine
from avatar_rl.cluster.commands.doctor_redis import redis_findings
from avatar_rl.cluster.commands.findings import Finding, print_findings

RECIPE = (
    "name: t\ndata: {{synthetic: {{n_train: 4}}}}\noutput: {{folder: {folder}, cache: {folder}}}\n"
)


def by_subject(findings: list[Finding]) -> dict[str, Finding]:
    return {item.subject: item for item in findings}


def recipe(folder: Path, extra: str = "") -> Path:
    file = folder / "recipe.yaml"
    file.write_text(RECIPE.format(folder=folder) + extra)
    return file


def test_this_machine_can_run_the_tests(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    findings = examine(recipe(tmp_path))
    assert [item for item in findings if item.level == "fail"] == []
    assert {
        "recipe",
        "python",
        "packages",
        "vLLM",
        "GPU",
        "media",
        "redis",
        "/dev/shm",
    } <= by_subject(findings).keys()
    assert main(["doctor"]) == 0
    assert "0 failed" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]  # nothing left behind


def test_a_broken_recipe_is_a_finding_and_the_machine_is_looked_at_all_the_same(
    tmp_path: Path,
) -> None:
    found = by_subject(examine(recipe(tmp_path, "loop: {stepz: 3}\n")))
    assert found["recipe"].level == "fail" and "did you mean 'steps'" in found["recipe"].found
    assert found["media"].level == "ok"


def test_missing_inputs_taken_ports_and_absent_clusters_are_named(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        file = tmp_path / "recipe.yaml"
        file.write_text(
            f"name: t\ndata: {{train: {tmp_path}/no.jsonl}}\nmodel: {{path: {tmp_path}}}\n"
            f"output: {{folder: {tmp_path}, prometheus_port: {port}}}\n"
            "resources: {address: '127.0.0.1:9'}\nbuffer: {url: 'redis://127.0.0.1:9'}\n"
        )
        found = by_subject(examine(file))
    for subject, words in {
        "model": "config.json",
        "data.train": "is missing",
        "metrics port": str(port),
        "Ray cluster": "127.0.0.1:9",
        "redis": "does not answer",
    }.items():
        assert (
            found[subject].level == "fail"
            and words in found[subject].found
            and found[subject].remedy
        ), subject


def test_a_wrong_version_and_two_vllms_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    real = doctor_machine.installed
    odd: dict[str, str | None] = {"ray": "1.0", "vllm": "0.1", "av": None}
    monkeypatch.setattr(
        doctor_machine, "installed", lambda name: odd[name] if name in odd else real(name)
    )
    found = by_subject(examine())
    assert "ray 1.0" in found["packages"].found and "missing av" in found["packages"].found
    assert "both vllm 0.1" in found["vLLM"].found
    assert print_findings(list(found.values())) == 1


def test_redis_is_looked_at_as_a_run_would_use_it(tmp_path: Path) -> None:
    with EmbeddedRedis(tmp_path / "redis") as server:
        config = BufferConfig(url=server.url)
        rows = by_subject(list(redis_findings(config)))
        assert {name: row.level for name, row in rows.items()} == {
            "redis": "ok",
            "redis memory": "warn",
            "redis durability": "ok",
            "redis rights": "ok",
        }
        client = redis.Redis(unix_socket_path=str(server.socket))
        client.config_set("maxmemory", 64 << 20)
        client.config_set("maxmemory-policy", "allkeys-lru")
        client.config_set("appendonly", "no")
        client.execute_command("ACL", "SETUSER", "default", "-@scripting")
        rows = by_subject(list(redis_findings(config)))
        assert rows["redis memory"].level == "fail" and "allkeys-lru" in rows["redis memory"].found
        assert rows["redis durability"].level == "warn"
        assert rows["redis rights"].level == "fail" and "users.acl" in rows["redis rights"].remedy
        assert client.keys("*") == []
        client.config_set("requirepass", "right")
        [row] = redis_findings(config)
        assert row.level == "fail" and "login" in row.found
