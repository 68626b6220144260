"""Figures of a report as files, all in one style."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from avatar_rl.cluster.telemetry.plots import STYLE


class Drawing(NamedTuple):
    """One file; ``paint`` is given an array of its ``panels`` side by side."""

    name: str
    size: tuple[float, float]  # inches
    paint: Callable[[Any], None]
    panels: int = 1
    sharey: bool = True


def draw_all(drawings: Iterable[Drawing], folder: Path) -> list[Path]:
    """``folder/NAME.png`` of each; the same bytes from the same numbers. Returns the files."""
    import matplotlib

    matplotlib.use("Agg", force=True)
    from matplotlib import pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    for one in drawings:
        with plt.rc_context(STYLE):
            figure, axes = plt.subplots(
                1, one.panels, figsize=one.size, layout="constrained", sharey=one.sharey
            )
            one.paint(np.atleast_1d(axes))
            path = folder / f"{one.name}.png"
            figure.savefig(path, dpi=90, facecolor="white", metadata={"Software": None})
            plt.close(figure)
        drawn.append(path)
    return drawn
