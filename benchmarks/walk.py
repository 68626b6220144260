"""A newcomer's walk: every command that README and the tutorials print, run as printed ->
build/bench/walk.json; run with ``make bench NAME=walk``, some ten minutes on two cores.

A page's blocks of shell run in order, in a folder that looks like a fresh clone, each in a bash of
its own page. Comments before a block say what is special about it:

    <!-- walk: file NAME -->       what follows is saved under this name
    <!-- walk: fails -->           the block's last command must not succeed
    <!-- walk: stopped -->         it is ended from outside: any exit code
    <!-- walk: server -->          it serves until it is interrupted
    <!-- walk: prints -->          every line that follows is in the output of the block before
    <!-- walk: not here: WHY -->   it is listed and not run

``--smoke`` leaves out what trains, and what looks at a run that was not trained.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from benchmarks.harness import Figures, parser

ROOT = Path(__file__).parents[1]
PAGES = (
    "docs/tutorials/own-reward.md",
    "docs/tutorials/own-data.md",
    "docs/tutorials/own-model.md",
    "docs/tutorials/resume.md",
    "docs/tutorials/scale.md",
    "docs/tutorials/read-a-run.md",
    "README.md",
)
BLOCK = re.compile(
    r"(?:^<!-- walk: (?P<mark>[^\n]*?) -->\n+)?^```(?P<language>\w*)\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
MARKS = ("file ", "fails", "stopped", "server", "prints", "not here: ")
#: What a reader of README has at hand, and what is taken in its place.
AT_HAND = {"<id>": "$(ls runs | grep look-2 | tail -1)", "my_dataset.jsonl": "colours/train.jsonl"}
#: Commands of README that are walked elsewhere.
ELSEWHERE = {
    "make demo": "it is measured of its own (docs/benchmarks.md, demo)",
    "make test": "this walk's smoke run is one of its tests",
    "avatar train recipes/curriculum_local.yaml": "tests/integration/test_curriculum_run.py",
    "avatar train recipes/local.yaml --learner.optimizer.lr 1e-4": "the tutorials train shorter",
    "avatar init mine.yaml": "it asks on a terminal: tests/unit/test_init.py",
    "avatar scale runs/": "docs/tutorials/scale.md scales a run that is under way",
    "avatar view  ": "docs/tutorials/read-a-run.md starts the server",
    "avatar train recipes/local.yaml --resume auto": "docs/tutorials/resume.md",
}
#: A block with one of these needs a run, or loads a processor: left out of the smoke run.
TRAINS = re.compile(
    r"avatar (train (?!.*--dry-run)|evaluate|runs)|\bruns\b|\bshared\b|\$!|--recipe"
)
LIMIT_S, SERVER_S = 420, 60


@dataclass
class Block:
    page: str
    line: int
    language: str
    text: str
    mark: str = ""

    @property
    def where(self) -> str:
        return f"{self.page}:{self.line}"


@dataclass
class Walked:
    """What came of a page, or of all of them."""

    ran: int = 0
    commands: int = 0
    lines_found: int = 0
    faults: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    slowest: tuple[float, str] = (0.0, "")


def main() -> None:
    own = parser(__doc__)
    own.add_argument("--pages", nargs="*", default=PAGES, help="only these")
    arguments = own.parse_args()
    figures = Figures("walk", arguments.out)
    walked = Walked()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="walk-") as folder:
        clone(Path(folder))
        for page in arguments.pages:
            walk(page, Path(folder), walked, smoke=arguments.smoke)
    for line in walked.left_out:
        print(f"not run: {line}")
    for line in walked.faults:
        print(f"FAULT {line}")
    figures.add({"pages": len(arguments.pages), "blocks": walked.ran})
    figures.add({"commands": walked.commands, "lines_found": walked.lines_found})
    figures.add({"not_run": len(walked.left_out), "faults": len(walked.faults)})
    figures.add({"seconds": time.monotonic() - began, "slowest_s": walked.slowest[0]})
    print(f"slowest: {walked.slowest[1]}")
    figures.write()
    if walked.faults:
        sys.exit(1)


def clone(folder: Path) -> None:
    """What git has of this tree, with the environment that is set up here. Its own ``avatar_rl``
    is the one in use: a second copy in the current folder would be refused."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    for name in filter(None, listed.stdout.decode().split("\0")):
        source, target = ROOT / name, folder / name
        if not name.startswith("avatar_rl/") and (source.is_symlink() or source.is_file()):
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target, follow_symlinks=False)
    (folder / ".venv").symlink_to(Path(sys.prefix))


def blocks(page: str) -> Iterator[Block]:
    """Fenced blocks of a page in order. Raises ValueError for a mark that is none."""
    text = (ROOT / page).read_text(encoding="utf-8")
    for found in BLOCK.finditer(text):
        mark = found["mark"] or ""
        if mark and not mark.startswith(MARKS):
            raise ValueError(f"{page}: no such mark: walk: {mark}")
        line = text.count("\n", 0, found.start("language")) + 1
        yield Block(page, line, found["language"], found["text"], mark)


def walk(page: str, folder: Path, walked: Walked, *, smoke: bool) -> None:
    output: str | None = ""
    shell = Shell(folder)
    try:
        for block in blocks(page):
            if block.mark.startswith("file "):
                (folder / block.mark.removeprefix("file ")).write_text(block.text)
            elif block.mark == "prints":
                if output is not None:
                    look_for(block, output, walked)
            elif block.language == "bash":
                own = line_by_line(block, walked) if page == "README.md" else [block]
                for part in own:
                    output = run_block(part, shell, walked, smoke=smoke)
    finally:
        shell.close()


def run_block(block: Block, shell: Shell, walked: Walked, *, smoke: bool) -> str | None:
    """The block's output; None where it was left out."""
    if block.mark.startswith("not here: "):
        why = block.mark.removeprefix("not here: ")
        walked.left_out += [f"{block.where}: {line} ({why})" for line in commands(block.text)]
        return None
    text = block.text
    for placeholder, there in AT_HAND.items():
        text = text.replace(placeholder, there)
    if not commands(text) or (smoke and TRAINS.search(text)):
        return None
    print(f"-- {block.where}\n{text}", flush=True)
    began = time.monotonic()
    code, output = shell.serve(text) if block.mark == "server" else shell.run(text)
    seconds = time.monotonic() - began
    walked.ran += 1
    walked.commands += len(commands(text))
    walked.slowest = max(walked.slowest, (round(seconds, 1), block.where))
    print(f"{output[-1500:]}\n-- exit code {code}, {seconds:.1f} s", flush=True)
    wanted = {"": code == 0, "server": code == 0, "fails": code not in (0, None)}
    if not wanted.get(block.mark, code is not None) or "Traceback (most recent" in output:
        walked.faults.append(f"{block.where}: exit code {code}: {output[-600:]}")
    return output


def look_for(block: Block, output: str, walked: Walked) -> None:
    """Every line that the page shows is in what the block before printed."""
    for line in block.text.splitlines():
        if squeezed(line) in squeezed(output):
            walked.lines_found += 1
        else:
            walked.faults.append(f"{block.where}: {line!r} is not in {output!r}")


def line_by_line(block: Block, walked: Walked) -> Iterator[Block]:
    """README's list of commands one by one, without those that are walked elsewhere."""
    for number, line in enumerate(block.text.splitlines(keepends=True)):
        elsewhere = next((why for start, why in ELSEWHERE.items() if start in line), None)
        own = replace(block, line=block.line + 1 + number, text=line)
        if elsewhere is None:
            yield own
        elif line.strip():
            walked.left_out.append(f"{own.where}: {line.split('#')[0].strip()} ({elsewhere})")


def commands(text: str) -> list[str]:
    """Lines that begin a command: none that go on with one, no comments, nothing in a heredoc."""
    found, inside, more = [], "", False
    for line in text.splitlines():
        if inside:
            inside = "" if line == inside else inside
        else:
            if line.strip() and not line.startswith("#") and not more:
                found.append(line)
            more = line.endswith("\\") or line.count('"') % 2 == 1
            here = re.search(r"<<'(\w+)'", line)
            inside = here[1] if here else ""
    return found


def squeezed(text: str) -> str:
    """Without the breaks that a terminal's width makes."""
    return re.sub(r"\s+", " ", text).strip()


class Shell:
    """One bash for a page, so that variables and jobs last from block to block."""

    END = "walk-end-of-block"

    def __init__(self, folder: Path) -> None:
        environment = os.environ | {"COLUMNS": "160", "PS1": "", "OMP_NUM_THREADS": "1"}
        environment.pop("PYTHONPATH", None)
        self.folder = folder
        self.log = folder / "walk.log"
        self.process = subprocess.Popen(
            ["bash", "-m"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env=environment,
            text=True,
            start_new_session=True,
        )

    def run(self, text: str) -> tuple[int | None, str]:
        """Exit code and output of a block; no code where it took too long."""
        self.log.write_text("")
        self._say(f"{{\n{text}\n}} >> walk.log 2>&1 < /dev/null; echo {self.END} $? >> walk.log\n")
        deadline = time.monotonic() + LIMIT_S
        while time.monotonic() < deadline:
            output = self.log.read_text(errors="replace")
            if end := re.search(rf"^{self.END} (\d+)$", output, re.MULTILINE):
                return int(end[1]), output[: end.start()]
            time.sleep(0.1)
        return None, self.log.read_text(errors="replace") + f"\nnot done within {LIMIT_S} s"

    def serve(self, text: str) -> tuple[int | None, str]:
        """A server: 0 once it has printed its address and ended on an interrupt."""
        process = subprocess.Popen(
            ["bash", "-c", f"exec {text.strip()} --port 0"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=self.folder,
            text=True,
        )
        assert process.stdout is not None
        said = ""
        for line in process.stdout:
            said += line
            if "http://" in line:
                break
        process.send_signal(signal.SIGINT)
        process.wait(SERVER_S)
        return 0 if "http://" in said else process.returncode, said

    def _say(self, words: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(words)
        self.process.stdin.flush()

    def close(self) -> None:
        """End the shell and the jobs that are its own."""
        assert self.process.stdin is not None
        if self.process.poll() is None:
            self._say("kill $(jobs -p) 2> /dev/null; exit\n")
        self.process.stdin.close()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)


if __name__ == "__main__":
    main()
