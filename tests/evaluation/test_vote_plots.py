import numpy as np
import pytest
import scipy.stats
from PIL import Image
from small_trees import make_question

from zoobot_hf import load_survey
from zoobot_hf.evaluation import vote_plots
from zoobot_hf.evaluation.plots import DOTS_PER_INCH, PAGE_WIDTH
from zoobot_hf.evaluation.vote_plots import plot_vote_fractions

EUCLID, RINGS = load_survey("euclid").to_dict(), load_survey("rings").to_dict()


@pytest.fixture
def drawn(monkeypatch):
    """The figures, for a look at what is on them."""
    figures = []
    monkeypatch.setattr(vote_plots, "save_figure", lambda figure, path: figures.append(figure))
    return figures


def draw(tree, *, galaxies=60):
    generator = np.random.default_rng(0)
    answers = sum(len(question["answers"]) for question in tree["questions"])
    return generator.uniform(1, 30, (galaxies, answers)), generator.integers(0, 20, (galaxies, answers)).astype(float)


def test_every_question_that_was_asked_has_a_panel(tmp_path):
    concentrations, votes = draw(EUCLID)
    plot_vote_fractions(concentrations, votes, EUCLID, tmp_path / "figures/all.png")
    votes[:, 24:] = 0  # what is left are 8 questions, in two rows and not four
    votes[:5, :3] = np.nan
    plot_vote_fractions(concentrations, votes, EUCLID, tmp_path / "some.png")
    with Image.open(tmp_path / "figures/all.png") as all_questions, Image.open(tmp_path / "some.png") as some:
        assert all_questions.width == some.width == round(PAGE_WIDTH * DOTS_PER_INCH)
        assert some.height < 0.6 * all_questions.height
        pixels = np.asarray(some.convert("RGB")).astype(int)
    assert np.ptp(pixels, axis=2).max() == 0  # readable in grey
    assert (pixels < 128).mean() > 0.005


def test_a_tree_of_one_question_has_one_panel(tmp_path):
    plot_vote_fractions(*draw(RINGS), RINGS, tmp_path / "rings.png")
    with Image.open(tmp_path / "rings.png") as image:
        assert image.width == round(2.4 * DOTS_PER_INCH)


def test_predictions_that_follow_the_votes_lie_nearer_the_diagonal(tmp_path):
    _, votes = draw(RINGS, galaxies=300)
    plot_vote_fractions(1 + votes, votes, RINGS, tmp_path / "right.png")
    plot_vote_fractions(1 + votes[:, ::-1], votes, RINGS, tmp_path / "wrong.png")
    far = []
    for name in ("right", "wrong"):
        with Image.open(tmp_path / f"{name}.png") as image:
            pixels = np.asarray(image.convert("L"))
        # The lower right of the panel, inside its frame.
        height, width = pixels.shape
        far.append((pixels[int(0.75 * height) : int(0.8 * height), int(0.75 * width) : int(0.9 * width)] < 250).mean())
    assert far[0] < 0.05 < far[1]


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 8, 12])
def test_the_names_of_all_questions_have_room(tmp_path, drawn, count):
    tree = {"name": "many", "questions": [make_question(f"{number}", "yes", "no") for number in range(count)]}
    plot_vote_fractions(*draw(tree), tree, tmp_path / "figure.png")
    (figure,) = drawn
    figure.set_dpi(DOTS_PER_INCH)
    figure.draw_without_rendering()
    panels = figure.axes[:count]
    for number, panel in enumerate(panels):
        bottom, top = panel.title.get_window_extent().intervaly
        above = panels[number - 4].get_tightbbox().y0 if number >= 4 else figure.bbox.height
        assert panel.bbox.y1 < bottom < top < above


@pytest.mark.parametrize("others", [2, 1000])
def test_a_galaxy_on_its_own_is_seen(tmp_path, drawn, others):
    votes = np.array([[2.0, 18]] + [[18.0, 2]] * others)
    plot_vote_fractions([[9, 1]] * (others + 1), votes, RINGS, tmp_path / "figure.png")
    drawn[0].draw_without_rendering()
    cells = drawn[0].axes[0].collections[0]
    shades = dict(zip(cells.get_array().tolist(), cells.get_facecolors()[:, 0], strict=True))
    assert list(cells.get_facecolors()[:, 3]) == [1] * 4
    assert shades[others] < shades[1] < 0.9


def test_questions_and_answers_with_unusual_names_are_shown(tmp_path, drawn):
    answers = [{"name": name, "vote_column": f"votes_{number}"} for number, name in enumerate(["_yes", "$5$"])]
    question = {"name": "is it a ring galaxy of the nearby universe", "asked_after": [], "answers": answers}
    tree = {"name": "rings", "questions": [question]}
    plot_vote_fractions(*draw(tree), tree, tmp_path / "figure.png")
    (panel,) = drawn[0].axes
    assert panel.get_title() == "is it a ring…rby universe\n51 galaxies"
    assert [text.get_text() for text in panel.get_legend().get_texts()] == [" _yes", r"\$5\$"]


def test_shapes_that_are_not_the_trees_are_refused(tmp_path):
    concentrations, votes = draw(RINGS)
    message = r"concentrations have the shape \(60, 2\) and votes \(60, 2\); pass \(galaxies, 46\) for both"
    with pytest.raises(ValueError, match=message):
        plot_vote_fractions(concentrations, votes, EUCLID, tmp_path / "figure.png")


def test_too_few_votes_are_refused(tmp_path):
    concentrations, votes = draw(RINGS)
    with pytest.raises(
        ValueError, match="no galaxy has 100 votes on any question; pass votes, or a smaller least_votes"
    ):
        plot_vote_fractions(concentrations, votes, RINGS, tmp_path / "figure.png", least_votes=100)


def test_the_means_of_bins_have_their_standard_errors():
    expected = np.array([0.02, 0.04, 0.05, 0.08, 0.09, 0.32, 0.33, 0.34, 0.35, 0.91, 0.92, 0.93, 0.96, 0.99, 1.0])
    observed = np.linspace(0, 1, 15) ** 2
    drawn = [slice(0, 5), slice(9, 15)]  # between them there are too few galaxies
    centers, means, errors = vote_plots._binned_means(expected, observed)
    assert centers == pytest.approx([expected[part].mean() for part in drawn])
    assert means == pytest.approx([observed[part].mean() for part in drawn])
    assert errors == pytest.approx([scipy.stats.sem(observed[part]) for part in drawn])
