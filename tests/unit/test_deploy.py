"""Deployment files parse and name what exists: entry points, metrics, recipe keys, commands of the
buffer."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from avatar_rl.cluster.cli import main
from avatar_rl.cluster.config import RunConfig
from avatar_rl.cluster.curriculum.stages import resolve
from avatar_rl.cluster.recipe.architecture import ARCHITECTURES
from avatar_rl.cluster.recipe.load import load_recipe, parse_overrides, read_recipe
from avatar_rl.cluster.recipe.memory import BOARD_VERSIONS, memory_table
from avatar_rl.cluster.telemetry.metrics import CATALOGUE, describe
from avatar_rl.cluster.telemetry.sinks import prometheus_name

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
PUBLISHED = {
    "Qwen2.5-Omni-3B": 4.7e9,
    "Qwen2.5-Omni-7B": 8.9e9,
    "Qwen2.5-VL-7B": 8.29e9,
    "Qwen3-VL-8B": 8.77e9,
    "Qwen3-VL-30B-A3B": 31.1e9,
    "Qwen3-8B": 8.19e9,
    "Qwen3-Omni-30B-A3B": 31.7e9,
}


def test_make_bench_looks_at_its_name_before_it_installs(tmp_path: Path) -> None:
    shutil.copy(ROOT / "Makefile", tmp_path)
    done = subprocess.run(["make", "bench"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and "usage: make bench NAME=" in done.stdout + done.stderr
    assert [file.name for file in tmp_path.iterdir()] == ["Makefile"]


def ray_job() -> dict[str, Any]:
    return yaml.safe_load((DEPLOY / "kuberay" / "rayjob.yaml").read_text())  # type: ignore[no-any-return]


def test_the_ray_job_runs_a_recipe_that_exists_with_overrides_that_are_known() -> None:
    job = ray_job()
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    words = job["spec"]["entrypoint"].split()
    assert words[:4] == ["python", "-m", "cluster.cli", "train"]
    config = load_recipe(ROOT / words[4], parse_overrides(words[5:]))
    assert config.buffer.url and config.resources.address == "auto"
    groups = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    labels = {group["groupName"]: group["labels"] for group in groups}
    assert labels == {
        "learner": config.resources.learner_labels,
        "rollout": config.resources.rollout_labels,
    }
    assert not any(
        "labels" in group["rayStartParams"] for group in groups
    )  # KubeRay 1.5 refuses these


def test_the_ray_job_has_the_gpus_its_recipe_asks_for_and_the_ray_we_pin() -> None:
    spec = ray_job()["spec"]
    cluster = spec["rayClusterSpec"]
    config = load_recipe(ROOT / spec["entrypoint"].split()[4])
    gpus, shared_memory = {}, {}
    for group in cluster["workerGroupSpecs"]:
        [container] = group["template"]["spec"]["containers"]
        [shm] = [
            volume for volume in group["template"]["spec"]["volumes"] if volume["name"] == "shm"
        ]
        shared_memory[group["groupName"]] = int(shm["emptyDir"]["sizeLimit"].removesuffix("Gi"))
        # What the autoscaler may take away while it idles is not there when the run looks for its
        # GPUs.
        gpus[group["groupName"]] = group["minReplicas"] * int(
            container["resources"]["limits"]["nvidia.com/gpu"]
        )
        assert {mount["mountPath"] for mount in container["volumeMounts"]} >= {
            "/shared",
            "/dev/shm",
        }
    assert gpus["learner"] >= config.learner.ranks and gpus["rollout"] >= config.rollout.workers
    [omni] = [item for item in ARCHITECTURES if item.name == "Qwen2.5-Omni-7B"]
    version = omni.parameters * 2 / 2**30
    assert (
        shared_memory["learner"] * 0.95 > BOARD_VERSIONS * version
        and shared_memory["rollout"] * 0.95 > version
    )
    assert f'"ray[default]=={cluster["rayVersion"]}"' in (ROOT / "pyproject.toml").read_text()


def test_the_slurm_script_is_valid_bash() -> None:
    subprocess.run(["bash", "-n", str(DEPLOY / "slurm" / "train.sbatch")], check=True)


def test_slurms_notice_stops_the_training_in_order_before_the_cluster(tmp_path: Path) -> None:
    """The script's own end, with a training that takes a second to save itself and a cluster that
    is `sleep`."""
    script = (DEPLOY / "slurm" / "train.sbatch").read_text()
    start, end = script.index("steps=()"), script.index("training=$!")
    training = "trap 'sleep 1; echo saved; exit 0' TERM; echo began; while :; do sleep 0.1; done"
    (tmp_path / "token").touch()
    (tmp_path / "job.sh").write_text(
        f"set -euo pipefail\ntoken={tmp_path}/token\n"
        f"{script[start : script.index('start_ray()', start)]}"
        f"sleep 60 & steps+=($!)\nbash -c {shlex.quote(training)} &\n"
        + script[end:].replace("code=0", "echo trapped; code=0", 1)
    )
    with subprocess.Popen(["bash", tmp_path / "job.sh"], stdout=subprocess.PIPE, text=True) as job:
        assert job.stdout is not None
        assert {job.stdout.readline() for _ in range(2)} == {"began\n", "trapped\n"}
        job.send_signal(signal.SIGTERM)
        assert job.stdout.readline() == "saved\n"
        assert job.wait(timeout=10) == 0
    assert not (tmp_path / "token").exists()


STUBS = {
    "scontrol": "printf 'n%s\\n' 0 1 2 3",
    "srun": 'echo "srun $*" >> "$LOG"; [[ $* == *ip-address ]] && echo 10.0.0.1; true',
    "ray": "true",
    "python": '[[ $1 == -c ]] && { echo token; exit; }; [[ $2 == *fit ]] && exec "$PYTHON" "$@"; '
    'sleep 0.5; echo "python $*" >> "$LOG"; echo "${RAY_AUTH_MODE:-none}" >> "$LOG"',
}


def submitted(folder: Path, nodes: int, recipe: str, **more: str) -> list[str]:
    """What the script calls in a job of ``nodes`` nodes of 8 GPUs."""
    (folder / ".venv" / "bin").mkdir(parents=True)
    (folder / ".venv" / "bin" / "activate").touch()
    tools = folder / "tools"
    tools.mkdir()
    for name, text in STUBS.items():
        (tools / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (tools / name).chmod(0o755)
    environment = {
        "PATH": f"{tools}:{os.environ['PATH']}",
        "PYTHON": sys.executable,
        "PYTHONPATH": str(ROOT),
        "LOG": str(folder / "log"),
        "SLURM_SUBMIT_DIR": str(folder),
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "n[0-3]",
        "SLURM_JOB_NUM_NODES": str(nodes),
        "SLURM_GPUS_ON_NODE": "8",
        "AVATAR_SHARED": str(folder),
        **more,
    }
    command = ["bash", str(DEPLOY / "slurm" / "train.sbatch"), str(ROOT / recipe), "--seed", "3"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert not list(folder.glob(".ray-token*"))
    return (folder / "log").read_text().splitlines()


def test_slurm_on_one_node_starts_nothing_but_the_run(tmp_path: Path) -> None:
    recipe = ROOT / "recipes" / "qwen2_5_omni_7b.yaml"  # whose labels no single node can carry
    command, mode = submitted(tmp_path, 1, str(recipe))
    assert mode == "none"  # the run's own token
    words = shlex.split(command)
    assert words[:4] == ["python", "-m", "cluster.cli", "train"] and words[-2:] == ["--seed", "3"]
    config = load_recipe(recipe, parse_overrides(words[5:]))
    assert config.resources.address is None and config.buffer.url is None
    assert config.resources.learner_labels == config.resources.rollout_labels == {}


def test_slurm_labels_as_many_nodes_as_the_learner_fills(tmp_path: Path) -> None:
    redis = {"AVATAR_REDIS_URL": "rediss://r:6379", "AVATAR_REDIS_PASSWORD": "p"}
    lines = submitted(tmp_path, 4, "recipes/gpu/omni_7b_4x8.yaml", **redis)
    joined = sorted(line for line in lines if " --labels" in line)
    assert len(joined) == 3
    assert "--ntasks=1 -w n0 ray start --head" in joined[0] and "pool=learner" in joined[0]
    assert "--ntasks=1 -w n3" in joined[1] and "pool=rollout" in joined[1]
    assert "--ntasks=2 -w n1,n2" in joined[2] and "pool=learner" in joined[2]
    [command] = [line for line in lines if line.startswith("python")]
    assert "--resources.address 10.0.0.1:6379 --buffer.url rediss://r:6379" in command
    assert lines[-1] == "token"


def test_the_image_is_what_the_ray_job_and_the_constraints_expect() -> None:
    text = (ROOT / "Dockerfile").read_text()
    parts = re.split(r"^FROM ", text, flags=re.MULTILINE)[1:]
    images = {part.split()[2]: part for part in parts}
    assert images.keys() == {"cpu", "gpu"}
    for target, part in images.items():
        lines = [line.strip() for line in part.replace("\\\n", " ").splitlines()]
        said = [line.partition(" ")[0] for line in lines if line and not line.startswith("#")]
        assert said.index("USER") < said.index("COPY")  # nothing of ours is root's
        assert "USER avatar" in lines and "WORKDIR /app" in lines
        assert any(line.startswith("ENV PATH=/app/.venv/bin:$PATH") for line in lines)
        assert any(line.startswith(f"RUN make setup EXTRA={target}") for line in lines)
        assert (DEPLOY / "constraints" / f"{target}.txt").is_file()
        assert not re.search(r"(?i)password|token|secret=|ARG ", part)
        [python] = set(re.findall(r"python:?(3\.\d+)", part))
        assert python in ("3.11", "3.12")
    assert re.search(r"cuda:13\.", images["gpu"]) and "wget" in images["gpu"]
    spec = ray_job()["spec"]["rayClusterSpec"]
    groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    for container in (group["template"]["spec"]["containers"][0] for group in groups):
        assert (container["image"], container["workingDir"]) == ("avatar-rl:gpu", "/app")
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert {".git", ".venv", "build", "runs"} <= set(ignored)


def test_the_dashboard_shows_metrics_that_exist() -> None:
    weight_store = json.loads((DEPLOY / "grafana" / "avatar.json").read_text())
    assert weight_store["title"] and weight_store["uid"] and len(weight_store["panels"]) >= 12
    known = {prometheus_name(metric.name) for metric in CATALOGUE if not metric.is_family}
    for name in ("reward/accuracy", "masked/judge"):  # of families
        assert describe(name) is not None
        known.add(prometheus_name(name))
    places = [tuple(panel["gridPos"].values()) for panel in weight_store["panels"]]
    assert len(set(places)) == len(places)
    for panel in weight_store["panels"]:
        for target in panel["targets"]:
            [name] = re.findall(r"avatar_\w+", target["expr"])
            assert name in known, f"panel {panel['title']!r} shows {name}, which no run reports"
            assert 'run=~"$run"' in target["expr"]


@pytest.mark.parametrize("recipe", sorted(ROOT.glob("recipes/*.yaml")), ids=lambda path: path.stem)
def test_recipes_dry_run(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(recipe), "--dry-run"]) == 0
    asked = r"# resources (this run|that (each of )?[\w, ]+) asks for\n# +\w"
    assert re.search(asked, capsys.readouterr().out)


def test_cluster_recipes_name_what_a_cluster_needs() -> None:
    # named after their size, or after their nodes
    for recipe in [*ROOT.glob("recipes/*b.yaml"), *ROOT.glob("recipes/gpu/*x8.yaml")]:
        for config in _configs(recipe):
            assert config.resources.address == "auto"
            assert config.buffer.url and config.buffer.password_env
            assert config.output.folder.is_absolute() and config.output.cache.is_absolute()
            assert config.rollout.engine.max_model_len >= (
                config.data.template.max_prompt_tokens + config.rollout.sampling.max_tokens
            )


def _configs(recipe: Path) -> list[RunConfig]:
    """The recipe's, or that of each of its stages."""
    raw = read_recipe(recipe)
    if "stages" not in raw:
        return [load_recipe(recipe)]
    curriculum = resolve(raw, (), preset_name=None, source=recipe.name)
    return [stage.config for stage in curriculum.stages]


def test_memory_plans_count_the_published_parameters_and_stand_in_the_docs() -> None:
    for item in ARCHITECTURES:
        assert item.parameters == pytest.approx(PUBLISHED[item.name], rel=0.02)
    assert memory_table() in (ROOT / "docs" / "cluster.md").read_text(), (
        "paste `python -m avatar_rl.cluster.recipe.memory` into it"
    )
