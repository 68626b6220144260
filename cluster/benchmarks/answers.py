"""Every answer to a public set, kept as it comes: what is there is not asked again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from avatar_rl.cluster.benchmarks.marks import mark
from avatar_rl.cluster.benchmarks.record import Marked, MarkedBy, Question
from avatar_rl.cluster.checkpoints.resume import flatten
from avatar_rl.common.errors import ConfigError, DataError
from avatar_rl.common.files import Appender, json_line, read_jsonl, replace_text, replaced_file
from avatar_rl.common.types import Json, JsonObject

_JOURNAL = "answers.jsonl"
_PLACE = "model.path"  # told, not compared: a model may move


class AnswerStore:
    """The answers of one checkpoint to one set, in a folder of their own.

    answers.jsonl grows while questions are answered and survives a kill; ``finish`` writes
    answers.parquet beside it. Only one process may write."""

    def __init__(
        self, folder: Path, asked: Mapping[str, Json], questions: Sequence[Question] = ()
    ) -> None:
        """``asked`` is what the answers depend on; where the model lay (`model.path`) does not
        count.

        Raises ConfigError where the folder holds answers that were asked otherwise, or to other
        questions, naming what differs: its answers would be mixed with others."""
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.texts: dict[str, tuple[str, int]] = {}  # question id -> completion, tokens
        before: dict[str, str] = {}
        for row in read_jsonl(folder / _JOURNAL):
            self.texts.setdefault(str(row["id"]), (str(row["text"]), int(row["tokens"])))
            before.setdefault(str(row["id"]), str(row.get("question")))
        self._trim()
        _check_asked(folder / "asked.json", asked if self.texts else None)
        self._digests = {one.id: question_digest(one) for one in questions}
        _check_questions(folder, before, self._digests)
        replace_text(folder / "asked.json", json.dumps(dict(asked), indent=2) + "\n")
        self._journal = Appender(folder / _JOURNAL, self._trouble)

    def _trim(self) -> None:
        """Cuts a line that a kill left half written: the next one would be joined to it."""
        path = self.folder / _JOURNAL
        data = path.read_bytes() if path.is_file() else b""
        if data and not data.endswith(b"\n"):
            with path.open("r+b") as file:
                file.truncate(data.rfind(b"\n") + 1)

    @staticmethod
    def _trouble(error: OSError) -> None:
        raise DataError(
            f"an answer cannot be written ({error}): free the disk and start again, what is "
            "answered stays"
        ) from error

    def add(self, question_id: str, text: str, tokens: int) -> None:
        """Keeps an answer; a second one to the same question is left out."""
        if question_id not in self.texts:
            self.texts[question_id] = (text, tokens)
            row: JsonObject = {"id": question_id, "text": text, "tokens": tokens}
            if question_id in self._digests:
                row["question"] = self._digests[question_id]
            self._journal.append(json_line(row))

    def marked(self, questions: Sequence[Question], by: MarkedBy = mark) -> list[Marked]:
        """The answered ones of ``questions``, marked, in their order."""
        return [
            by(question, text, tokens=tokens)
            for question in questions
            if (found := self.texts.get(question.id)) is not None
            for text, tokens in [found]
        ]

    def finish(self, marked: Sequence[Marked], result: Mapping[str, Json]) -> None:
        """answers.parquet with a row for each answer, and result.json."""
        rows = [
            {
                "id": one.question.id,
                "question": one.question.text,
                "options": list(one.question.options),
                "answer": one.question.answer,
                "given": one.given,
                "score": one.score,
                "tokens": one.tokens,
                "completion": self.texts[one.question.id][0],
                "about": one.question.cluster,
                "parts": json.dumps(dict(one.question.parts), ensure_ascii=False),
            }
            for one in marked
        ]
        with replaced_file(self.folder / "answers.parquet") as beside:
            pq.write_table(pa.Table.from_pylist(rows), beside)
        replace_text(
            self.folder / "result.json", json.dumps(result, indent=2, ensure_ascii=False) + "\n"
        )

    def close(self) -> None:
        self._journal.close()


def _check_asked(path: Path, asked: Mapping[str, Json] | None) -> None:
    """``asked`` None: nothing is answered yet, so nothing can be mixed."""
    if asked is None or not path.is_file():
        return
    before, now = dict(flatten(json.loads(path.read_text()))), dict(flatten(dict(asked)))
    names = sorted(name for name in {*before, *now} if before.get(name) != now.get(name))
    if names := [name for name in names if name != _PLACE]:
        what = "; ".join(f"{name} {before.get(name)!r}, now {now.get(name)!r}" for name in names)
        raise ConfigError(
            f"{path.parent} holds answers that were asked otherwise ({what}): choose another "
            "--out, or delete that folder"
        )


def question_digest(one: Question) -> str:
    """Of what is asked: words, options, and each medium's name, size and window. The truth is no
    part of it, since a corrected one only marks anew."""
    media: list[Json] = [
        [item.kind, Path(item.uri).name, _size(item.uri), list(item.clip or ())]
        for item in one.media
    ]
    words: JsonObject = {"text": one.text, "official": one.official, "media": media}
    words |= {"options": list(one.options), "in_text": one.in_text}
    return hashlib.sha256(json_line(words)).hexdigest()[:16]


def _size(uri: str) -> int:
    path = Path(uri)
    return path.stat().st_size if path.is_file() else 0


def _check_questions(folder: Path, before: Mapping[str, str], now: Mapping[str, str]) -> None:
    others = [name for name, digest in now.items() if before.get(name, digest) != digest]
    if others:
        raise ConfigError(
            f"{folder} holds answers to other questions: {len(others)} were asked with other words "
            f"or media than the set has now ({', '.join(others[:5])}): choose another --out, or "
            "delete that folder"
        )


def read_answers(folder: Path) -> list[Marked]:
    """The marked answers of a finished set, without their media.

    Raises DataError where there are none, or where they lack what a table needs."""
    path = folder / "answers.parquet"
    if not path.is_file():
        raise DataError(f"{folder} holds no finished answers: evaluate that checkpoint first")
    columns = ["id", "question", "answer", "given", "score", "tokens", "about", "parts"]
    if lacks := set(columns) - set(pq.read_schema(path).names):
        raise DataError(
            f"{path} is of an earlier version and lacks {', '.join(sorted(lacks))}: evaluate that "
            "checkpoint again"
        )
    return [
        Marked(
            Question(
                id=row["id"],
                text=row["question"],
                answer=row["answer"],
                kind="text",
                parts={name: _part(value) for name, value in json.loads(row["parts"]).items()},
                about=row["about"],
            ),
            row["given"],
            row["score"],
            row["tokens"],
        )
        for row in pq.read_table(path, columns=columns).to_pylist()
    ]


def _part(value: str | list[str]) -> str | tuple[str, ...]:
    return value if isinstance(value, str) else tuple(value)
