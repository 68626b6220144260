"""Pictures for the docs, of a run that is there: ``python -m tests.screenshots runs/<id>``.

They go to docs/images/: `avatar view` on a desktop and a phone, the report, the live screen."""

from __future__ import annotations

import io
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from PIL import Image, ImageChops
from rich.console import Console

from avatar_rl.cluster.telemetry.live_view import View
from avatar_rl.cluster.telemetry.run_files import read_metrics, read_status
from avatar_rl.cluster.telemetry.screen import Screen
from avatar_rl.cluster.view.rollouts import Rollouts, SampleFile
from tests.browser import DESKTOP, PHONE, Browser, browser

IMAGES = Path(__file__).parents[1] / "docs" / "images"
#: Of the steps of a picture of the live screen, and of the terminal it is drawn for.
LIVE_SHARE, COLUMNS = 0.6, 110


def main(run: Path) -> None:
    IMAGES.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "avatar_rl.cluster.cli", "view", str(run), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        address = next(line.strip() for line in server.stdout if "http://" in line)
        try:
            with browser() as page, tempfile.TemporaryDirectory() as folder:
                take_all(page, address.partition("#")[0], run, Path(folder))
        finally:
            server.terminate()
    for file in sorted(IMAGES.glob("*.png")):
        print(f"{file} {file.stat().st_size >> 10} KiB")


def take_all(page: Browser, address: str, run: Path, folder: Path) -> None:
    at = f"{address}#/run/{run.name}"
    chosen = f"{at}/rollouts?at={telling(run)}"
    page.resize(DESKTOP)
    page.open(at)
    page.until("document.querySelector('.chart')")
    take(page, "view-run", folder)
    page.open(at + "/steps")
    page.until("document.querySelector('.group .chip')")
    take(page, "view-steps", folder)
    for name, size, scale, dark in (
        ("view", DESKTOP, 1.0, False),
        ("view-dark", DESKTOP, 1.0, True),
        ("view-phone", PHONE, 1.5, False),
    ):
        page.resize(size, scale=scale, dark=dark)
        page.open("about:blank")
        page.open(chosen)
        page.until("document.querySelector('.rollout .token')")
        page.until("document.querySelector('.rollout video').readyState > 1")
        page.run("const v = document.querySelector('video'); v.currentTime = v.duration / 3")
        take(page, name, folder)
    page.resize((1440, 780))
    page.open("about:blank")
    page.open(f"{address}#/prompt/{visited(run)}?a={run.name}/&b={run.name}/")
    page.until("document.querySelectorAll('.visit .answer').length > 1")
    page.until("document.querySelector('.asked video').readyState > 1")
    take(page, "view-prompt", folder)
    page.resize((1100, 900))
    page.open((run / "report.html").resolve().as_uri())
    take(page, "report", folder)
    drawing = folder / "live.svg"
    drawing.write_text(live_screen(run))
    page.resize((1180, 520))
    page.open(drawing.as_uri())
    take(page, "live-screen", folder)


def take(page: Browser, name: str, folder: Path) -> None:
    """A picture with at most 256 colours: a third of the bytes, and the eye sees no difference."""
    time.sleep(1.0)  # images decode, fonts settle
    picture = Image.open(page.picture(folder / "picture.png")).convert("RGB")
    if name == "live-screen":  # the terminal without the page around it
        white = Image.new("RGB", picture.size, "white")
        picture = picture.crop(ImageChops.difference(picture, white).getbbox())
    few = picture.quantize(255, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    few.save(IMAGES / f"{name}.png", optimize=True)


def visited(run: Path) -> str:
    """The prompt with the most saved steps."""
    found: Counter[str] = Counter()
    for file in Rollouts(run).files():
        found.update({row.prompt_id for row in file.rows if not file.held_out and not row.replayed})
    return found.most_common(1)[0][0]


def telling(run: Path) -> str:
    """The address of a fresh completion that was right in a group with different rewards, late in
    the run."""
    rollouts = Rollouts(run)
    files = [file for file in rollouts.files() if not file.held_out]
    for file in reversed(files):
        for number in range(len(file.groups)):
            rows = rollouts.group(file.name, number) or []
            paid = [row["reward"] for row in rows if not row["replayed"]]
            for index, row in enumerate(rows):
                seen = {"video", "audio"} <= set(row["needs"]) and len(row["text"]) > 80
                if seen and row["advantage"] > 0.5 and max(paid) - min(paid) > 0.5:
                    return f"{file.name}/{number}/{index}"
    return first_of(files)


def first_of(files: list[SampleFile]) -> str:
    return f"{files[-1].name}/0/0" if files else ""


def live_screen(run: Path) -> str:
    """The live view as it stood part of the way through the run, as SVG."""
    rows, status = read_metrics(run), read_status(run)
    now = [status.started]
    screen = Screen(
        status.total_steps or len(rows),
        title=run.name,
        console=Console(file=io.StringIO()),
        clock=lambda: now[0],
    )
    for row in rows[: int(len(rows) * LIVE_SHARE)]:
        now[0] = row.pop("timestamp") or now[0]
        if row["step"] == 1:
            screen.phase("training")
        screen.update(row)
    console = Console(width=COLUMNS, height=40, record=True, file=io.StringIO())
    console.print(View(screen))
    return console.export_svg(title="avatar train")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
