import numpy as np
import pandas as pd
import pytest
import sklearn.metrics
from matplotlib.cbook import STEP_LOOKUP_MAP
from PIL import Image

from zoobot_hf.evaluation import plots, probability_plots
from zoobot_hf.evaluation.power_law import extrapolate
from zoobot_hf.evaluation.reliability import reliability_table
from zoobot_hf.evaluation.selection import choose_threshold, completeness_by_column, measure_selection


@pytest.fixture
def galaxies():
    generator = np.random.default_rng(0)
    has_label = generator.random(300) < 0.4
    return 1 / (1 + np.exp(-generator.normal(2 * has_label - 1.0))), has_label


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were saved, for a look at what is on them."""
    figures = []
    save = probability_plots.save_figure

    def save_and_remember(figure, path, **options):
        figures.append(figure)
        save(figure, path, **options)

    monkeypatch.setattr(probability_plots, "save_figure", save_and_remember)
    return figures


def check_files(path):
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert image.size[0] == plots.COLUMN_WIDTH * plots.DOTS_PER_INCH
    content = path.with_suffix(".pdf").read_bytes()
    assert content.startswith(b"%PDF")
    assert b"CreationDate" not in content
    assert b"/Type3" not in content


def points_of(line):
    return line.get_xydata()


def height_at(place, line):
    """Where a curve of steps, as it is drawn, has this x."""
    return np.interp(place, *STEP_LOOKUP_MAP[line.get_drawstyle()](*points_of(line).T))


def test_the_reliability_diagram_shows_the_table_and_the_counts(galaxies, drawn, tmp_path):
    path = tmp_path / "figures" / "reliability.png"
    probability_plots.plot_reliability(*galaxies, path, label="ring", population="Test set", bins=5)
    upper, lower = drawn[0].axes
    table = reliability_table(*galaxies, bins=5)
    assert points_of(upper.lines[1]) == pytest.approx(table[["mean_probability", "share"]].to_numpy())
    (bars,) = upper.collections
    ends = [[low, high] for (_, low), (_, high) in bars.get_segments()]
    assert ends == pytest.approx(table[["share_low", "share_high"]].to_numpy())
    assert sum(np.histogram(galaxies[0], np.linspace(0, 1, 21))[0]) == 300
    assert upper.get_title("left") == "Test set"
    assert (upper.get_ylabel(), lower.get_xlabel()) == ("Share that is ring", "Probability of ring")
    check_files(path)


@pytest.mark.parametrize(
    ("label", "shown"),
    [("_ring", " _ring"), ("$5$", r"\$5\$"), ("ring galaxies of the nearby universe", "ring galaxie…rby universe")],
)
def test_labels_with_unusual_names_are_shown(galaxies, drawn, tmp_path, label, shown):
    path = tmp_path / "figure.png"
    probability_plots.plot_reliability(*galaxies, path, label=label, population="Test set")
    upper, lower = drawn[0].axes
    assert [text.get_text() for text in lower.get_legend().get_texts()] == ["all", shown]
    assert (upper.get_ylabel(), lower.get_xlabel()) == (f"Share that is {shown}", f"Probability of {shown}")
    probability_plots.plot_completeness_and_purity(*galaxies, path, label=label, prevalence=0.05)
    probability_plots.plot_roc_and_precision_recall(*galaxies, path, label=label, prevalence=0.05)
    assert [figure.axes[-1].get_title("left") for figure in drawn[1:]] == [f"{shown}: 0.05 in the sky"] * 2


def test_completeness_and_purity_name_their_prevalence_and_the_selection(galaxies, drawn, tmp_path):
    path = tmp_path / "selection.png"
    chosen = choose_threshold(*galaxies, aim="completeness", at_least=0.8, prevalence=0.05)
    probability_plots.plot_completeness_and_purity(*galaxies, path, label="ring", prevalence=0.05, selection=chosen)
    panel = drawn[0].axes[0]
    assert panel.get_title("left") == "ring: 0.05 in the sky"
    curves = {line.get_label(): line for line in panel.lines if line.get_label()[0] != "_"}
    for threshold in [chosen.threshold, *np.random.default_rng(1).uniform(0, galaxies[0].max(), 50)]:
        measured = measure_selection(*galaxies, threshold=threshold, prevalence=0.05)
        assert height_at(threshold, curves["Completeness"]) == pytest.approx(measured.completeness.value)
        assert height_at(threshold, curves["Purity"]) == pytest.approx(measured.purity.value)
    check_files(path)
    probability_plots.plot_completeness_and_purity(*galaxies, path, label="ring")
    assert drawn[1].axes[0].get_title("left") == f"ring: {galaxies[1].mean():.3g} of these galaxies"


def test_curves_of_three_classes_have_the_weights_of_the_numbers(drawn, tmp_path):
    generator, sky = np.random.default_rng(2), [0.9, 0.05, 0.05]
    classes = np.arange(300) % 3
    probability = 1 / (1 + np.exp(-generator.normal(np.array([-3, 1, 0])[classes])))
    galaxies, options = (probability, classes == 1), {"prevalence": sky, "classes": classes}
    probability_plots.plot_completeness_and_purity(*galaxies, tmp_path / "selection.png", label="ring", **options)
    probability_plots.plot_roc_and_precision_recall(*galaxies, tmp_path / "roc.png", label="ring", **options)
    curves = {line.get_label(): line for line in drawn[0].axes[0].lines}
    for threshold in generator.uniform(0, probability.max(), 50):
        measured = measure_selection(*galaxies, threshold=threshold, **options)
        assert height_at(threshold, curves["Completeness"]) == pytest.approx(measured.completeness.value)
        assert height_at(threshold, curves["Purity"]) == pytest.approx(measured.purity.value)
    upper, lower = drawn[1].axes
    weights = np.array(sky)[classes]
    area = sklearn.metrics.roc_auc_score(classes == 1, probability, sample_weight=weights)
    average = sklearn.metrics.average_precision_score(classes == 1, probability, sample_weight=weights)
    assert upper.lines[1].get_label() == f"Area {area:.3f}"
    assert lower.lines[1].get_label() == f"Average precision {average:.3f}"
    assert drawn[0].axes[0].get_title("left") == lower.get_title("left") == "ring: 0.05 in the sky"


def test_the_roc_and_its_area_are_scikit_learns(galaxies, drawn, tmp_path):
    probability_plots.plot_roc_and_precision_recall(*galaxies, tmp_path / "roc.png", label="ring")
    upper, lower = drawn[0].axes
    assert upper.lines[1].get_label() == f"Area {sklearn.metrics.roc_auc_score(galaxies[1], galaxies[0]):.3f}"
    average = sklearn.metrics.average_precision_score(galaxies[1], galaxies[0])
    steps = lower.lines[1]
    assert steps.get_label() == f"Average precision {average:.3f}"
    drawn_steps = STEP_LOOKUP_MAP[steps.get_drawstyle()](*points_of(steps).T)
    assert sklearn.metrics.auc(*drawn_steps) == pytest.approx(average)
    assert lower.get_title("left") == f"ring: {galaxies[1].mean():.3g} of these galaxies"
    check_files(tmp_path / "roc.png")


def test_completeness_along_a_column_has_its_unit(galaxies, drawn, tmp_path):
    magnitude = np.linspace(15, 18, 300)
    table = completeness_by_column(magnitude, *galaxies, threshold=0.5, bins=[15, 16, 18, 20])
    path = tmp_path / "column.png"
    probability_plots.plot_completeness_by_column(table, path, name="r-band magnitude", unit="mag", threshold=0.5)
    upper, lower = drawn[0].axes
    middles = np.array([15.5, 17, 19])  # the last bin is empty and has no point
    assert points_of(upper.lines[0])[:, 0] == pytest.approx(middles)
    assert np.isnan(points_of(upper.lines[0])[2, 1])
    assert lower.get_xlabel() == "r-band magnitude [mag]"
    assert upper.get_title("left") == "Threshold 0.5"
    check_files(path)


def test_label_curves_of_several_scores_stand_below_each_other_with_the_law(drawn, tmp_path):
    numbers, generator = np.array([5, 10, 20, 40]), np.random.default_rng(0)
    rows = [
        (name, score, k, 0.6 + k / 1000, 0.5, 0.7)
        for name in ("One", "Two")
        for score in ("accuracy", "log_loss")
        for k in numbers[::-1]
    ]
    table = pd.DataFrame(rows, columns=["series", "score", "labels", "value", "low", "high"])
    errors = 0.05 + 0.9 * numbers**-0.5 + generator.normal(scale=0.005, size=(10, 4))
    law = extrapolate(numbers, errors, classes=2)
    scores = {"accuracy": "Accuracy", "log_loss": "Log loss"}
    probability_plots.plot_label_curves(table, tmp_path / "curves.png", scores=scores, extrapolation=law)
    upper, lower = drawn[0].axes
    assert (upper.get_ylabel(), lower.get_ylabel()) == ("Accuracy", "Log loss")
    assert points_of(upper.lines[0])[:, 1] == pytest.approx(0.6 + numbers / 1000)
    assert points_of(upper.lines[-1])[-1] == pytest.approx([40, 1 - law.law(40)])
    sentence = upper.get_title("left").replace("\n", " ")
    assert sentence.startswith("About ")
    assert "of each class for 1 more point of accuracy (" in sentence
    (legend,) = drawn[0].legends
    assert [text.get_text() for text in legend.get_texts()] == ["One", "Two", "Power law"]
    check_files(tmp_path / "curves.png")
    with pytest.raises(ValueError, match="scores name 'f1'; the table has accuracy, log_loss"):
        probability_plots.plot_label_curves(table, tmp_path / "curves.png", scores={"f1": "F1"})


def test_a_table_without_rows_is_refused(tmp_path):
    with pytest.raises(ValueError, match="table has no row; make it with completeness_by_column"):
        probability_plots.plot_completeness_by_column(pd.DataFrame(), tmp_path / "column.png", name="size")
