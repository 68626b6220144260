"""The page as static files that open from disk, with the clips that its samples name."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from urllib.parse import quote

from avatar_rl.cluster.view.media import Clip, MediaShelf
from avatar_rl.cluster.view.resources import Resources
from avatar_rl.cluster.view.server import STATIC, encoded
from avatar_rl.common.errors import AvatarError, ConfigError
from avatar_rl.common.files import new_folder
from avatar_rl.common.types import Json

#: What browsers play by container and codec; of anything else the frames and the sound are enough.
PLAYED = {
    ".mp4": {"h264", "hevc", "av1", "vp9", "aac", "mp3", "opus", "flac"},
    ".m4v": {"h264", "aac"},
    ".webm": {"vp8", "vp9", "av1", "opus", "vorbis"},
    ".mov": {"h264", "aac"},
}


def export(resources: Resources, folder: Path, say: Callable[[str], None] = print) -> Path:
    """Write the runs into ``folder``; its ``index.html`` is what is opened.

    Media that cannot be had are named on the page, as by the server. Raises DataError where
    ``folder`` holds something, ConfigError without a run."""
    names = resources.names()
    if not names:
        raise ConfigError(f"there is no run below {resources.parent}: nothing to export")
    with new_folder(folder) as work:
        shutil.copytree(STATIC, work / "static")
        page = (work / "static" / "index.html").read_text(encoding="utf-8")
        (work / "static" / "index.html").unlink()
        (work / "index.html").write_text(
            page.replace('data-mode="live"', 'data-mode="files"'), encoding="utf-8"
        )
        _write(work, "runs", resources.get("runs"))
        for name in names:
            say(f"{name} ...")
            _export_run(resources, name, work)
    return folder / "index.html"


def _export_run(resources: Resources, name: str, work: Path) -> None:
    run = resources.folder(name)
    for what in ("", "/rollouts", "/texts", "/steps"):
        _write(work, f"run/{name}{what}", resources.get(f"run/{name}{what}"))
    for file in resources.rollouts(run).files():
        for number in range(len(file.groups)):
            place = f"run/{name}/group/{file.name}/{number}"
            _write(work, place, resources.get(place))
    roots = resources.roots(run)
    for clip in resources.all_clips(run):
        _copy(resources.shelf, clip, roots, work / "media" / clip.key)


def _write(work: Path, name: str, document: Json) -> None:
    """A script that hands the document to the page: a page from disk may load scripts, not data."""
    path = work / "data" / (on_disk(name) + ".js")
    path.parent.mkdir(parents=True, exist_ok=True)
    said = encoded(name) + b", " + encoded(document)
    # U+2028 and U+2029 are fine in scripts of today; "</script" cannot end a file.
    path.write_bytes(b"AV.deliver(" + said + b");\n")


def on_disk(name: str) -> str:
    """A resource's name as a path; static/core.js makes the same of it."""
    return "/".join(quote(part, safe="").replace("%", "_") for part in name.split("/"))


def _copy(shelf: MediaShelf, clip: Clip, roots: Sequence[Path], folder: Path) -> None:
    """The clip as it is; frames of a video, and sound that browsers may not play, beside it."""
    if folder.is_dir():  # another run names it, too
        return
    try:
        path = shelf.find(clip, roots)
        folder.mkdir(parents=True)
        shutil.copyfile(path, folder / f"file{clip.suffix}")
        if clip.item.kind != "audio":
            for number, frame in enumerate(shelf.frames(clip, path)):
                (folder / f"frame-{number}.jpg").write_bytes(frame)
        if _needs_sound(shelf, clip, roots):
            (folder / "sound.wav").write_bytes(shelf.wav(clip, path))
    except (AvatarError, OSError):
        return  # the group's document says what is wrong


def _needs_sound(shelf: MediaShelf, clip: Clip, roots: Sequence[Path]) -> bool:
    said = shelf.describe(clip, roots)
    codecs = said.get("codecs")
    if not said.get("sound") or not isinstance(codecs, dict):
        return False
    if clip.item.kind == "audio":
        return clip.suffix not in (".wav", ".mp3", ".m4a", ".flac", ".ogg", ".opus")
    return bool(set(codecs.values()) - PLAYED.get(clip.suffix, set()))
