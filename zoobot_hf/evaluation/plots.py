"""The figures of a model card: training curves, the galaxies that were most wrong, the confusion table.

Every figure is a PNG at 200 dpi that is readable in grey: lines differ in style and marker, not in colour alone.
Figures are made as objects, without pyplot's global state, so that any thread or notebook can make them.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.textpath import TextPath
from matplotlib.ticker import MaxNLocator
from PIL import Image

DOTS_PER_INCH = 200
COLUMN_WIDTH = 3.3  # inches: a column of MNRAS, 84 mm; those of AAS journals and of A&A are a little wider
PAGE_WIDTH = 7.1  # inches: both columns
FONT_SIZE = 8
SMALL_FONT_SIZE = 6
TITLE_LINE_HEIGHT = 0.1  # inches, for a line of SMALL_FONT_SIZE
LONGEST_NAME = 26  # characters: of the questions of all surveys one is longer

LossHistory = Sequence[Mapping[str, Any]]


def plot_training_curves(
    history: Mapping[str, LossHistory],
    path: str | Path,
    *,
    kept_stage: str | None = None,
    kept_epoch: float | None = None,
) -> None:
    """Draw the losses and, where they were measured, accuracy and ROC AUC by epoch, one stage after the other.

    Args:
        history: The name of each stage, in the order they ran, and its `TrainerState.log_history`: records with `epoch`
            and `loss` (training) or `eval_loss`, `eval_accuracy` and `eval_roc_auc` (validation).
        path: Where the PNG is written; its folder is made.
        kept_stage: The stage whose model was kept; None draws no mark.
        kept_epoch: The epoch of that stage, counted from its own start, whose model was kept.

    Raises:
        ValueError: When no record holds a loss, or when `kept_stage` is not in `history`.
    """
    curves = _joined_curves(history)
    if not (curves["loss"] or curves["eval_loss"]):
        raise ValueError("history holds no loss; pass each stage's TrainerState.log_history after training.")
    if kept_stage is not None and kept_stage not in history:
        raise ValueError(f"kept_stage is {kept_stage!r}; choose one of {', '.join(history)}.")
    scored = bool(curves["eval_accuracy"] or curves["eval_roc_auc"])
    figure = Figure(figsize=(COLUMN_WIDTH, 4.2 if scored else 2.4), layout="constrained")
    panels = figure.subplots(2 if scored else 1, 1, sharex=True, squeeze=False).ravel().tolist()
    _draw_losses(panels[0], curves)
    if scored:
        _draw_scores(panels[1], curves)
    starts = _stage_starts(history)
    if kept_stage is not None and kept_epoch is not None:
        _mark_kept_epoch(panels, starts[kept_stage] + kept_epoch)
    _draw_stages(panels, starts)
    _save(figure, path)


def plot_most_wrong(images: Sequence[Image.Image], table: pd.DataFrame, path: str | Path, *, count: int = 24) -> None:
    """Draw the galaxies whose true label was given the lowest probability, the worst first; no more than are wrong.

    Args:
        images: The images in the order of the table's rows, for example a dataset's `image` column. Only those that are
            drawn are read.
        table: A row per galaxy with `id_str`, `label` (the true one, a name), `predicted_label` (a name) and
            `probability_of_label` (of the true label, after softmax, 0-1).
        path: Where the PNG is written; its folder is made.
        count: How many galaxies are drawn at most.

    Raises:
        ValueError: When the table lacks one of these columns, when it has not as many rows as images, or when no galaxy
            is wrong.
    """
    missing = [name for name in ("id_str", "label", "predicted_label", "probability_of_label") if name not in table]
    if missing:
        raise ValueError(f"table lacks the columns {', '.join(missing)}; it has {', '.join(map(str, table.columns))}.")
    if len(images) != len(table):
        raise ValueError(f"images are {len(images)} but table has {len(table)} rows; pass an image for each row.")
    # Of three classes or more, a galaxy that is right may have a lower probability than one that is wrong.
    wrong = np.flatnonzero(table["label"] != table["predicted_label"])
    if len(wrong) == 0:
        raise ValueError(f"none of the table's {len(table)} galaxies is wrong; leave this figure out.")
    order = np.argsort(table["probability_of_label"].to_numpy()[wrong], kind="stable")
    worst = wrong[order][:count].tolist()
    titles = [_title_of(table.iloc[row]) for row in worst]
    plot_galaxy_sheet([images[row] for row in worst], titles, path)


def plot_most_certain(
    images: Sequence[Image.Image], table: pd.DataFrame, path: str | Path, *, label: str, count: int = 24
) -> None:
    """Draw the galaxies that were given the highest probability of a label, the most certain first.

    Args:
        images: The images in the order of the table's rows. Only those that are drawn are read.
        table: A row per galaxy with `id_str`, and `probability_<label>` (0-1) as in a table of predictions.
        path: Where the PNG is written; its folder is made.
        label: The label as in the column's name.
        count: How many galaxies are drawn at most.

    Raises:
        ValueError: When the table lacks one of these columns or any row, or when it has not as many rows as images.
    """
    column = f"probability_{label}"
    missing = [name for name in ("id_str", column) if name not in table]
    if missing:
        raise ValueError(f"table lacks the columns {', '.join(missing)}; it has {', '.join(map(str, table.columns))}.")
    if len(images) != len(table):
        raise ValueError(f"images are {len(images)} but table has {len(table)} rows; pass an image for each row.")
    rows = np.argsort(-table[column].to_numpy(), kind="stable")[:count].tolist()
    name = shown_name(label)
    titles = [f"{table['id_str'].iloc[row]}\nP({name}) = {table[column].iloc[row]:.3f}" for row in rows]
    plot_galaxy_sheet([images[row] for row in rows], titles, path)


def plot_galaxy_sheet(
    images: Sequence[Image.Image], titles: Sequence[str], path: str | Path, *, columns: int = 6
) -> None:
    """Draw galaxies side by side, each with its title above it, at the width of a page.

    Args:
        images: PIL images of any size and mode; each is drawn with the first row on top.
        titles: A title for each image, of any number of lines; those that are wider than the image are broken.
        path: Where the PNG is written; its folder is made.
        columns: How many galaxies stand in a row.

    Raises:
        ValueError: When there are no images, or not as many titles as images.
    """
    if len(images) == 0:
        raise ValueError("images are empty; a sheet needs at least one galaxy.")
    if len(images) != len(titles):
        raise ValueError(f"images are {len(images)} but titles are {len(titles)}; pass a title for each image.")
    rows = -(-len(images) // columns)
    width = PAGE_WIDTH / columns - 0.06
    titles = ["\n".join(_broken(line, width) for line in title.splitlines()) for title in titles]
    lines = max(title.count("\n") + 1 for title in titles)
    height = rows * (PAGE_WIDTH / columns + (lines + 0.5) * TITLE_LINE_HEIGHT)
    figure = Figure(figsize=(PAGE_WIDTH, height), layout=ConstrainedLayoutEngine(w_pad=0.02, h_pad=0.03, compress=True))
    cells = figure.subplots(rows, columns, squeeze=False).ravel()
    for cell in cells:
        cell.set_axis_off()
    for cell, image, title in zip(cells, images, titles, strict=False):  # the last row may have empty cells
        cell.imshow(np.asarray(image.convert("RGB")))
        cell.set_title(title, fontsize=SMALL_FONT_SIZE, pad=2)
    _save(figure, path)


def plot_confusion(counts: Sequence[Sequence[int]], labels: Sequence[str], path: str | Path) -> None:
    """Draw the table of true against predicted labels, with counts and the share of each row.

    Args:
        counts: Galaxies by true label (rows) and predicted label (columns), as the metric `confusion` gives them.
        labels: The labels' names in the order of the rows.
        path: Where the PNG is written; its folder is made.

    Raises:
        ValueError: When the counts are not square, or not as large as the labels are many.
    """
    table = np.asarray(counts)
    if table.shape != (len(labels), len(labels)):
        raise ValueError(
            f"counts have the shape {table.shape}; for {len(labels)} labels it has to be square of that size."
        )
    row_sums = table.sum(axis=1, keepdims=True)
    shares = table / np.maximum(row_sums, 1)  # a label that no galaxy has keeps a row of zeros
    names = [shown_name(label) for label in labels]
    # Half an inch for each cell, and room for the longest name beside them and below.
    size = min(PAGE_WIDTH, max(2.4, 0.5 * len(names) + 0.07 * max(map(len, names)) + 0.8))
    font_size = min(FONT_SIZE, 80 / len(names))
    figure = Figure(figsize=(size, size), layout="constrained")
    panel = figure.subplots()
    panel.imshow(shares, cmap="Greys", vmin=0, vmax=1)
    for (row, column), share in np.ndenumerate(shares):
        colour = "white" if share > 0.5 else "black"
        text = f"{table[row, column]}\n{share:.0%}" if row_sums[row, 0] else "0"
        panel.text(column, row, text, ha="center", va="center", color=colour, fontsize=font_size)
    panel.set_xticks(range(len(names)), names, fontsize=font_size, rotation=45, ha="right", rotation_mode="anchor")
    panel.set_yticks(range(len(names)), names, fontsize=font_size)
    panel.set_xlabel("Predicted label", fontsize=FONT_SIZE)
    panel.set_ylabel("True label", fontsize=FONT_SIZE)
    _save(figure, path)


def shown_name(name: object) -> str:
    """A label's name as a figure shows it: beginning and end of a long one, and every character as it is.

    Args:
        name: The label's.
    """
    short = str(name)
    if len(short) > LONGEST_NAME:
        half = (LONGEST_NAME - 1) // 2
        short = f"{short[:half].rstrip()}…{short[-half:].lstrip()}"
    # For matplotlib "$...$" is a formula, and what starts with "_" has no place in a legend.
    return f"{' ' if short.startswith('_') else ''}{short}".replace("$", r"\$")


def save_figure(figure: Figure, path: str | Path, *, with_pdf: bool = False) -> None:
    """Write a figure as PNG.

    Args:
        figure: The figure.
        path: Where the PNG is written; its folder is made.
        with_pdf: Whether the same figure is written beside it as PDF, with text as text.
    """
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DOTS_PER_INCH, format="png")
    if with_pdf:
        # Journals refuse matplotlib's default, type 3 fonts; without a date the same figure is the same file.
        with matplotlib.rc_context({"pdf.fonttype": 42}):
            figure.savefig(Path(path).with_suffix(".pdf"), format="pdf", metadata={"CreationDate": None})


def _stage_starts(history: Mapping[str, LossHistory]) -> dict[str, float]:
    starts, total = {}, 0.0
    for stage, records in history.items():
        starts[stage] = total
        total += max((float(record["epoch"]) for record in records), default=0.0)
    return starts


def _joined_curves(history: Mapping[str, LossHistory]) -> dict[str, list[tuple[Any, Any]]]:
    starts = _stage_starts(history)
    curves: dict[str, list[tuple[Any, Any]]] = {}
    for name in ("loss", "eval_loss", "eval_accuracy", "eval_roc_auc"):
        curves[name] = []
        for stage, records in history.items():
            points = [(starts[stage] + record["epoch"], record[name]) for record in records if name in record]
            if points:
                epochs, values = zip(*points, strict=True)
                curves[name].append((epochs, values))
    return curves


def _draw_losses(panel: Axes, curves: Mapping[str, list[tuple[Any, Any]]]) -> None:
    _draw_curve(
        panel, curves["loss"], label="Training", color="0.5", linestyle="--", marker="o", markerfacecolor="white"
    )
    _draw_curve(panel, curves["eval_loss"], label="Validation", color="black", linestyle="-", marker="o")
    panel.set_ylabel("Loss", fontsize=FONT_SIZE)


def _draw_scores(panel: Axes, curves: Mapping[str, list[tuple[Any, Any]]]) -> None:
    _draw_curve(panel, curves["eval_accuracy"], label="Accuracy", color="black", linestyle="-", marker="o")
    _draw_curve(
        panel, curves["eval_roc_auc"], label="ROC AUC", color="0.5", linestyle=":", marker="s", markerfacecolor="white"
    )
    panel.set_ylabel("Validation score", fontsize=FONT_SIZE)


def _draw_curve(panel: Axes, segments: list[tuple[Any, Any]], *, label: str, **style: Any) -> None:
    # A stage is a line of its own: a line from one stage to the next would show epochs that never were.
    for number, (epochs, values) in enumerate(segments):
        panel.plot(epochs, values, label=label if number == 0 else None, markersize=3, linewidth=1, **style)


def _draw_stages(panels: Sequence[Axes], starts: Mapping[str, float]) -> None:
    for panel in panels:
        panel.tick_params(labelsize=FONT_SIZE)
        panel.margins(y=0.15)
        panel.set_xlim(left=0)
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        panel.legend(fontsize=SMALL_FONT_SIZE, frameon=False)
        for start in list(starts.values())[1:]:
            panel.axvline(start, color="0.7", linewidth=0.8)
    panels[-1].set_xlabel("Epoch", fontsize=FONT_SIZE)
    # One name at each end: a stage may be too short for its name to stand above it.
    first, *later = starts
    panels[0].set_title(f"{first} stage", loc="left", fontsize=SMALL_FONT_SIZE, pad=3)
    if later:
        panels[0].set_title(f"{later[-1]} stage", loc="right", fontsize=SMALL_FONT_SIZE, pad=3)


def _mark_kept_epoch(panels: Sequence[Axes], epoch: float) -> None:
    for panel in panels:
        panel.axvline(epoch, color="black", linewidth=0.8, linestyle="-.", label="Kept")


def _broken(line: str, width: float) -> str:
    """A line of a title on as many lines as it needs in a width in inches."""
    if not line.strip():
        return line
    needed = TextPath((0, 0), line, size=SMALL_FONT_SIZE).get_extents().width / 72  # from points
    # A part may have wider letters than the line on average.
    return fill(line, int(0.9 * len(line) * width / needed)) if needed > width else line


def _title_of(galaxy: pd.Series) -> str:
    label, predicted = shown_name(galaxy["label"]), shown_name(galaxy["predicted_label"])
    return f"{galaxy['id_str']}\n{label}, predicted {predicted}\nP({label}) = {galaxy['probability_of_label']:.3f}"


def _save(figure: Figure, path: str | Path) -> None:
    save_figure(figure, path)
