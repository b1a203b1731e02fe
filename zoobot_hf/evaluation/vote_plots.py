"""The figure of predicted votes: expected against observed vote fractions, a panel for each question.

In the style of `plots`: a PNG that is readable in grey, made without pyplot's global state.
"""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from zoobot_hf.models.votes import tree_layout

from .plots import FONT_SIZE, PAGE_WIDTH, SMALL_FONT_SIZE, save_figure, shown_name
from .vote_metrics import asked_by_question

COLUMNS = 4  # panels in a row
BINS = 10
LEAST_GALAXIES = 5  # in a bin, for its mean to be drawn
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LINES = ("-", "--", ":", "-.")
LEAST_WIDTH = 2.4  # inches, of a figure with one panel
LEFT = 0.4  # inches, of the width, for what stands beside the first column
ABOVE_AND_BELOW = 0.65  # inches, of the height, for what stands above the first row and below the last
# From one galaxy on, the cells differ from the paper, and none is as dark as a line.
COUNTS = LinearSegmentedColormap.from_list("counts", ["0.87", "0.7"])

Floats = npt.NDArray[np.float64]


def plot_vote_fractions(
    concentrations: npt.ArrayLike,
    votes: npt.ArrayLike,
    decision_tree: dict[str, Any],
    path: str | Path,
    *,
    least_votes: int = 10,
) -> None:
    """Draw the vote fractions that volunteers gave against those that were expected, a panel for each question.

    The grey cells count galaxies and answers. A line for each answer joins the mean observed fractions of the galaxies
    in each tenth of expected fractions, with their standard errors; on the diagonal, expectations are right on average.

    Args:
        concentrations: What a model predicts, (galaxies, answers).
        votes: Counts, (galaxies, answers), NaN where they are missing.
        decision_tree: The survey's questions as plain values, as a model's configuration holds them.
        path: Where the PNG is written; its folder is made.
        least_votes: How many votes on a question a galaxy needs to be drawn.

    Raises:
        ValueError: The shapes are not the tree's, or no galaxy has enough votes on any question.
    """
    layout = tree_layout(decision_tree)
    counts = np.asarray(votes, dtype=np.float64)
    if counts.ndim != 2 or counts.shape[1] != len(layout.vote_columns) or np.shape(concentrations) != counts.shape:
        raise ValueError(
            f"concentrations have the shape {np.shape(concentrations)} and votes {counts.shape}; pass (galaxies, "
            f"{len(layout.vote_columns)}) for both: the decision tree's answers."
        )
    asked = asked_by_question(np.asarray(concentrations), counts, layout, least_votes=least_votes)
    panels = [
        (question, own) for question, (_, own) in zip(decision_tree["questions"], asked, strict=True) if len(own.votes)
    ]
    if not panels:
        raise ValueError(f"no galaxy has {least_votes} votes on any question; pass votes, or a smaller least_votes.")
    columns = min(COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    width = max(LEAST_WIDTH, PAGE_WIDTH * columns / COLUMNS)
    height = rows * (width - LEFT) / columns + ABOVE_AND_BELOW
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for panel in axes.ravel()[len(panels) :]:
        panel.set_axis_off()
    for panel, (question, own) in zip(axes.ravel(), panels, strict=False):
        _draw_question(panel, question, expected=own.predicted_fractions, observed=own.observed_fractions)
    _label_outer_axes(figure, axes, count=len(panels))
    save_figure(figure, path)


def _draw_question(panel: Axes, question: dict[str, Any], *, expected: Floats, observed: Floats) -> None:
    panel.hexbin(
        expected.ravel(),
        observed.ravel(),
        gridsize=20,
        extent=(0, 1, 0, 1),
        bins="log",
        mincnt=1,
        cmap=COUNTS,
        linewidths=0,
    )
    panel.plot([0, 1], [0, 1], color="0.5", linewidth=0.6)
    for number, answer in enumerate(question["answers"]):
        centers, means, errors = _binned_means(expected[:, number], observed[:, number])
        shade = str(0.55 * number / max(len(question["answers"]) - 1, 1))
        panel.errorbar(
            centers,
            means,
            errors,
            label=shown_name(answer["name"]),
            color=shade,
            marker=MARKERS[number % len(MARKERS)],
            linestyle=LINES[number % len(LINES)],
            markersize=2.5,
            linewidth=0.8,
            elinewidth=0.6,
        )
    galaxies = f"{len(expected)} {'galaxy' if len(expected) == 1 else 'galaxies'}"
    panel.set_title(f"{shown_name(question['name'])}\n{galaxies}", fontsize=SMALL_FONT_SIZE, pad=3)
    panel.legend(fontsize=SMALL_FONT_SIZE - 1.5, frameon=False, loc="upper left", handlelength=2, labelspacing=0.2)
    panel.set(xlim=(0, 1), ylim=(0, 1), xticks=[0, 0.5, 1], yticks=[0, 0.5, 1], aspect="equal")
    panel.tick_params(labelsize=SMALL_FONT_SIZE)


def _binned_means(expected: Floats, observed: Floats) -> tuple[list[float], list[float], list[float]]:
    """The mean expected and observed fraction of each bin with enough galaxies, and the latter's standard error."""
    bins = np.minimum((expected * BINS).astype(np.int64), BINS - 1)
    chosen = [bins == number for number in range(BINS) if (bins == number).sum() >= LEAST_GALAXIES]
    errors = [float(observed[is_in].std(ddof=1) / np.sqrt(is_in.sum())) for is_in in chosen]
    means = [(float(expected[is_in].mean()), float(observed[is_in].mean())) for is_in in chosen]
    return [center for center, _ in means], [mean for _, mean in means], errors


def _label_outer_axes(figure: Figure, axes: npt.NDArray[Any], *, count: int) -> None:
    columns = axes.shape[1]
    for number, panel in enumerate(axes.ravel()[:count]):
        # The lowest panel of a column has the numbers, also where the last row has fewer panels.
        panel.tick_params(labelbottom=number + columns >= count, labelleft=number % columns == 0)
    figure.supxlabel("Expected vote fraction", fontsize=FONT_SIZE)
    figure.supylabel("Observed vote fraction", fontsize=FONT_SIZE)
