import numpy as np
import pandas as pd
import pytest
from PIL import Image

from zoobot_hf.evaluation import plots

HISTORY = {
    "frozen": [
        {"epoch": 1.0, "loss": 0.7},
        {"epoch": 1.0, "eval_loss": 0.69, "eval_accuracy": 0.5, "eval_roc_auc": 0.5},
        {"epoch": 2.0, "loss": 0.6},
        {"epoch": 2.0, "eval_loss": 0.6, "eval_accuracy": 0.6, "eval_roc_auc": 0.7},
        {"epoch": 2.0, "train_loss": 0.65, "train_runtime": 1.0},
    ],
    "unfrozen": [{"epoch": 1.0, "loss": 0.5}, {"epoch": 1.0, "eval_loss": 0.55, "eval_accuracy": 0.7}],
}
TABLE = pd.DataFrame(
    {
        "id_str": ["a", "b", "c"],
        "label": ["ring", "no ring", "ring"],
        "predicted_label": ["ring", "ring", "no ring"],
        "probability_of_label": [0.9, 0.2, 0.1],
    }
)


class ImagesThatRemember:
    """Three grey images that remember which of them were read."""

    def __init__(self):
        self.read = []

    def __len__(self):
        return 3

    def __getitem__(self, row):
        self.read.append(row)
        return Image.new("L", (8, 8), 60 * row)


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were saved, for a look at what is on them."""
    figures = []
    save = plots._save

    def save_and_remember(figure, path):
        figures.append(figure)
        save(figure, path)

    monkeypatch.setattr(plots, "_save", save_and_remember)
    return figures


def size_of(path):
    with Image.open(path) as image:
        assert image.format == "PNG"
        return image.size


def extent_of(drawn):
    """(left, bottom, right, top) of a text or a panel as it is in the file, in inches."""
    if drawn.figure.dpi != plots.DOTS_PER_INCH:
        drawn.figure.set_dpi(plots.DOTS_PER_INCH)
        drawn.figure.draw_without_rendering()
    return drawn.get_window_extent().extents / plots.DOTS_PER_INCH


def lines_of(panel):
    return {line.get_label(): line.get_xydata().tolist() for line in panel.lines if line.get_label()[0] != "_"}


def test_training_curves_show_both_stages_one_after_the_other(tmp_path, drawn):
    path = tmp_path / "figures" / "training_curves.png"
    plots.plot_training_curves(HISTORY, path, kept_stage="unfrozen", kept_epoch=1)
    losses, scores = drawn[0].axes
    assert lines_of(losses)["Training"] == [[1, 0.7], [2, 0.6]]
    assert [line.get_xydata().tolist() for line in losses.lines if [3, 0.55] in line.get_xydata().tolist()] == [
        [[3, 0.55]]
    ]
    assert lines_of(losses)["Kept"] == [[3, 0], [3, 1]]
    assert lines_of(scores)["ROC AUC"] == [[1, 0.5], [2, 0.7]]
    assert losses.get_title("left") == "frozen stage"
    assert losses.get_title("right") == "unfrozen stage"
    assert size_of(path)[0] == plots.COLUMN_WIDTH * plots.DOTS_PER_INCH


def test_training_curves_without_scores_have_one_panel(tmp_path, drawn):
    plots.plot_training_curves({"frozen": [{"epoch": 1.0, "loss": 0.7}]}, tmp_path / "curves.png")
    assert len(drawn[0].axes) == 1
    assert drawn[0].axes[0].get_xlabel() == "Epoch"


def test_a_history_without_a_loss_is_refused(tmp_path):
    with pytest.raises(ValueError, match="history holds no loss"):
        plots.plot_training_curves({"frozen": []}, tmp_path / "curves.png")


def test_a_kept_stage_that_was_not_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match="'third'; choose one of frozen, unfrozen"):
        plots.plot_training_curves(HISTORY, tmp_path / "curves.png", kept_stage="third")


def test_the_most_wrong_galaxies_come_first_and_no_other_is_read(tmp_path, drawn):
    images = ImagesThatRemember()
    plots.plot_most_wrong(images, TABLE, tmp_path / "wrong.png", count=2)
    assert images.read == [2, 1]
    titles = [cell.get_title() for cell in drawn[0].axes if cell.get_title()]
    assert titles == ["c\nring, predicted no ring\nP(ring) = 0.100", "b\nno ring, predicted ring\nP(no ring) = 0.200"]


@pytest.mark.parametrize("galaxies", [0, 1])
def test_galaxies_none_of_which_is_wrong_are_refused(tmp_path, galaxies):
    with pytest.raises(ValueError, match=f"none of the table's {galaxies} galaxies is wrong; leave this figure out"):
        plots.plot_most_wrong([Image.new("L", (8, 8))] * galaxies, TABLE[:galaxies], tmp_path / "wrong.png")


def test_a_galaxy_that_is_right_is_not_among_the_most_wrong(tmp_path, drawn):
    table = pd.DataFrame(
        {
            "id_str": ["a", "b", "c"],
            "label": ["ring", "bar", "ring"],
            "predicted_label": ["ring", "bar", "bar"],
            "probability_of_label": [0.34, 0.35, 0.4],
        }
    )
    plots.plot_most_wrong(ImagesThatRemember(), table, tmp_path / "wrong.png")
    assert [cell.get_title() for cell in drawn[0].axes if cell.get_title()] == [
        "c\nring, predicted bar\nP(ring) = 0.400"
    ]


def test_a_column_that_is_missing_is_named(tmp_path):
    with pytest.raises(
        ValueError, match="lacks the columns label, predicted_label; it has id_str, probability_of_label"
    ):
        plots.plot_most_wrong([], TABLE[["id_str", "probability_of_label"]], tmp_path / "wrong.png")


def test_images_and_rows_have_to_be_as_many(tmp_path):
    with pytest.raises(ValueError, match="images are 0 but table has 3 rows"):
        plots.plot_most_wrong([], TABLE, tmp_path / "wrong.png")


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P"])
def test_a_sheet_takes_images_of_every_mode(tmp_path, drawn, mode):
    plots.plot_galaxy_sheet([Image.new(mode, (5, 4))] * 3, ["a", "b", "c"], tmp_path / "sheet.png", columns=2)
    assert len(drawn[0].axes) == 4  # two rows of two, the last cell empty
    assert drawn[0].axes[0].images[0].get_array().shape == (4, 5, 3)
    assert size_of(tmp_path / "sheet.png")[0] == pytest.approx(plots.PAGE_WIDTH * plots.DOTS_PER_INCH, abs=1)


def test_titles_of_a_sheet_stay_above_their_own_galaxies(tmp_path, drawn):
    titles = ["SDSS J000000.12+000000.5 of run 94\nlenticular, predicted not a ring galaxy\nshort"] * 7
    plots.plot_galaxy_sheet([Image.new("L", (8, 8))] * 7, titles, tmp_path / "sheet.png")
    for column, cell in enumerate(drawn[0].axes[:6]):
        left, _, right, top = extent_of(cell.title)
        assert plots.PAGE_WIDTH / 6 * column < left < right < plots.PAGE_WIDTH / 6 * (column + 1)
        assert top < drawn[0].get_figheight()
    assert cell.get_title().replace("\n", " ").replace(" ", "") == titles[0].replace("\n", " ").replace(" ", "")


def test_a_sheet_of_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="at least one galaxy"):
        plots.plot_galaxy_sheet([], [], tmp_path / "sheet.png")


def test_a_sheet_needs_a_title_for_each_image(tmp_path):
    with pytest.raises(ValueError, match="images are 1 but titles are 2"):
        plots.plot_galaxy_sheet([Image.new("L", (4, 4))], ["a", "b"], tmp_path / "sheet.png")


def test_the_confusion_table_shows_counts_and_shares(tmp_path, drawn):
    plots.plot_confusion([[3, 1], [0, 0]], ["no ring", "ring"], tmp_path / "confusion.png")
    panel = drawn[0].axes[0]
    assert [text.get_text() for text in panel.texts] == ["3\n75%", "1\n25%", "0", "0"]
    assert np.allclose(panel.images[0].get_array(), [[0.75, 0.25], [0, 0]])
    assert (panel.get_xlabel(), panel.get_ylabel()) == ("Predicted label", "True label")


@pytest.mark.parametrize(("count", "name"), [(2, "a name that no figure has room for"), (12, "class of galaxies")])
def test_the_texts_of_a_confusion_table_have_room(tmp_path, drawn, count, name):
    plots.plot_confusion([[39999] * count] * count, [f"{n} {name}" for n in range(count)], tmp_path / "confusion.png")
    (panel,) = drawn[0].axes
    left, _, right, _ = extent_of(panel)
    cell = (right - left) / count
    for text in panel.texts:
        left, bottom, right, top = extent_of(text)
        assert max(right - left, top - bottom) < cell
    for text in [*panel.get_xticklabels(), *panel.get_yticklabels()]:
        assert extent_of(text).min() > 0
    assert {text.get_rotation() for text in panel.get_xticklabels()} == {45}


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("not ring", "not ring"),
        ("smooth-or-featured-candels", "smooth-or-featured-candels"),
        ("ring galaxies of the nearby universe", "ring galaxie…rby universe"),
        ("ring galaxies of the distant universe", "ring galaxie…ant universe"),
        (3, "3"),
        ("M$_\\odot$", r"M\$_\odot\$"),
        ("_ring", " _ring"),
    ],
)
def test_names_are_shown_as_they_are_and_not_too_long(name, shown):
    assert plots.shown_name(name) == shown


def test_a_confusion_table_of_another_size_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"shape \(1, 2\); for 2 labels"):
        plots.plot_confusion([[1, 2]], ["a", "b"], tmp_path / "confusion.png")


def test_the_most_certain_galaxies_come_first_and_no_other_is_read(tmp_path, drawn):
    images = ImagesThatRemember()
    table = pd.DataFrame({"id_str": ["a", "b", "c"], "probability_ring": [0.2, 0.9, 0.5]})
    plots.plot_most_certain(images, table, tmp_path / "certain.png", label="ring", count=2)
    assert images.read == [1, 2]
    titles = [cell.get_title() for cell in drawn[0].axes if cell.get_title()]
    assert titles == ["b\nP(ring) = 0.900", "c\nP(ring) = 0.500"]
    with pytest.raises(ValueError, match="lacks the columns probability_bar; it has id_str, probability_ring"):
        plots.plot_most_certain(images, table, tmp_path / "certain.png", label="bar")
    with pytest.raises(ValueError, match="images are 0 but table has 3 rows"):
        plots.plot_most_certain([], table, tmp_path / "certain.png", label="ring")
