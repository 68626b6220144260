"""How long `avatar view` makes people wait: a run with 5,000 saved rollouts in headless Chromium.

`paint_s` is the first contentful paint after the navigation began, `list_s` the rollouts being
there; `_cold` is the first look after the server's start, which reads all samples. `clip_s` runs
from the click on a rollout whose group was never opened to a frame of its clip that plays."""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.harness import Figures, parser
from tests.browser import DESKTOP, Browser, browser
from tests.view_runs import make_run, video_file

STEPS, GROUPS, TOKENS, ROUNDS = 25, 25, 200, 7
LISTED = "document.querySelectorAll('.row').length > 5"
PLAYED = """
const [row, done] = [document.getElementById(arguments[0]), arguments[arguments.length - 1]];
const before = document.querySelector('.rollout video'), began = performance.now();
row.click();
(function look() {
  const video = document.querySelector('.rollout video');
  if (!video || video === before) return requestAnimationFrame(look);
  video.muted = true;
  video.play().then(() => video.requestVideoFrameCallback(() =>
    done((performance.now() - began) / 1000)));
})();
"""


def main() -> None:
    arguments = parser(__doc__).parse_args()
    steps, groups, rounds = (2, 5, 1) if arguments.smoke else (STEPS, GROUPS, ROUNDS)
    figures = Figures("view", arguments.out)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        clip = video_file(folder / "media" / "clip.mp4")
        media = [{"kind": "video", "uri": str(clip), "frames": 8}]
        make_run(folder / "runs", "run", steps=steps, groups=groups, media=media, tokens=TOKENS)
        figures.add({"rollouts": steps * groups * 8 + 3})
        size = sum(file.stat().st_size for file in folder.rglob("samples/*.jsonl"))
        figures.add({"samples_mb": size / 1e6})
        with browser() as page:
            page.resize(DESKTOP)
            measure(page, folder / "runs", rounds, figures)
    figures.write()


def measure(page: Browser, runs: Path, rounds: int, figures: Figures) -> None:
    """Cold starts with a server each, then warm looks and clips at the last one."""
    cold: list[tuple[float, float]] = []
    for number in range(rounds):
        command = [sys.executable, "-m", "avatar_rl.cluster.cli", "view", "--folder", str(runs)]
        with subprocess.Popen([*command, "--port", "0"], stdout=subprocess.PIPE, text=True) as it:
            try:
                assert it.stdout is not None
                address = next(line.strip() for line in it.stdout if "http://" in line)
                cold.append(look(page, address))
                if number == rounds - 1:
                    warm = [look(page, address) for _ in range(rounds)]
                    clips = [play(page, address, which) for which in range(rounds)]
            finally:
                it.terminate()
    figures.add({"paint_s_cold": statistics.median(paint for paint, _ in cold)})
    figures.add({"list_s_cold": statistics.median(seconds for _, seconds in cold)})
    figures.add({"paint_s": statistics.median(paint for paint, _ in warm)})
    figures.add({"list_s": statistics.median(seconds for _, seconds in warm)})
    figures.add({"clip_s": statistics.median(clips), "clip_s_max": max(clips)})


def look(page: Browser, address: str) -> tuple[float, float]:
    """Seconds to the first contentful paint and to the list."""
    page.open("about:blank")
    began = time.monotonic()
    page.open(address + "#/run/run/rollouts")
    page.until(LISTED, 60)
    seconds = time.monotonic() - began
    paints = "performance.getEntriesByName('first-contentful-paint')"
    page.until(f"{paints}.length")
    return float(page.run(f"return {paints}[0].startTime / 1000")), seconds


def play(page: Browser, address: str, which: int) -> float:
    """Seconds from the click on a rollout of a group of its own to its first frame."""
    page.open("about:blank")
    page.open(address + f"#/run/run/rollouts?q=shape+{which}+move")
    page.until("document.querySelector('.row')")
    page.until("document.querySelector('.rollout video')")
    return float(page.driver.execute_async_script(PLAYED, "row-5"))


if __name__ == "__main__":
    main()
