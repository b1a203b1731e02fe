"""The figures about probabilities: reliability, completeness and purity, ROC, label curves.

Each is written twice, as a PNG at 200 dpi and as a PDF beside it, at the width of a journal's column, and is readable
in grey: lines differ in style and marker. Intervals are those of the tables, 90% unless these were made with another.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .plots import COLUMN_WIDTH, FONT_SIZE, SMALL_FONT_SIZE, save_figure, shown_name
from .power_law import Extrapolation
from .reliability import BINS, reliability_table
from .selection import Selection, selection_curve, weigh_galaxies

STYLES = (("-", "o"), ("--", "s"), (":", "^"))
GREYS = ("black", "0.45", "0.25", "0.6")


def plot_reliability(
    probability: npt.ArrayLike,
    has_label: npt.ArrayLike,
    path: str | Path,
    *,
    label: str,
    population: str,
    bins: int = BINS,
) -> None:
    """Draw the share of galaxies with a label against the probability that was said, and how often it was said.

    Args:
        probability: Of the label, 0-1, (n,), for the galaxies that are drawn.
        has_label: Whether each galaxy has it, (n,).
        path: Where the PNG is written, a PDF beside it; the folder is made.
        label: Its name.
        population: What galaxies these are, for the title: "test set, as labelled".
        bins: How many bins of equal numbers of galaxies.

    Raises:
        ValueError: What `reliability_table` refuses.
    """
    table = reliability_table(probability, has_label, bins=bins)
    figure = Figure(figsize=(COLUMN_WIDTH, 3.9), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    upper.plot([0, 1], [0, 1], color="0.6", linewidth=0.8, linestyle="--", label="Calibrated")
    shares = table[["share", "share_low", "share_high"]]
    words = f"{len(np.asarray(probability))} galaxies, {len(table)} bins"
    _draw_intervals(upper, table["mean_probability"], shares, color="black", marker="o", label=words)
    upper.set_ylim(-0.03, 1.03)
    name = shown_name(label)
    upper.set_ylabel(f"Share that is {name}", fontsize=FONT_SIZE)
    upper.legend(fontsize=SMALL_FONT_SIZE, frameon=False, loc="upper left")
    upper.set_title(population, fontsize=SMALL_FONT_SIZE, loc="left", pad=3)
    given, truth = np.asarray(probability), np.asarray(has_label) == 1
    edges = np.linspace(0, 1, 21)
    lower.hist(given, edges, color="0.8", label="all")
    lower.hist(given[truth], edges, histtype="step", color="black", linewidth=0.9, label=name)
    lower.set_yscale("symlog", linthresh=1)
    lower.set_ylim(0, 15 * max(np.histogram(given, edges)[0].max(), 1))  # room for the legend
    lower.set_ylabel("Galaxies", fontsize=FONT_SIZE)
    lower.set_xlabel(f"Probability of {name}", fontsize=FONT_SIZE)
    lower.legend(fontsize=SMALL_FONT_SIZE, frameon=False, ncols=2)
    lower.set_xlim(-0.02, 1.02)
    _save(figure, [upper, lower], path)


def plot_completeness_and_purity(
    probability: npt.ArrayLike,
    has_label: npt.ArrayLike,
    path: str | Path,
    *,
    label: str,
    prevalence: float | Sequence[float] | None = None,
    classes: npt.ArrayLike | None = None,
    selection: Selection | None = None,
) -> None:
    """Draw completeness and purity against the threshold, at a prevalence that the title names.

    Args:
        probability: Of the label, 0-1, (n,), as the model gives it to a survey.
        has_label: Whether each galaxy has it, (n,).
        path: Where the PNG is written, a PDF beside it; the folder is made.
        label: Its name.
        prevalence: As in `choose_threshold`.
        classes: As in `choose_threshold`.
        selection: Marked with its intervals; nothing is marked when absent.

    Raises:
        ValueError: What `weigh_galaxies` refuses, or `selection_curve`.
    """
    share, weights, _ = weigh_galaxies(has_label, prevalence=prevalence, classes=classes)
    curve = selection_curve(probability, has_label, weights=weights)
    figure = Figure(figsize=(COLUMN_WIDTH, 2.6), layout="constrained")
    panel = figure.subplots()
    # A threshold selects the galaxies from it on, so that a step is at a galaxy's probability and holds below it.
    steps = np.append(0.0, np.unique(probability))
    for name, values, colour, linestyle in (
        ("Completeness", curve.completeness, "black", "-"),
        ("Purity", curve.purity, "0.45", "--"),
    ):
        heights = np.append(values, values[-1])[::-1]
        panel.step(steps, heights, where="pre", color=colour, linewidth=1.1, linestyle=linestyle, label=name)
    if selection is not None:
        panel.axvline(selection.threshold, color="0.7", linewidth=0.8, linestyle="-.", zorder=0)
        for estimate, colour, marker in ((selection.completeness, "black", "o"), (selection.purity, "0.45", "s")):
            error = [[estimate.value - estimate.low], [estimate.high - estimate.value]]
            panel.errorbar(
                selection.threshold, estimate.value, error, color=colour, marker=marker, markersize=3.5, capsize=2
            )
    whose = "of these galaxies" if prevalence is None else "in the sky"
    panel.set_title(f"{shown_name(label)}: {share:.3g} {whose}", fontsize=SMALL_FONT_SIZE, loc="left", pad=3)
    # The probabilities of what is rare are small: as far as they go, and not on to 1.
    panel.set_xlim(0, min(1, 1.1 * float(np.max(probability))))
    panel.set_ylim(0, 1.04)
    panel.set_xlabel("Threshold in the probability", fontsize=FONT_SIZE)
    panel.set_ylabel("Completeness, purity", fontsize=FONT_SIZE)
    panel.legend(fontsize=SMALL_FONT_SIZE, frameon=False)
    _save(figure, [panel], path)


def plot_roc_and_precision_recall(
    probability: npt.ArrayLike,
    has_label: npt.ArrayLike,
    path: str | Path,
    *,
    label: str,
    prevalence: float | Sequence[float] | None = None,
    classes: npt.ArrayLike | None = None,
) -> None:
    """Draw completeness against the false positive rate (ROC), and purity against completeness (precision-recall).

    Args:
        probability: Of the label, 0-1, (n,).
        has_label: Whether each galaxy has it, (n,).
        path: Where the PNG is written, a PDF beside it; the folder is made.
        label: Its name.
        prevalence: As in `choose_threshold`.
        classes: As in `choose_threshold`.

    Raises:
        ValueError: What `weigh_galaxies` refuses, or `selection_curve`.
    """
    share, weights, _ = weigh_galaxies(has_label, prevalence=prevalence, classes=classes)
    curve = selection_curve(probability, has_label, weights=weights)
    completeness, rate = np.append(0.0, curve.completeness), np.append(0.0, curve.false_positive_rate)
    figure = Figure(figsize=(COLUMN_WIDTH, 5.2), layout="constrained")
    upper, lower = figure.subplots(2, 1)
    upper.plot([0, 1], [0, 1], color="0.6", linewidth=0.8, linestyle="--", label="Guessing")
    upper.plot(rate, completeness, color="black", linewidth=1.1, label=f"Area {curve.roc_auc:.3f}")
    upper.set_xlabel("False positive rate", fontsize=FONT_SIZE)
    upper.set_ylabel("Completeness", fontsize=FONT_SIZE)
    lower.axhline(share, color="0.6", linewidth=0.8, linestyle="--", label=f"Guessing: {share:.3g}")
    lower.step(
        completeness,
        np.append(curve.purity[0], curve.purity),
        where="pre",
        color="black",
        linewidth=1.1,
        label=f"Average precision {curve.average_precision:.3f}",
    )
    lower.set_xlabel("Completeness", fontsize=FONT_SIZE)
    whose = "of these galaxies" if prevalence is None else "in the sky"
    lower.set_ylabel("Purity", fontsize=FONT_SIZE)
    lower.set_title(f"{shown_name(label)}: {share:.3g} {whose}", fontsize=SMALL_FONT_SIZE, loc="left", pad=3)
    for panel, place in ((upper, "lower right"), (lower, "best")):
        panel.set_xlim(-0.02, 1.02)
        panel.set_ylim(-0.02, 1.04)
        panel.legend(fontsize=SMALL_FONT_SIZE, frameon=False, loc=place)
    _save(figure, [upper, lower], path)


def plot_completeness_by_column(
    table: pd.DataFrame, path: str | Path, *, name: str, unit: str = "", threshold: float | None = None
) -> None:
    """Draw completeness along a catalog's column, with the numbers of galaxies that it was measured on.

    Args:
        table: From `completeness_by_column`.
        path: Where the PNG is written, a PDF beside it; the folder is made.
        name: What the column is: "r-band magnitude".
        unit: Its unit; a number without one when absent.
        threshold: For the title; none when absent.

    Raises:
        ValueError: The table has no row.
    """
    if len(table) == 0:
        raise ValueError("table has no row; make it with completeness_by_column.")
    figure = Figure(figsize=(COLUMN_WIDTH, 3.2), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    middle, half = (table["low"] + table["high"]) / 2, (table["high"] - table["low"]) / 2
    shares = table[["completeness", "completeness_low", "completeness_high"]]
    _draw_intervals(upper, middle, shares, xerr=half, color="black", linestyle="none", marker="o")
    upper.set_ylim(-0.03, 1.05)
    upper.set_ylabel("Completeness", fontsize=FONT_SIZE)
    if threshold is not None:
        upper.set_title(f"Threshold {threshold:.3g}", fontsize=SMALL_FONT_SIZE, loc="left", pad=3)
    widths = table["high"] - table["low"]
    lower.bar(middle, table["galaxies"], widths, color="0.85", edgecolor="0.4", linewidth=0.6, label="labelled")
    lower.bar(
        middle,
        table["selected"],
        widths,
        color="none",
        edgecolor="black",
        hatch="////",
        linewidth=0.6,
        label="selected",
    )
    lower.set_ylim(top=1.5 * max(table["galaxies"].max(), 1))
    lower.set_ylabel("Galaxies", fontsize=FONT_SIZE)
    lower.legend(fontsize=SMALL_FONT_SIZE, frameon=False, ncols=2, loc="upper center")
    lower.set_xlabel(f"{name} [{unit}]" if unit else name, fontsize=FONT_SIZE)
    _save(figure, [upper, lower], path)


def plot_label_curves(
    table: pd.DataFrame, path: str | Path, *, scores: Mapping[str, str], extrapolation: Extrapolation | None = None
) -> None:
    """Draw several scores against the number of labelled galaxies of each class, one below the other.

    Args:
        table: A row for each point: `series` (its name), `score` (that of the score), `labels` (galaxies of each
            class), `value`, `low` and `high`; the last two NaN where there is no interval.
        path: Where the PNG is written, a PDF beside it; the folder is made.
        scores: For each score to draw its name on the axis, from the top down.
        extrapolation: Of 1 - the first score: its law is drawn, and what it says stands above; none when absent.

    Raises:
        ValueError: The table lacks a score.
    """
    unknown = [score for score in scores if score not in set(table["score"])]
    if unknown:
        raise ValueError(f"scores name {unknown[0]!r}; the table has {', '.join(map(str, table['score'].unique()))}.")
    figure = Figure(figsize=(COLUMN_WIDTH, 1.9 * len(scores) + 0.7), layout="constrained")
    panels = figure.subplots(len(scores), 1, sharex=True, squeeze=False).ravel().tolist()
    for panel, (score, name) in zip(panels, scores.items(), strict=True):
        _draw_label_curves(panel, table[table["score"] == score], list(table["series"].unique()))
        panel.set_ylabel(name, fontsize=FONT_SIZE)
    handles, names = panels[0].get_legend_handles_labels()
    if extrapolation is not None:
        numbers = np.geomspace(table["labels"].min(), table["labels"].max(), 100)
        handles += panels[0].plot(numbers, 1 - extrapolation.law(numbers), color="0.7", linewidth=0.8, zorder=0)
        names.append("Power law")
        sentence = fill(extrapolation.describe(next(iter(scores.values())).lower()), 58)
        panels[0].set_title(sentence[0].upper() + sentence[1:], fontsize=SMALL_FONT_SIZE, loc="left", pad=3)
    figure.legend(handles, names, fontsize=SMALL_FONT_SIZE, frameon=False, ncols=2, loc="outside upper center")
    panels[-1].set_xlabel("Labelled galaxies of each class", fontsize=FONT_SIZE)
    _save(figure, panels, path)


def _draw_label_curves(panel: Axes, table: pd.DataFrame, names: Sequence[str]) -> None:
    for number, name in enumerate(names):
        points = table[table["series"] == name].sort_values("labels")
        linestyle, marker = STYLES[number % len(STYLES)]
        # A little apart, or the intervals of one number of labels cover each other.
        numbers = points["labels"] * 1.04 ** (number - (len(names) - 1) / 2)
        _draw_intervals(
            panel,
            numbers,
            points[["value", "low", "high"]],
            color=GREYS[number % len(GREYS)],
            markerfacecolor="white" if number % 2 else None,
            label=name,
            linestyle=linestyle,
            marker=marker,
        )
    ticks = sorted(table["labels"].unique())
    panel.set_xscale("log")
    panel.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    panel.minorticks_off()


def _draw_intervals(panel: Axes, places: pd.Series, estimates: pd.DataFrame, **style: Any) -> None:
    """Points with error bars from columns with the value, low and high; no bar where there is no interval."""
    value, low, high = estimates.to_numpy(dtype=np.float64).T
    errors = np.nan_to_num([value - low, high - value])
    panel.errorbar(places, value, errors, markersize=3.5, linewidth=1, elinewidth=0.8, capsize=2, **style)


def _save(figure: Figure, panels: Sequence[Axes], path: str | Path) -> None:
    for panel in panels:
        panel.tick_params(labelsize=FONT_SIZE)
    save_figure(figure, path, with_pdf=True)
