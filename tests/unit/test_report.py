"""The report: right headline and tables, everything escaped, runs of any state and completeness."""

from __future__ import annotations

import html.parser
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from avatar_rl.cluster.telemetry.charts.intervals import wilson
from avatar_rl.cluster.telemetry.charts.svg import (
    BOTTOM,
    HEIGHT,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    Line,
    Panel,
    draw,
    number,
    ticks,
)
from avatar_rl.cluster.telemetry.plots import (
    calm_limit,
    series,
    smooth,
    waiting_shares,
    with_completions,
)
from avatar_rl.cluster.telemetry.report import (
    Change,
    changes,
    final_values,
    folded,
    headline,
    ledger,
    tier_history,
    timing,
    write_report,
)
from avatar_rl.cluster.telemetry.run_folder import RunFolder
from avatar_rl.common.errors import DataError

EVIL = "<script>alert('x')</script><img src=x onerror=alert(1)>"


class Page(html.parser.HTMLParser):
    """Tags, attributes and text of the report, as a browser would split them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.sources: list[str] = []
        self.pieces: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "img", "br", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.pieces.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.pieces).split())


def answer(prompt: str, accuracy: float) -> dict[str, Any]:
    return {
        "prompt_id": prompt,
        "question": f"Question {prompt} {EVIL}",
        "answer": EVIL,
        "text": f"{EVIL} {accuracy}",
        "category": EVIL,
        "needs": ["audio"],
        "accuracy": accuracy,
        "components": {EVIL: 1.0, "judge": None},
    }


def make_run(path: Path, state: str = "finished") -> Path:
    run = RunFolder(path, total_steps=3)
    run.config({"name": EVIL, "buffer": {"password": "hunter2"}})
    counts = {"eval/prompts": 200, f"eval/prompts/{EVIL}": 20, "eval/prompts_needing/audio": 60}
    run.metrics(
        0,
        {"eval/accuracy": 0.52, f"eval/accuracy/{EVIL}": 0.4, "eval/needs/audio": 0.3, **counts},
    )
    run.samples(0, [answer("a", 1.0), answer("b", 0.0)], kind="eval")
    for step in (1, 2, 3):
        run.metrics(
            step,
            {
                "reward/mean": 0.1 * step,
                "accuracy/train": 0.2 * step,
                "time/step": 2.0,
                "time/learner_wait": 0.5,
                "tiers/easy": step,
                "tiers/medium": 2 * step,
                "tiers/hard": 3 * step,
                "completions/generated": 32 * step,
                f"mine/{EVIL}": 1.0,
                "ledger/generated": 8 * step,
                "ledger/trained_fresh": 8 * step - 3,
                "ledger/replay_only": 1,
                "ledger/dropped": 1,
                "ledger/in_flight": 1,
            },
        )
        run.distributions(
            step,
            {
                "advantages/fresh": [0, 8, 0],
                "position_loss/fresh": [4, 1],
                "position_tokens/fresh": [2, 0],
            },
        )
    run.samples(3, [{"prompt_id": "t", "text": EVIL, "reward": 0.5, "components": {"format": 1.0}}])
    run.metrics(3, {"eval/accuracy": 0.74, f"eval/accuracy/{EVIL}": 0.7, "eval/needs/audio": 0.25})
    run.samples(3, [answer("a", 1.0), answer("b", 1.0)], kind="eval")
    run.event(EVIL, EVIL)
    run.status(state=state, error=EVIL if state == "failed" else None)
    run.close()
    return path


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Page]:
    run = make_run(tmp_path_factory.mktemp("runs") / "a", state="failed")
    report = write_report(run)
    assert report == run / "report.html"
    assert (run / "plot.png").read_bytes().startswith(b"\x89PNG\r\n")
    text = report.read_text(encoding="utf-8")
    return text, Page(text)


def test_headline_and_tables_are_on_the_page(page: tuple[str, Page]) -> None:
    text = page[1].text
    for piece in (
        "Held-out accuracy 0.52 to 0.74 (+0.22)",
        "20 0.40 [0.22, 0.61] 0.70 [0.48, 0.85] +0.30",
        "60 0.30 [0.20, 0.43] 0.25 [0.16, 0.37] -0.05",
        "200 held-out prompts: 95 % intervals [0.45, 0.59] and [0.68, 0.80].",
        "The ledger closes at step 3",
        "generated 24",
        "learner wait 0.500 25 %",
        "judge masked",
        "failed; this report covers the steps until then",
        "Outside the catalogue: mine/",
    ):
        assert piece in text, piece


def test_nothing_from_a_completion_becomes_markup(page: tuple[str, Page]) -> None:
    source, parsed = page
    assert "script" not in parsed.tags and "img" not in parsed.tags and not parsed.open
    assert parsed.tags.count("svg") >= 6
    assert (
        parsed.text.count("alert('x')") >= 8
    )  # shown as text: category, question, answer, completion, event, config
    assert "hunter2" not in source


def test_the_page_needs_no_other_file(page: tuple[str, Page]) -> None:
    assert page[1].sources == []
    assert "http://" not in page[0] and "https://" not in page[0]


def test_changed_answers_come_first(page: tuple[str, Page]) -> None:
    assert page[1].text.index("Question b") < page[1].text.index("Question a")


def test_an_interrupted_run_is_reported(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "a", total_steps=100)
    run.metrics(1, {"accuracy/train": 0.25})
    with open(run.path / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 2, "acc')
    with open(run.path / "events.jsonl", "ab") as file:
        file.write(b'{"kind": "act')
    text = Page(write_report(run.path).read_text()).text
    run.close()
    assert "Training accuracy 0.25 to 0.25; no held-out evaluation" in text
    assert "setting up, still under way" in text and "1 of 100" in text


def test_a_run_without_a_single_step_is_reported(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "a")
    run.close()
    assert "No accuracy was measured" in Page(write_report(run.path).read_text()).text


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"metrics\.jsonl does not exist"):
        write_report(tmp_path)


def test_headline_with_one_evaluation() -> None:
    assert (
        headline([{"step": 0.0, "eval/accuracy": 0.5}]) == "Held-out accuracy 0.50, measured once"
    )
    assert (
        headline([{"eval/accuracy": 0.5}, {"eval/accuracy": 0.4}])
        == "Held-out accuracy 0.50 to 0.40 (-0.10)"
    )


def test_changes_are_first_to_last_largest_gain_first() -> None:
    rows: list[dict[str, float | None]] = [
        {"eval/needs/audio": 0.1, "eval/needs/video": 0.5, "eval/needs/late": None},
        {"eval/needs/audio": 0.2, "eval/needs/video": None},
        {"eval/needs/audio": 0.5, "eval/needs/video": 0.4, "eval/needs/late": 0.9},
    ]
    found = changes(rows, "eval/needs/<modality>")
    assert found == [
        Change("audio", 0.1, 0.5),
        Change("late", 0.9, None),
        Change("video", 0.5, 0.4),
    ]


def test_a_change_is_clear_where_the_intervals_are_apart() -> None:
    assert Change("a", 0.4, 0.9, 20).is_clear and not Change("a", 0.4, 0.6, 20).is_clear
    assert Change("a", 0.4, 0.6, 2000).is_clear
    assert Change("a", 0.4, 0.6).is_clear  # of an older release, which does not say how many
    assert Change("a", 0.4, 0.6).intervals == [] and not Change("a", 0.4, None, 20).is_clear


def test_the_intervals_are_wilsons() -> None:
    """Against values of Agresti and Coull's paper and of R's prop.test(correct = FALSE)."""
    assert wilson(0.5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert wilson(0.0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)
    assert wilson(1.0, 20) == pytest.approx((0.8389, 1.0), abs=1e-4)
    assert wilson(0.9, 200) == pytest.approx((0.8506, 0.9343), abs=1e-4)


def test_completions_that_are_alike_are_told_once() -> None:
    rows: list[Any] = [
        {"text": "a", "reward": 1.0, "replayed": False},
        {"text": "b", "reward": 1.0, "replayed": False},
        {"text": "a", "reward": 1.0, "replayed": False},
        {"text": "a", "reward": 0.5, "replayed": False},  # a judge that changed its mind
        {"text": "a", "reward": 1.0, "replayed": True},
    ]
    found = [(one["row"]["text"], one["count"]) for one in folded(rows)]
    assert found == [("a", 2), ("b", 1), ("a", 1), ("a", 1)]


def test_a_chart_draws_its_points_and_says_them() -> None:
    line = Line(EVIL, [(0, 0.0), (10, 1.0)], 0, whiskers=[(10, 0.8, 1.0)])
    drawn = str(draw(Panel(f"Accuracy {EVIL}", [line], share=True)))
    page = Page(drawn)
    assert not page.open and "script" not in page.tags
    assert f'd="M{LEFT}.0 {HEIGHT - BOTTOM}.0L{WIDTH - RIGHT}.0 {TOP}.0"' in drawn
    assert f"step 10: {EVIL} 1 [0.8, 1]" in page.text
    assert page.tags.count("rect") == 2
    assert "no data" in draw(Panel("x", [Line("y", [], 0)]))
    long = Line("y", [(i, float(i)) for i in range(5000)], 0)
    assert len(draw(Panel("x", [long]))) < 20_000
    for flat in ([(3, 2.0)], [(3, 0.0), (4, 0.0)]):
        assert "NaN" not in draw(Panel("x", [Line("y", flat, 0)]))


def test_round_numbers_stand_at_the_axes() -> None:
    assert ticks(0.0, 1.0, 4) == [0, 0.25, 0.5, 0.75, 1]
    assert ticks(-0.03, 0.21, 4) == [0, 0.1, 0.2]
    assert ticks(0, 160, 5) == [0, 50, 100, 150]
    assert [number(value) for value in (2000.0, 0.25, 1234.5, 3.0, 1e-7)] == [
        "2,000",
        "0.25",
        "1,234",
        "3",
        "1e-07",
    ]


def test_ledger_gap_is_told() -> None:
    row: dict[str, float | None] = {
        "step": 7,
        "ledger/generated": 10,
        "ledger/trained_fresh": 4,
        "ledger/replay_only": 1,
        "ledger/dropped": 1,
        "ledger/in_flight": 2,
    }
    found = ledger([row, {"step": 8}])
    assert found is not None and (found["gap"], found["step"]) == (2, 7)
    partial = ledger([{"step": 1, "ledger/generated": 3}])
    assert partial is not None and partial["gap"] is None
    assert ledger([{"step": 1}]) is None


def test_timing_and_tier_history() -> None:
    rows: list[dict[str, float | None]] = [
        {
            "step": n,
            "time/step": 2.0,
            "time/publish": 0.1 * n,
            "tiers/easy": n,
            "tiers/medium": 0,
            "tiers/hard": 1,
        }
        for n in range(1, 102)
    ]
    publish = next(entry for entry in timing(rows) if entry[0] == "time/publish")
    assert publish[2] == pytest.approx(5.1) and publish[3] == pytest.approx(2.55)
    assert [row["step"] for row in tier_history(rows)] == [1, 21, 41, 61, 81, 101]


def test_plot_series() -> None:
    rows: list[dict[str, float | None]] = [
        {"step": 0, "eval/accuracy": 0.5},
        {
            "step": 1,
            "completions/generated": 32,
            "time/step": 2,
            "time/learner_wait": 3,
            "time/rollout_wait": 0.5,
        },
        {"step": 2, "eval/accuracy": 0.7, "time/step": 0, "time/learner_wait": 1},
    ]
    assert series(rows, "eval/accuracy") == ([0, 2], [0.5, 0.7])
    assert series(with_completions(rows), "eval/accuracy", "completions/generated") == (
        [0, 32],
        [0.5, 0.7],
    )
    assert waiting_shares(rows)[1] == {"step": 1, "learner": 1.0, "rollout": 0.25}
    assert waiting_shares(rows)[2]["learner"] is None
    assert smooth([0, 3, 6, 3], 3) == [1.5, 3, 4, 4.5]
    assert smooth([0, 3, 600, 3], 3, median) == [1.5, 3, 3, 301.5]


def test_only_spikes_bend_the_axis() -> None:
    assert calm_limit([0.01 * i for i in range(1, 101)]) is None
    assert calm_limit([0.1] * 100 + [1800.0]) == 0.2
    assert calm_limit([]) is None and calm_limit([0.0] * 5) is None


def test_rows_of_a_run_begun_by_an_older_release_are_reported() -> None:
    rows = [{"step": 1.0, "time/hold": 2.0, "loss/total": 0.5}]
    assert [name for name, *_ in final_values(rows)] == ["step", "loss/total"]
