"""distributions.png: what the advantages of a run looked like, and where in the completions the
loss was."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from avatar_rl.cluster.telemetry.plots import BLUE, ORANGE, STYLE
from avatar_rl.common.files import replaced_file
from avatar_rl.common.types import Json

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Row = Mapping[str, Json]
KINDS = (("fresh", BLUE), ("replay", ORANGE))


def total(rows: Sequence[Row], name: str) -> NDArray[np.float64] | None:
    """Sum of a distribution over the steps that have it; None without any."""
    found = [np.array(row[name], dtype=np.float64) for row in rows if name in row]
    return np.sum(found, axis=0) if found else None


def advantage_shares(rows: Sequence[Row], kind: str) -> NDArray[np.float64] | None:
    """Share of the ``kind``'s completions per bin of
    ``avatar_rl.learner.objective.step_metrics.ADVANTAGE_EDGES``."""
    counts = total(rows, f"advantages/{kind}")
    return counts / counts.sum() if counts is not None and counts.sum() else None


def loss_by_position(rows: Sequence[Row], kind: str) -> NDArray[np.float64] | None:
    """Mean absolute loss of a token per bin of its position in the completion; NaN where none
    fell."""
    loss, tokens = total(rows, f"position_loss/{kind}"), total(rows, f"position_tokens/{kind}")
    if loss is None or tokens is None:
        return None
    return np.divide(loss, tokens, out=np.full(len(loss), np.nan), where=tokens > 0)


def draw_distributions(rows: Sequence[Row], path: Path) -> Path | None:
    """Write the figure (PNG, 15 x 4 inches) of ``read_distributions``' rows; None where there are
    none."""
    if not rows:
        return None
    import matplotlib

    matplotlib.use("Agg", force=True)
    from matplotlib import pyplot as plt

    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, 2, figsize=(15, 4), layout="constrained")
        _advantages(axes[0], rows)
        _positions(axes[1], rows)
        with replaced_file(path) as beside:
            figure.savefig(beside, dpi=110, facecolor="white", format="png")
        plt.close(figure)
    return path


def _advantages(axis: Axes, rows: Sequence[Row]) -> None:
    for kind, colour in KINDS:
        if (shares := advantage_shares(rows, kind)) is not None:
            edges = np.linspace(-4, 4, len(shares) + 1)
            axis.stairs(shares, edges, fill=True, alpha=0.35, color=colour, label=kind)
            axis.stairs(shares, edges, color=colour, linewidth=1.5)
    axis.set(
        title="Advantages of all completions trained",
        xlabel="advantage",
        ylabel="share of completions",
    )
    axis.legend()


def _positions(axis: Axes, rows: Sequence[Row]) -> None:
    for kind, colour in KINDS:
        if (profile := loss_by_position(rows, kind)) is not None:
            places = (np.arange(len(profile)) + 0.5) / len(profile)
            axis.plot(places, profile, color=colour, marker="o", markersize=3, label=kind)
    axis.set(
        title="Loss by position",
        xlabel="position in the completion",
        ylabel="mean |loss| of a token",
    )
    axis.set(xlim=(0, 1), ylim=(0, None))
    axis.legend()
