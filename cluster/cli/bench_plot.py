"""One bar chart as a PNG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from isotherm.cluster.errors import IsothermError


class PlotError(IsothermError, RuntimeError):
    """matplotlib is not there."""


def plot_bars(path: Path, title: str, labels: Sequence[str], values: Sequence[float], unit: str) -> None:
    """Horizontal bars, the first on top. Raises PlotError without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        raise PlotError("--plot needs matplotlib; install it with: pip install 'isotherm[bench]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 0.4 * len(labels) + 1.2), layout="constrained")
    bars = axes.barh(range(len(labels)), values)
    axes.bar_label(bars, [f"{v:.0f}" for v in values], padding=3)
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()
    axes.set_xlabel(unit)
    axes.set_title(title)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
