"""Video-MMMU: knowledge from lectures, in three tracks; 900 questions."""

from __future__ import annotations

from collections.abc import Iterator

from avatar_rl.cluster.benchmarks.ask import gold_letter, image, joined, video
from avatar_rl.cluster.benchmarks.folder import SetFolder, SetRow
from avatar_rl.cluster.benchmarks.metrics import accuracy
from avatar_rl.cluster.benchmarks.record import BenchmarkSet, Question
from avatar_rl.prompts.choices import lettered
from avatar_rl.prompts.record import MediaItem

TRACKS = ("Perception", "Comprehension", "Adaptation")
#: The folders of the videos, by subject.
FOLDERS = {
    "Art": ("Art", "Art_Theory", "Design", "Music"),
    "Science": ("Biology", "Chemistry", "Geography", "Math", "Physics"),
    "Humanities": ("History", "Literature", "Sociology", "Psychology"),
    "Engineering": (
        "Agriculture",
        "Architecture_and_Engineering",
        "Computer_Science",
        "Electronics",
        "Energy_and_Power",
        "Materials",
        "Mechanical_Engineering",
    ),
    "Medicine": (
        "Basic_Medical_Science",
        "Clinical_Medicine",
        "Diagnostics_and_Laboratory_Medicine",
        "Pharmacy",
        "Public_Health",
    ),
    "Business": ("Accounting", "Economics", "Finance", "Manage", "Marketing"),
}
_FOLDER_OF = {subject: folder for folder, subjects in FOLDERS.items() for subject in subjects}
_WATCH = (
    "You should watch and learn the video content. Then apply what you learned to answer the "
    "following multi-choice question. The image for this question is at the end of the video."
)
_IGNORE = "Please ignore the Quiz question in last frame of the video."


def read(folder: SetFolder) -> Iterator[Question]:
    """One folder of parquet files for each track; ids are <prefix>_<subject>_<number>."""
    for track in TRACKS:
        for row in folder.rows(f"{track}/*.parquet", f"{track}.parquet", f"{track}.jsonl"):
            yield _question(folder, row, track)


def _question(folder: SetFolder, row: SetRow, track: str) -> Question:
    name, text = row.text("id"), row.text("question")
    subject = "_".join(name.split("_")[1:-1])
    given = row.get("options")
    several = isinstance(given, list) and len(given) > 0
    options = lettered(row.texts("options")) if several else ()
    media: list[MediaItem] = [video(folder.find(f"{_FOLDER_OF.get(subject, '')}/{name}.mp4"))]
    if row.get("image") is not None:
        media.append(image(folder.embedded(row.get("image"), row.where)))
    asked = (_WATCH, text, *options) if track == "Adaptation" else (text, *options, _IGNORE)
    return Question(
        id=f"{track.lower()}-{name}",
        text=text,
        answer=gold_letter(row, options, "answer") if several else row.text("answer"),
        kind="choice" if several else "number",
        options=options,
        media=tuple(media),
        official=joined(*asked),
        parts={"track": track, "subject": subject},
    )


SET = BenchmarkSet(
    name="videommmu",
    title="Video-MMMU",
    paper="https://arxiv.org/abs/2501.13826",
    layout="https://github.com/EvolvingLMMs-Lab/lmms-eval/tree/main/lmms_eval/tasks/videommmu",
    senses=("video",),
    read=read,
    means=accuracy,
    deviation="open answers are compared as numbers or words; the picture of the adaptation track "
    "follows the video as an image",
    listens=True,
)
