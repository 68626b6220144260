"""Tasks of an installed lmms-eval, by name: `--benchmark lmms:TASK`.

A task is a YAML file and Python beside it: how a row becomes text and media, how a completion is
scored, how the scores become figures. That Python is run here (docs/security.md). Rows and media
come from this disk, as with every other set; the model is asked by our own rollout actors.

Layout: lmms-eval's own loader (https://github.com/EvolvingLMMs-Lab/lmms-eval, lmms_eval/utils.py,
``load_yaml_config``; lmms_eval/api/task.py, ``ConfigurableTask``)."""

from __future__ import annotations

import difflib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from hashlib import sha256
from pathlib import Path
from statistics import fmean
from types import ModuleType
from typing import Any

import yaml

from avatar_rl.cluster.benchmarks.folder import SetFolder
from avatar_rl.cluster.benchmarks.marks import final_part
from avatar_rl.cluster.benchmarks.metrics import equal
from avatar_rl.cluster.benchmarks.record import BenchmarkSet, Marked, Question
from avatar_rl.common.errors import ConfigError, InputError
from avatar_rl.common.files import replaced_file
from avatar_rl.prompts.record import MediaItem, Modality

PREFIX = "lmms:"
FOLDER_PREFIX = "lmms_"  # of a task's folders: a colon is no good in a path
SOURCE = "https://github.com/EvolvingLMMs-Lab/lmms-eval"
_KINDS: dict[str, Modality] = {
    **dict.fromkeys((".mp4", ".mkv", ".webm", ".avi", ".mov", ".m4v"), "video"),
    **dict.fromkeys((".wav", ".mp3", ".flac", ".ogg", ".m4a"), "audio"),
    **dict.fromkeys((".png", ".jpg", ".jpeg", ".webp", ".bmp"), "image"),
}
#: Where tasks put the score of one question, if not as a number.
_SCORES = ("score", "acc", "accuracy", "correct", "is_correct", "hit")

Row = Mapping[str, Any]


@dataclass(frozen=True)
class _Function:
    """`!function utils.name`: a function of a file beside the task."""

    name: str


class _Loader(yaml.SafeLoader):
    pass


def _function(loader: _Loader, node: yaml.ScalarNode) -> _Function:
    return _Function(str(loader.construct_scalar(node)))


_Loader.add_constructor("!function", _function)


def lmms_set(name: str) -> BenchmarkSet:
    """The set of a task ``name``, "lmms:mmstar". Nothing of the task is run yet.

    Raises ConfigError where lmms-eval is not installed, has no such task, or scores it otherwise
    than by what the model writes."""
    wanted = name.removeprefix(PREFIX)
    files = _task_files()
    if wanted not in files:
        near = difflib.get_close_matches(wanted, files, n=3)
        raise ConfigError(
            f"lmms-eval has no task {wanted!r}: {'there are ' + ', '.join(near) if near else ''}"
            f" {len(files)} tasks in {_tasks_folder()}"
        )
    settings = _read(files[wanted])
    kind = settings.get("output_type", "generate_until")
    if kind != "generate_until" or not isinstance(settings.get("process_results"), _Function):
        raise ConfigError(
            f"lmms-eval scores {wanted} by {kind} and not by a function of the completion: use "
            "lmms-eval itself"
        )
    task = _Task(wanted, files[wanted], settings)
    return BenchmarkSet(
        name=f"{FOLDER_PREFIX}{wanted}",
        title=wanted,
        paper=SOURCE,
        layout=SOURCE,
        senses=(),
        read=task.read,
        means=lambda marked: {"accuracy": equal(marked)},
        others=task.figures,
        marked_by=task.mark,
        deviation="accuracy is the mean of the scores of single questions; the other figures are "
        "lmms-eval's own, on its own scale",
    )


def _tasks_folder() -> Path:
    found = importlib.util.find_spec("lmms_eval")
    if found is None or not found.submodule_search_locations:
        raise ConfigError(
            "lmms-eval is not installed, so none of its tasks are known: `pip install --no-deps "
            "lmms_eval` and what a task imports (docs/evaluation.md), or use a set of ours "
            "(`--benchmark list`)"
        )
    return Path(next(iter(found.submodule_search_locations))) / "tasks"


@cache
def _task_files() -> dict[str, Path]:
    """Task name -> its YAML file; groups are left out."""
    found: dict[str, Path] = {}
    for path in sorted(_tasks_folder().rglob("*.yaml")):
        try:
            task = yaml.load(path.read_text(encoding="utf-8"), _Loader).get("task")
        except (OSError, ValueError, AttributeError, yaml.YAMLError):
            continue  # no task of its own: somebody else's file
        if isinstance(task, str):
            found.setdefault(task, path)
    return found


def _read(path: Path) -> dict[str, Any]:
    """A task's settings over those of the files that it includes."""
    settings: dict[str, Any] = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    included = settings.pop("include", [])
    below: dict[str, Any] = {}
    for one in reversed([included] if isinstance(included, str) else included):
        below |= _read(path.parent / one)
    return below | settings


@dataclass
class _Task:
    """One task; its functions are loaded when its rows are read."""

    name: str
    path: Path
    settings: Mapping[str, Any]
    docs: dict[str, Row] = field(default_factory=dict)  # question id -> row
    results: dict[str, Mapping[str, Any]] = field(default_factory=dict)  # id -> process_results
    _modules: dict[str, ModuleType] = field(default_factory=dict)

    def read(self, folder: SetFolder) -> Iterator[Question]:
        """The rows of the split that the task names, below the set's folder."""
        with _home(folder.root):
            for number, doc in enumerate(self._rows(folder)):
                key = str(number)
                self.docs[key] = doc
                yield Question(
                    id=key,
                    text=(text := self._text(doc)),
                    answer=self._target(doc),
                    kind="text",
                    media=tuple(self._media(doc, folder, key)),
                    official=text,
                )

    def mark(self, question: Question, completion: str, *, tokens: int = 0) -> Marked:
        """Scored by the task's own function."""
        given = final_part(completion)
        found = self._call("process_results", self.docs[question.id], [given])
        self.results[question.id] = found
        return Marked(question, given, self._score(found), tokens)

    def figures(self, marked: Sequence[Marked]) -> dict[str, float]:
        """Lmms-eval's own."""
        found: dict[str, float] = {}
        for entry in self.settings.get("metric_list", ()):
            name = str(entry["metric"])
            values = [
                result[name]
                for one in marked
                if name in (result := self.results.get(one.question.id, {}))
            ]
            if values:
                found[name] = float(self._aggregation(entry.get("aggregation", "mean"))(values))
        return found

    def _aggregation(self, given: object) -> Callable[[list[Any]], float]:
        if isinstance(given, _Function):
            return self._load(given)
        if given == "mean":
            return fmean
        raise ConfigError(
            f"lmms-eval's task {self.name} sums up by {given!r}, which is not read: use lmms-eval "
            "itself"
        )

    def _score(self, found: Mapping[str, Any]) -> float:
        """Of one question, in [0, 1] as far as the task's scores are."""
        for value in found.values():
            if isinstance(value, int | float):
                return float(value)
            if isinstance(value, Mapping):
                for name in _SCORES:
                    if isinstance(value.get(name), int | float):
                        return float(value[name])
                if "pred_answer" in value and "answer" in value:
                    return float(str(value["pred_answer"]) == str(value["answer"]))
        raise ConfigError(
            f"lmms-eval's task {self.name} gives no score of a single question "
            f"({', '.join(map(str, found))}), so there is no interval: use lmms-eval itself"
        )

    def _rows(self, folder: SetFolder) -> Iterator[Row]:
        import datasets

        split = str(self.settings.get("test_split") or self.settings.get("validation_split"))
        root = folder.root
        if (root / "dataset_dict.json").is_file():
            rows = datasets.load_from_disk(str(root))[split]
        else:
            files = folder.files(f"**/*{split}*.parquet", "**/*.parquet", "**/*.jsonl", "**/*.json")
            kind = "parquet" if files[0].suffix == ".parquet" else "json"
            rows = datasets.load_dataset(
                kind,
                data_files=[str(file) for file in files],
                split="train",
                cache_dir=str(folder.media_folder / "rows"),
            )
        if isinstance(self.settings.get("process_docs"), _Function):
            rows = self._call("process_docs", rows)
        yield from rows

    def _text(self, doc: Row) -> str:
        given = self.settings.get("doc_to_text")
        if isinstance(given, _Function):
            return str(self._with_kwargs(given, doc)).strip()
        return self._field(given, doc)

    def _target(self, doc: Row) -> str:
        given = self.settings.get("doc_to_target")
        if isinstance(given, _Function):
            return str(self._with_kwargs(given, doc))
        return str(doc.get(given, "")) if isinstance(given, str) else ""

    def _field(self, given: object, doc: Row) -> str:
        if isinstance(given, str) and given in doc:
            return str(doc[given])
        raise ConfigError(
            f"lmms-eval's task {self.name} makes its text by {given!r}, which is not read: use "
            "lmms-eval itself"
        )

    def _with_kwargs(self, given: _Function, doc: Row) -> object:
        """Functions of a row may take the task's own wording besides."""
        function = self._load(given)
        kwargs = (self.settings.get("lmms_eval_specific_kwargs") or {}).get("default")
        takes = len(inspect.signature(function).parameters) > 1
        return self._run(function, doc, *((kwargs or {},) if takes else ()))

    def _media(self, doc: Row, folder: SetFolder, key: str) -> Iterator[MediaItem]:
        given = self.settings.get("doc_to_visual")
        if not isinstance(given, _Function):
            return
        found = self._with_kwargs(given, doc)
        for one in found if isinstance(found, list | tuple) else [found]:
            path = self._file(one, folder, key)
            kind = _KINDS.get(path.suffix.lower())
            if kind is None:
                raise InputError(path, "no video, sound or picture by its name", "look at it")
            if not path.is_file():
                folder.missing[path] = None
            yield MediaItem(kind=kind, uri=str(path.resolve()))

    def _file(self, value: Any, folder: SetFolder, key: str) -> Path:
        """Where a medium of a row is: a path, or a file made of a picture or a sound."""
        if isinstance(value, str):
            return Path(value) if Path(value).is_absolute() else folder.root / value
        folder.media_folder.mkdir(parents=True, exist_ok=True)
        if hasattr(value, "convert"):  # a picture of Pillow
            content = value.convert("RGB")
            name = sha256(content.tobytes() + str(content.size).encode()).hexdigest()[:32]
            path = folder.media_folder / f"{name}.png"
            if not path.is_file():
                with replaced_file(path) as beside:
                    content.save(beside, format="PNG")
            return path
        if isinstance(value, Mapping) and "array" in value:
            import soundfile

            path = folder.media_folder / f"{self.name}-{key}.wav"
            with replaced_file(path) as beside:
                soundfile.write(beside, value["array"], value["sampling_rate"], format="WAV")
            return path
        raise InputError(
            f"{self.name} row {key}",
            f"a medium of type {type(value).__name__} is not read",
            "use lmms-eval itself",
        )

    def _call(self, name: str, *arguments: object) -> Any:
        return self._run(self._load(self.settings[name]), *arguments)

    def _run(self, function: Callable[..., Any], *arguments: object) -> Any:
        try:
            return function(*arguments)
        except ImportError as error:
            raise self._lacks(error) from error
        except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
            raise InputError(
                f"lmms-eval's task {self.name}",
                f"{function.__name__} failed ({type(error).__name__}: {error})",
                "are these the rows that the task was written for?",
            ) from error

    def _lacks(self, error: ImportError) -> ConfigError:
        return ConfigError(
            f"lmms-eval's task {self.name} needs the package {error.name}: install it"
        )

    def _load(self, given: _Function) -> Callable[..., Any]:
        """The function, its file run once. Raises ConfigError for what the file lacks."""
        file, _, function = given.name.rpartition(".")
        path = self.path.parent / f"{file.replace('.', '/')}.py"
        if file not in self._modules:
            name = f"avatar_lmms_{sha256(str(path).encode()).hexdigest()[:12]}"
            spec = importlib.util.spec_from_file_location(name, path)
            if spec is None or spec.loader is None or not path.is_file():
                raise ConfigError(f"lmms-eval's task {self.name} names {path}, which is not there")
            module = sys.modules[name] = importlib.util.module_from_spec(spec)
            try:
                spec.loader.exec_module(module)
            except ImportError as error:
                raise self._lacks(error) from error
            self._modules[file] = module
        try:
            found: Callable[..., Any] = getattr(self._modules[file], function)
        except AttributeError:
            raise ConfigError(f"lmms-eval's task {self.name}: {path} has no {function}") from None
        return found


@contextmanager
def _home(root: Path) -> Iterator[None]:
    """Tasks look for their media below HF_HOME: here that is the set's own folder."""
    before = os.environ.get("HF_HOME")
    os.environ["HF_HOME"] = str(root.resolve())
    try:
        yield
    finally:
        if before is None:
            del os.environ["HF_HOME"]
        else:
            os.environ["HF_HOME"] = before
