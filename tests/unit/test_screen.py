"""The screen: right numbers, nothing missing breaks it, at any width and on any console."""

from __future__ import annotations

import io
import math
from pathlib import Path

import pytest
from rich.console import Console

from avatar_rl.cluster.telemetry.live_view import LiveScreen, View, held_up_by, sparkline
from avatar_rl.cluster.telemetry.phase_times import PhaseTimes
from avatar_rl.cluster.telemetry.screen import Screen, duration

STEP = {
    "reward/mean": 0.7,
    "reward/std": 0.2,
    "accuracy/moving": 0.58,
    "kl/reference": 0.01,
    "kl/behaviour": 0.001,
    "staleness/mean": 0.8,
    "staleness/max": 1.0,
    "replay/share": 0.5,
    "rollout/tokens_per_s": 1203.0,
    "learner/tokens_per_s": 2311.0,
    "time/step": 2.0,
    "time/learner_wait": 0.5,
    "time/rollout_wait": 0.1,
    "version": 12.0,
    "tiers/easy": 100.0,
    "tiers/medium": 200.0,
    "tiers/hard": 300.0,
    "buffer/stored": 600.0,
    "groups/dead_before": 0.5,
    "groups/dead_after": 0.1,
    "completions/generated": 384.0,
    "hints/active": 2.0,
}


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def make(
    width: int = 100, live: bool = False, encoding: str = "utf-8"
) -> tuple[Screen, io.TextIOWrapper, Clock]:
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    console = Console(
        file=file,
        width=width,
        height=45,
        force_terminal=live,
        color_system=None,
        legacy_windows=False,
    )
    clock = Clock()
    kind = LiveScreen if live else Screen
    return kind(120, console=console, clock=clock, title="run-1"), file, clock


def shown(file: io.TextIOWrapper) -> str:
    file.flush()
    assert isinstance(file.buffer, io.BytesIO)
    return file.buffer.getvalue().decode(file.encoding)


def train(screen: Screen, clock: Clock, steps: int = 12) -> None:
    screen.phase("starting vLLM", "1 engine")
    clock.now += 20
    screen.update({"step": 0, "eval/accuracy": 0.52})
    screen.phase("training")
    for step in range(1, steps + 1):
        clock.now += 2
        screen.update({**STEP, "step": step})
    screen.update({"eval/accuracy": 0.61})
    screen.event("version 12 published")


def view(screen: Screen) -> str:
    with screen.console.capture() as capture:
        screen.console.print(View(screen))
    return capture.get()


def test_plain_output_is_one_short_line_per_step() -> None:
    screen, file, clock = make(width=40)
    with screen:
        train(screen, clock)
    lines = shown(file).splitlines()
    steps = [line for line in lines if "step " in line]
    assert len(steps) == 12 and len({line.index("reward") for line in steps}) == 1
    assert max(len(line) for line in lines) <= 120
    assert (
        "step  12/120" in steps[-1] and "eval 0.52" in steps[-1] and "wait L 25% R  5%" in steps[-1]
    )
    assert steps[-1].endswith("eta 3:36")  # 108 steps left, 2 s each
    assert "held-out accuracy 0.610 (+0.090 since the start)" in lines[-2]
    assert lines[-1].endswith("! version 12 published")


@pytest.mark.parametrize("width", [24, 40, 60, 80, 100, 140, 300])
def test_live_view_fits_any_width(width: int) -> None:
    screen, _, clock = make(width=width, live=True)
    train(screen, clock)
    text = view(screen)
    assert max(len(line) for line in text.splitlines()) <= width
    assert "training" in text


def test_live_view_shows_the_numbers() -> None:
    screen, _, clock = make(width=100, live=True)
    train(screen, clock)
    text = view(screen)
    for piece in (
        "0.520 to 0.610  +0.090",
        "0.700 ± 0.200",
        "lag 0.8, max 1",
        "50% replayed",
        "1,203 tok/s, waits 5%",
        "2,311 tok/s, waits 25%",
        "held up by   rollouts",
        "600 stored, hints on 2",
        "step 12/120  ETA 3:36",
        "Easy 100  Medium 200  Hard 300",
        "version 12 published",
        "starting vLLM 0:20",
    ):
        assert piece in text, piece


def test_nothing_is_required_of_the_metrics() -> None:
    for name in [None, *STEP]:
        screen, _, clock = make(live=True)
        screen.update({})
        assert "starting" in view(screen)
        screen.phase("training")
        part = {key: value for key, value in STEP.items() if key != name} if name else {}
        screen.update({**part, "step": 1, "reward/mean": math.nan, "loss/total": None})
        assert "0:00" in view(screen)
        assert math.nan not in screen.metrics.values()
        del clock


def test_an_ascii_console_is_served() -> None:
    screen, file, clock = make(live=True, encoding="ascii")
    with screen:
        train(screen, clock)
        screen.event("prompt 视频 failed")
    assert "50% replayed" in shown(file) and "prompt ?? failed" in shown(file)


def test_phases_progress_and_their_throttle() -> None:
    screen, file, clock = make()
    screen.start()
    screen.progress(1, 2)  # before any phase: nothing to advance
    screen.phase("cold start", "tiny model")
    for step in range(1, 101):
        clock.now += 1
        screen.progress(step, 100, f"loss {1 / step:.2f}")
    screen.phase("cold start", "exporting")  # same phase, new detail: no new line
    screen.stop()
    lines = [line[9:] for line in shown(file).splitlines()]
    assert lines[0] == "cold start: tiny model"
    assert [line.split()[2] for line in lines[1:]] == [
        "15/100",
        "30/100",
        "45/100",
        "60/100",
        "75/100",
        "90/100",
        "100/100",
    ]
    screen.phase("training")
    screen.progress(64, 64)  # an evaluation beside the training
    assert shown(file).splitlines()[-1].endswith("training")
    live, _, clock = make(live=True)
    live.phase("cold start")
    live.progress(50, 200, "loss 0.4")
    clock.now = 75
    assert "cold start  1:15  50/200  loss 0.4" in view(live)


def test_interrupt_gives_the_terminal_back() -> None:
    screen, file, _ = make(live=True)
    with pytest.raises(KeyboardInterrupt), screen:
        screen.phase("training")
        raise KeyboardInterrupt
    screen.stop()
    text = shown(file)
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 1  # cursor hidden once, shown once
    assert screen.phases[-1].ended is not None


def test_the_live_view_has_a_buffer_of_its_own_and_leaves_its_last_frame() -> None:
    screen, file, clock = make(live=True)
    with screen:
        train(screen, clock)
    text = shown(file)
    opened, closed = text.index("\x1b[?1049h"), text.rindex("\x1b[?1049l")
    assert opened < closed and "step 12/120" in text[closed:]


def test_the_run_is_named_before_anything_else() -> None:
    for live in (False, True):
        screen, file, _ = make(live=live)
        screen.run(Path("runs/toy-20260101-000000-000000"))
        said = view(screen) if live else shown(file)
        assert "toy-20260101-000000-000000" in said


def test_an_empty_tier_is_explained_and_more_is_shown_where_there_is_room() -> None:
    screen, _, clock = make(live=True)
    train(screen, clock)
    assert "is empty" not in view(screen)
    screen.update({"tiers/hard": 0.0, "lr": 2e-4, "grad_norm": 1.5, "memory/host": 3.25})
    text = view(screen)
    assert "Hard is empty: no prompt stands below" in text
    assert "lr 0.0002  grad 1.5  host 3.2 GiB" in text
    screen.console.height = 20
    assert "grad 1.5" not in view(screen)


def test_markup_in_events_is_text() -> None:
    screen, file, _ = make()
    screen.event("prompt [bold]x[/nothing] failed")
    assert "[bold]x[/nothing]" in shown(file)
    live, _, _ = make(live=True)
    live.event("prompt [bold]x[/nothing] failed")
    assert "[bold]x[/nothing]" in view(live)


def test_a_resumed_run_counts_its_pace_from_its_own_steps() -> None:
    screen, _, clock = make()
    for step in (101, 102, 103):
        screen.update({"step": step})
        clock.now += 3
    assert screen.eta_s == 17 * 3


def test_small_formats() -> None:
    assert [duration(value) for value in (None, 0, 75, 3700)] == ["-", "0:00", "1:15", "1:01:40"]
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8) == "▁▂▃▄▅▆▇█"
    assert sparkline([1, 1, 1], 8) == "▁▁▁"
    assert sparkline([0, 0, 8, 8], 2) == "▁█"
    assert [
        held_up_by(*waits) for waits in ((0.3, 0.1), (0.1, 0.3), (0.01, 0.02), (None, 0.2))
    ] == [
        "rollouts",
        "the learner",
        "neither side",
        "-",
    ]


def test_a_phase_that_counts_shows_when_it_ends() -> None:
    screen, file, clock = make()
    with screen:
        screen.phase("cold start", "100 steps")
        clock.now += 40  # its processes start: no part of the pace
        for done in range(10, 60, 10):
            screen.progress(done, 100)
            clock.now += 5
        assert screen.phases[-1].eta_s(clock.now - 5) == pytest.approx(25)
    lines = shown(file).splitlines()
    assert "eta" not in lines[1]  # one point gives no pace
    assert lines[-1].endswith("cold start 40/100  eta 0:30  100 steps")


def test_the_pace_is_that_of_the_last_half_minute() -> None:
    screen, _, clock = make(live=True)
    screen.phase("cold start")
    for seconds in [1.0] * 20 + [10.0] * 10:  # it slows down to a tenth
        clock.now += seconds
        screen.progress(screen.phases[-1].done + 1, 100)
    assert screen.phases[-1].eta_s(clock.now) == pytest.approx(700)
    assert "30/100  ETA 11:40" in view(screen)


def test_a_phase_that_cannot_count_takes_as_long_as_before(tmp_path: Path) -> None:
    kept = tmp_path / "cache" / "times.json"
    for expected in ("", " (about 0:20)"):
        times = PhaseTimes(kept, "local", {"exporting": 3.0})
        screen, file, clock = make()
        screen.times = times
        with screen:
            screen.phase("starting actors", "1 vLLM")
            clock.now += 8
            left = screen.phases[-1].eta_s(clock.now)
            assert left == (None if not expected else 12.0)
            clock.now += 12
            screen.phase("exporting")
        first, last = shown(file).splitlines()
        assert first.endswith("starting actors: 1 vLLM" + expected)
        assert last.endswith("exporting (about 0:03)")
    assert PhaseTimes(kept, "other").expected("starting actors") is None
    kept.write_text('{"local": {"starting actors": "soon"}, "torn": 3')
    assert PhaseTimes(kept, "local").expected("starting actors") is None
    kept.write_text('{"local": {"starting actors": "soon"}, "torn": 3}')
    assert PhaseTimes(kept, "local").expected("starting actors") is None


def test_phase_times_that_cannot_be_kept_cost_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    times = PhaseTimes(tmp_path / "file" / "times.json", "local")
    times.learn("exporting", 2.0)
    assert times.expected("exporting") == 2.0
