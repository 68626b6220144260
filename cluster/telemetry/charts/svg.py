"""A chart as SVG: lines, dots with whiskers, and a sentence for each place that is pointed at."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from markupsafe import Markup

WIDTH, HEIGHT = 420, 190
LEFT, RIGHT, TOP, BOTTOM = 44, 10, 10, 22
#: Points of a line that are drawn; a longer one is thinned evenly.
MOST_POINTS = 240
#: Places that say their values.
MOST_PLACES = 60


@dataclass(frozen=True)
class Line:
    """``points`` (x, y) by x. ``tone`` is a number of the page's palette. ``faint`` stands behind
    the others and says nothing. ``whiskers`` (x, low, high) make dots of it."""

    name: str
    points: Sequence[tuple[float, float]]
    tone: int
    faint: bool = False
    whiskers: Sequence[tuple[float, float, float]] = ()


@dataclass(frozen=True)
class Panel:
    """A chart. ``x`` names its horizontal axis; a ``share`` runs from 0 to 1."""

    title: str
    lines: Sequence[Line] = field(default_factory=tuple)
    x: str = "step"
    share: bool = False
    note: str = ""

    @property
    def empty(self) -> bool:
        return not any(line.points for line in self.lines)


class _Frame:
    """From values to places of the drawing."""

    def __init__(self, panel: Panel) -> None:
        xs = [x for line in panel.lines for x, _ in line.points]
        ys = [y for line in panel.lines for _, y in line.points]
        ys += [end for line in panel.lines for _, *ends in line.whiskers for end in ends]
        self.x0, self.x1 = min(xs), max(xs)
        self.y0, self.y1 = min(ys), max(ys)
        if panel.share:
            self.y0, self.y1 = min(0.0, self.y0), max(1.0, self.y1)
        if self.x0 == self.x1:
            self.x1 += 1
        if self.y0 == self.y1:
            self.y0, self.y1 = self.y0 - (abs(self.y0) or 1), self.y1 + (abs(self.y1) or 1)
        if not panel.share:
            room = 0.06 * (self.y1 - self.y0)
            self.y0, self.y1 = self.y0 - room, self.y1 + room

    def x(self, value: float) -> float:
        part = (value - self.x0) / (self.x1 - self.x0)
        return round(LEFT + part * (WIDTH - LEFT - RIGHT), 1)

    def y(self, value: float) -> float:
        part = (value - self.y0) / (self.y1 - self.y0)
        return round(HEIGHT - BOTTOM - part * (HEIGHT - TOP - BOTTOM), 1)


def draw(panel: Panel) -> Markup:
    """The chart with title and legend as a ``figure``; without any point it says so."""
    shown = [line for line in panel.lines if line.points]
    legend = Markup("").join(
        Markup('<span class="tone-{}">{}</span>').format(line.tone, line.name)
        for line in shown
        if not line.faint
    )
    head = Markup("<figcaption><b>{}</b><span>{}</span></figcaption>").format(panel.title, legend)
    body = _drawing(panel, shown) if shown else Markup('<p class="soft">no data</p>')
    note = Markup('<p class="soft">{}</p>').format(panel.note) if panel.note else Markup("")
    return Markup('<figure class="chart">{}{}{}</figure>').format(head, body, note)


def _drawing(panel: Panel, lines: Sequence[Line]) -> Markup:
    frame = _Frame(panel)
    parts = [*_grid(frame, panel)]
    parts += [
        part
        for line in sorted(lines, key=lambda line: not line.faint)
        for part in _line(frame, line)
    ]
    parts += _places(frame, panel, lines)
    said = "; ".join(
        f"{line.name} {number(line.points[0][1])} to {number(line.points[-1][1])}"
        for line in lines
        if not line.faint
    )
    return Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        WIDTH, HEIGHT, f"{panel.title}: {said}", Markup("").join(parts)
    )


def _grid(frame: _Frame, panel: Panel) -> list[Markup]:
    rule = Markup('<line class="grid" x1="{}" x2="{}" y1="{}" y2="{}"/>')
    text = Markup('<text x="{}" y="{}" text-anchor="{}">{}</text>')
    found = []
    for value in ticks(frame.y0, frame.y1, 4):
        y = frame.y(value)
        found.append(rule.format(LEFT, WIDTH - RIGHT, y, y))
        found.append(text.format(LEFT - 6, y + 3.5, "end", number(value)))
    for value in ticks(frame.x0, frame.x1, 5):
        found.append(text.format(frame.x(value), HEIGHT - 6, "middle", number(value)))
    if panel.x != "step":
        found.append(text.format(WIDTH - RIGHT, TOP + 2, "end", panel.x))
    return found


def _line(frame: _Frame, line: Line) -> list[Markup]:
    points = thinned(line.points, MOST_POINTS)
    path = "".join(
        f"{'L' if i else 'M'}{frame.x(x)} {frame.y(y)}" for i, (x, y) in enumerate(points)
    )
    kind = "faint" if line.faint else "line"
    found = [Markup('<path class="{} tone-{}" d="{}"/>').format(kind, line.tone, path)]
    for x, low, high in line.whiskers:
        whisker = Markup('<line class="line tone-{}" x1="{}" x2="{}" y1="{}" y2="{}"/>')
        at = frame.x(x)
        found.append(whisker.format(line.tone, at, at, frame.y(low), frame.y(high)))
    dots = points if line.whiskers or len(points) < 2 else points[-1:]
    if not line.faint:
        dot = Markup('<circle class="dot tone-{}" cx="{}" cy="{}" r="2.6"/>')
        found += [dot.format(line.tone, frame.x(x), frame.y(y)) for x, y in dots]
    return found


def _places(frame: _Frame, panel: Panel, lines: Sequence[Line]) -> list[Markup]:
    """Strips over the chart with the values there as their tooltip."""
    known = sorted({x for line in lines for x, _ in line.points})
    chosen = [x for x, _ in thinned([(x, 0.0) for x in known], MOST_PLACES)]
    half = (WIDTH - LEFT - RIGHT) / max(1, len(chosen)) / 2
    strip = Markup(
        '<rect class="place" x="{}" y="{}" width="{}" height="{}"><title>{}</title></rect>'
    )
    found = []
    for x in chosen:
        values = []
        for line in lines:
            near = [y for at, y in line.points if at <= x]
            if near and not line.faint:
                bounds = next(((low, high) for at, low, high in line.whiskers if at == x), None)
                extra = f" [{number(bounds[0])}, {number(bounds[1])}]" if bounds else ""
                values.append(f"{line.name} {number(near[-1])}{extra}")
        left = max(float(LEFT), frame.x(x) - half)
        said = f"{panel.x} {number(x)}: {', '.join(values)}"
        height = HEIGHT - TOP - BOTTOM
        found.append(strip.format(round(left, 1), TOP, round(2 * half, 1), height, said))
    return found


def thinned(points: Sequence[tuple[float, float]], most: int) -> list[tuple[float, float]]:
    """At most ``most`` of the points, first and last included."""
    if len(points) <= most:
        return list(points)
    return [points[round(i * (len(points) - 1) / (most - 1))] for i in range(most)]


def ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers between the two, some ``about`` of them."""
    size = 10.0 ** math.floor(math.log10((high - low) / about))
    step = next(m * size for m in (1, 2, 2.5, 5, 10) if m * size >= (high - low) / about)
    first = math.ceil(low / step - 1e-9)
    count = math.floor(high / step + 1e-9) - first + 1
    return [round((first + i) * step, 12) for i in range(count)]


def number(value: float) -> str:
    """Short: 3 significant digits, thousands with commas."""
    if value == round(value) and abs(value) < 1e7:
        return f"{value:,.0f}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"
