"""One picture of a run: a few test episodes before and after adaptation, and the learning curve."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fastmaml.data import TaskBatch
from fastmaml.files import write_atomically

if TYPE_CHECKING:
    from fastmaml.training import Evaluation

RIGHT = "#1a9850"
WRONG = "#d73027"
BEFORE = "#9aa5b1"
AFTER = "#1f6feb"
TEXT = "#24292f"
MUTED = "#57606a"
GAP = 0.7
QUERIES = 10


def draw_figure(
    path: str | Path,
    title: str,
    batch: TaskBatch,
    before: Tensor,
    after: Tensor,
    history: list[dict[str, float]],
    result: Evaluation,
) -> None:
    """Write the picture to `path` as a PNG.

    Args:
        path: the file to write, atomically.
        title: a line above everything.
        batch: the episodes to show, one shot: support_x `[T, ways, 1, H, W]`.
        before: predictions `[T, N, ways]` for the queries with the meta-parameters.
        after: the same after adaptation.
        history: points with `iteration`, `before` and `after` (accuracies from 0 to 1).
        result: the final evaluation.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    tasks = len(batch.support_x)
    height = 1.3 + 1.55 * tasks
    figure = Figure(figsize=(13, height), dpi=150, facecolor="white")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(
        tasks,
        2,
        width_ratios=[1.8, 1],
        left=0.02,
        right=0.98,
        top=1 - 0.95 / height,
        bottom=0.75 / height,
        wspace=0.1,
        hspace=0.1,
    )
    figure.text(0.022, 1 - 0.38 / height, title, fontsize=16, fontweight="bold", color=TEXT)
    for task in range(tasks):
        axes = figure.add_subplot(grid[task, 0])
        choices = before[task].argmax(dim=-1), after[task].argmax(dim=-1)
        _draw_episode(axes, [part[task] for part in batch], choices, heading=task == 0)
    _draw_curve(figure.add_subplot(grid[:, 1]), history, result)
    write_atomically(path, lambda file: figure.savefig(file, format="png"))


def _draw_episode(
    axes: Any, episode: list[Tensor], choices: tuple[Tensor, Tensor], heading: bool
) -> None:
    """Support on the left; on the right each query above its predicted classes' support images."""
    support_x, support_y, query_x, query_y = episode
    ways = len(support_x)
    shown = _pick(query_y, QUERIES)
    example = {int(label): support_x[i] for i, label in enumerate(support_y)}
    for column in range(ways):
        _draw_image(axes, support_x[column], column, 1)
    for column, query in enumerate(shown, start=ways):
        left = column + GAP
        _draw_image(axes, query_x[query], left, 0)
        for row, choice in enumerate(choices, start=1):
            colour = RIGHT if choice[query] == query_y[query] else WRONG
            _draw_image(axes, example[int(choice[query])], left, row, colour)
    _label_episode(axes, ways, len(shown), heading)


def _pick(labels: Tensor, count: int) -> list[int]:
    """At most `count` queries, taking the classes in turn."""
    seen: dict[int, int] = {}
    rank = []
    for index, label in enumerate(labels.tolist()):
        seen[label] = seen.get(label, 0) + 1
        rank.append((seen[label], index))
    return [index for _, index in sorted(rank)[:count]]


def _draw_image(axes: Any, image: Tensor, left: float, row: int, colour: str | None = None) -> None:
    from matplotlib.patches import Rectangle

    margin = 0.07
    low, high = left + margin, left + 1 - margin
    ink = image.reshape(image.shape[-2:]).cpu().numpy()
    axes.imshow(
        ink / max(float(ink.max()), 1e-6),
        cmap="Greys",
        vmin=0,
        vmax=1.1,
        extent=(low, high, row + 1 - margin, row + margin),
        interpolation="lanczos",
    )
    size = 1 - 2 * margin
    edge, width = (colour, 2.2) if colour else ("#d0d7de", 0.8)
    axes.add_patch(
        Rectangle((low, row + margin), size, size, fill=False, edgecolor=edge, linewidth=width)
    )


def _label_episode(axes: Any, ways: int, queries: int, heading: bool) -> None:
    axes.set_xlim(-0.05, ways + GAP + QUERIES + 1.6)
    axes.set_ylim(3.02, -0.02)
    axes.set_aspect("equal")
    axes.set_anchor("W")
    axes.axis("off")
    if heading:
        axes.text(0.07, 0.9, "the only example of each class", color=MUTED, fontsize=10)
    right = ways + GAP + queries + 0.12
    for row, text in enumerate(("to be read", "before", "after")):
        axes.text(right, row + 0.5, text, va="center", color=MUTED, fontsize=10)


def _draw_curve(axes: Any, history: list[dict[str, float]], result: Evaluation) -> None:
    iterations = [point["iteration"] for point in history]
    for key, colour, above in (("after", AFTER, False), ("before", BEFORE, True)):
        values = [100 * point[key] for point in history]
        axes.plot(iterations, values, color=colour, linewidth=2, marker="o", markersize=3)
        latest = values[len(values) // 2 :]
        axes.annotate(
            f"{key} adaptation\n{getattr(result, key)}",
            (0.97, max(latest) if above else min(latest)),
            xycoords=("axes fraction", "data"),
            xytext=(0, 10 if above else -10),
            textcoords="offset points",
            ha="right",
            va="bottom" if above else "top",
            color=MUTED if above else colour,
            fontsize=12,
            fontweight="bold",
        )
    axes.set_ylim(0, 101)
    axes.set_xlim(left=0)
    axes.set_xlabel(
        f"meta-updates\ncurves: validation classes; numbers: {result.tasks} test tasks", color=MUTED
    )
    axes.set_title("query accuracy on classes never trained on, %", color=TEXT, fontsize=11)
    axes.grid(axis="y", color="#eaeef2")
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(length=0, colors=MUTED)
