"""Group F: recipe files, commands, and what a machine lacks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from benchmarks.bad_inputs.entries import (
    DATA,
    BadInput,
    Try,
    after,
    command,
    process,
    recipe,
    with_environment,
)

CURRICULUM = str(Path("recipes/curriculum_local.yaml").absolute())
DEMO = str(Path("recipes/local.yaml").absolute())
TRAIN = ("train", "{}/recipe.yaml", "--output.folder={}/runs", "--output.cache={}/cache")
ROW = b'{"id": "a", "problem": "q", "solution": "b", "problem_type": "ocr"}\n'
DEAD = "redis://127.0.0.1:9"


def file(name: str, content: str | bytes) -> Callable[[Path], object]:
    raw = content.encode() if isinstance(content, str) else content

    def write(folder: Path) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(raw)

    return write


RECIPE = file("recipe.yaml", DATA)


def trained(*words: str) -> Try:
    """`avatar train` over the synthetic world with these overrides."""
    return after(RECIPE, command(*TRAIN, *words))


def long_folder(folder: Path) -> None:
    (folder / ("x" * 80)).mkdir()


def damaged(text: str) -> Callable[[Path], object]:
    return file("runs/a/status.json", text)


def unreadable(folder: Path) -> None:
    (folder / "recipe.yaml").mkdir()


YAML: tuple[tuple[str, str, tuple[str, ...], tuple[str, ...]], ...] = (
    ("yaml", "loop: {steps: 3", (), ("recipe.yaml", "not valid YAML")),
    ("list", "- data: 1\n", (), ("recipe.yaml must be a mapping", "found list")),
    ("twice", "loop: {steps: 3}\nloop: {fresh: 2}", (), ("'loop' is there twice", "lines 2 and 3")),
    ("yes", "loop:\n  steps: yes", (), ("loop.steps", "integer", "given: 'yes'")),
    ("true", "loop:\n  steps: true", (), ("loop.steps", "a number is due here")),
    ("number_name", "name: 123", (), ("name:", "given: 123", "write it in quotes")),
    ("nan", "learner: {optimizer: {lr: .nan}}", (), ("learner.optimizer.lr", "finite")),
    ("inf", "supervision: {stall_s: .inf}", (), ("supervision.stall_s", "finite")),
    ("off", "buffer: {tls_ca: off}", (), ("buffer.tls_ca", "write null")),
    ("none", "output: {upload: None}", (), ("output.upload", "write null")),
    ("home", "output: {folder: $HOME/runs}", (), ("output.folder", "write the path itself")),
    ("nobody", "output: {folder: ~nobody-here/x}", (), ("output.folder", "write the whole path")),
    ("empty_path", "output: {folder: ''}", (), ("output.folder", "the path is empty", "null")),
    ("long_name", f"name: {'x' * 300}", (), ("name", "at most 100 characters")),
    ("seed", "seed: 99999999999999999999", (), ("seed", "less than 4294967296")),
    ("betas", "learner: {optimizer: {betas: [2, 3]}}", (), ("betas.0", "less than 1")),
    (
        "judge_url",
        "rewards: {judge: {base_url: 'localhost:8000'}}",
        (),
        ("rewards.judge.base_url", "no URL", "http://HOST:PORT/v1"),
    ),
    (
        "judge_port",
        "rewards: {judge: {base_url: 'http://h:99999/v1'}}",
        (),
        ("rewards.judge.base_url", "out of range", "http://HOST:PORT/v1"),
    ),
    ("preset", "preset: nonsense", (), ("unknown preset 'nonsense'", "choose one of grpo")),
    ("section", "loop: 3", (), ("loop: a section of keys", "--loop.steps sets one")),
    ("key", "", ("--learner.optimiser.lr=1",), ("learner.optimiser", "did you mean 'optimizer'")),
    ("top_key", "", ("--lop.steps=1",), ("lop: unknown key", "did you mean 'loop'")),
    ("far_key", "", ("--loop.zzz=1",), ("loop.zzz: unknown key", "known here: steps")),
    ("zero", "", ("--loop.steps=0",), ("loop.steps", "given: 0", "greater than or equal to 1")),
    ("word", "", ("--loop.steps=many",), ("loop.steps", "integer", "'many'")),
    ("choice", "", ("--learner.objective.loss_type=ppo",), ("loss_type", "'grpo', 'dapo'")),
    ("deep", "", ("--seed.deep=1",), ("seed:",)),
    ("no_yaml_value", "", ("--seed=[1",), ("--seed '[1'", "not a YAML value")),
    (
        "sets_without_folder",
        "evaluation: {benchmarks: {names: [mlvu]}}",
        (),
        ("evaluation.benchmarks", "needs `sets: FOLDER`"),
    ),
    (
        "priority_and_reuse",
        "buffer: {strategy: priority, max_reuse: 2}",
        (),
        ("buffer", "leave reward_diverse off and max_reuse 0"),
    ),
    ("stray", "", ("steps=3",), ("unexpected argument 'steps=3'",)),
    ("no_value", "", ("--seed",), ("--seed has no value",)),
)
ADDRESSES = (
    ("http://127.0.0.1:8265", "is the dashboard", "host:6379"),
    ("ray://127.0.0.1:10001", "is for Ray Client", "host:6379"),
    ("127.0.0.1:9", "nothing answers there", "resources.address"),
    ("6379", "is no address", "host:6379"),
)
COMMANDS: tuple[tuple[str, Try, tuple[str, ...]], ...] = (
    ("no_command", command("tarin"), ("tarin", "No such command")),
    ("no_recipe", command("train"), ("Missing argument", "RECIPE")),
    ("absent_recipe", command("train", "{}/no.yaml"), ("no.yaml does not exist",)),
    ("override_first", command("train", "--loop.steps=3"), ("--loop.steps=3", "overrides follow")),
    (
        "not_utf_8",
        after(file("recipe.yaml", b"name: caf\xe9\n"), command(*TRAIN)),
        ("recipe.yaml is not UTF-8 text (byte 9)", "save it as UTF-8"),
    ),
    (
        "folder_as_recipe",
        after(unreadable, command(*TRAIN)),
        ("recipe.yaml is a folder", "name the .yaml file"),
    ),
    (
        "no_dataset",
        command("data", "fetch", "IntentTrain"),
        ("no public dataset 'IntentTrain'", "did you mean 'intent_train'"),
    ),
    ("no_stage", command("train", CURRICULUM, "--stage", "typo", "--dry-run"), ("typo", "sft")),
    (
        "no_from_stage",
        command("train", CURRICULUM, "--from-stage", "typo", "--dry-run"),
        ("--from-stage typo", "sft"),
    ),
    ("stage_of_one", trained("--stage=x", "--dry-run"), ("has no stages", "--stage")),
    ("both_stages", trained("--stage=x", "--from-stage=y"), ("--from-stage", "not allowed with")),
    ("resume_empty", trained("--resume="), ("--resume", "has no value")),
    ("preset_empty", trained("--preset="), ("--preset", "has no value")),
    ("resume_none", trained("--resume=no"), ("--resume no", "no such run")),
    (
        "data_missing",
        after(file("recipe.yaml", "data: {train: no/train.jsonl}"), command(*TRAIN)),
        ("data.train: no/train.jsonl is missing", "set data.train"),
    ),
    ("model_missing", trained("--model.path=no/model"), ("model: no/model is not a folder",)),
    (
        "replay_missing",
        trained("--loop.replay_from=no/replay.parquet"),
        ("loop.replay_from: no/replay.parquet is missing",),
    ),
    ("shm", trained("--resources.object_store_bytes=1e15"), ("object_store_bytes", "/dev/shm")),
    ("redis_away", trained(f"--buffer.url={DEAD}"), ("127.0.0.1:9", "buffer.url")),
    *(
        (f"address_{n}", trained(f"--resources.address='{address}'"), tuple(words))
        for n, (address, *words) in enumerate(ADDRESSES)
    ),
    *(
        (
            f"ray_address_{n}",
            with_environment(trained(), RAY_ADDRESS=address),
            ("RAY_ADDRESS", words[0]),
        )
        for n, (address, *words) in enumerate(ADDRESSES)
    ),
    (
        "long_tmpdir",
        after(long_folder, with_environment(trained(), TMPDIR="{}/" + "x" * 80)),
        ("TMPDIR:", "RAY_TMPDIR=/tmp"),
    ),
    (
        "bad_row",
        after(
            file("train.jsonl", '{"id": "a", "question": ['),
            after(file("recipe.yaml", "data: {train: train.jsonl}"), command(*TRAIN)),
        ),
        ("train.jsonl:1", "malformed JSON", "mend or remove"),
    ),
    (
        "runs_none",
        command("runs", "show", "x", "--folder={}"),
        ("avatar runs show x", "no such run"),
    ),
    ("runs_two_words", command("runs", "show", "a", "b"), ("takes one run", "an id below")),
    (
        "runs_torn",
        after(damaged('{"run_id": "b", "sta'), command("runs", "show", "a", "--folder={}/runs")),
        ("a/status.json", "is not a run's status"),
    ),
    (
        "scale_no_run",
        command("scale", "{}/no", "--rollout-workers=2"),
        ("no is not a run folder", "`avatar runs`"),
    ),
    ("scale_word", command("scale", "{}", "--rollout-workers=two"), ("two", "integer")),
    (
        "buffer_away",
        command("buffer", "inspect", "run", f"--url={DEAD}"),
        ("127.0.0.1:9 does not answer", "is Redis running there?"),
    ),
    ("validate_absent", command("data", "validate", "{}/no.jsonl"), ("no such dataset",)),
    (
        "synthesize_over",
        after(RECIPE, command("data", "synthesize", "{}")),
        ("already holds something",),
    ),
    (
        "hints_over_data",
        after(
            file("d.jsonl", ROW),
            command(
                "hints",
                "generate",
                "{}/d.jsonl",
                "--base-url=http://127.0.0.1:9/v1",
                "--model=m",
                "--out={}/d.jsonl",
            ),
        ),
        ("is the dataset itself", "choose another file"),
    ),
    (
        "endpoint_is_no_url",
        after(
            file("d.jsonl", ROW),
            command("hints", "generate", "{}/d.jsonl", "--base-url=foo", "--model=m", "--out=o"),
        ),
        ("--base-url foo", "write http://HOST:PORT/v1"),
    ),
    (
        "evaluate_run",
        after(file("run/status.json", "{}"), command("evaluate", "{}/run", "--recipe", DEMO)),
        ("is a run without an export", "avatar runs resume"),
    ),
    (
        "evaluate_no_config",
        after(file("run/x", ""), command("evaluate", "{}/run", "--recipe", DEMO)),
        ("run has no config.json", "with save_pretrained"),
    ),
)
#: As they are typed, in a process of their own: the time to the message has Python's start in it.
PROCESSES: tuple[tuple[str, Try, tuple[str, ...]], ...] = (
    ("typed_command", process("tarin"), ("tarin", "No such command")),
    (
        "typed_key",
        after(RECIPE, process("train", "recipe.yaml", "--dry-run", "--loop.stepz=3")),
        ("loop.stepz", "did you mean 'steps'"),
    ),
    (
        "typed_lengths",
        after(RECIPE, process("train", "recipe.yaml", "--rollout.sampling.max_tokens=4096")),
        ("max_tokens 4096 exceed", "raise max_model_len to"),
    ),
    (
        "typed_row",
        after(file("d.jsonl", b'{"problem": "q"}\n'), process("data", "validate", "d.jsonl")),
        ("d.jsonl:1", "no answer", "drop"),
    ),
    (
        "typed_in_c_locale",
        after(
            file("recipe.yaml", DATA + "data2: café\n"),
            process(
                "train",
                "recipe.yaml",
                "--dry-run",
                LC_ALL="C",
                PYTHONUTF8="0",
                PYTHONCOERCECLOCALE="0",
            ),
        ),
        ("data2: unknown key", "did you mean 'data'"),
    ),
    (
        "typed_wrong_address",
        after(RECIPE, process("train", "recipe.yaml", RAY_ADDRESS="http://127.0.0.1:8265")),
        ("RAY_ADDRESS", "is the dashboard", "host:6379"),
    ),
)
ENTRIES = [
    *(BadInput("F", name, recipe(text, *over), words, True) for name, text, over, words in YAML),
    *(BadInput("F", name, act, words) for name, act, words in COMMANDS),
    *(BadInput("F", name, act, words, True) for name, act, words in PROCESSES),
]
