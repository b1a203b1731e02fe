from types import SimpleNamespace

import pytest

from zoobot_hf.evaluation.scores import Scores
from zoobot_hf.training.run_report import _different_populations, _hub_id, _scores_by_population


@pytest.mark.parametrize(("here", "sky", "is_shown"), [(0.011, 0.002, True), (0.5, 0.51, False), (0.5, 0.05, True)])
def test_a_card_has_the_scores_of_another_sky(here, sky, is_shown):
    scores = [
        Scores(population, {"ring": share}, 100, 0.9, {}, {})
        for population, share in (("labelled galaxies", here), ("sky", sky))
    ]
    assert [own.population for own in _different_populations(scores)] == ["labelled galaxies", "sky"][: 1 + is_shown]


ONE, OTHER = (0.8, 0.7, 0.9), (0.6, 0.5, 0.7)


@pytest.mark.parametrize(
    ("shares", "tables"),
    [
        (
            {"no ring": 0.99968, "ring": 0.00032},
            {"where 0.032% are ring": {"accuracy": ONE, "log_loss": OTHER}},
        ),
        (
            {"no ring": 0.8, "ring": 0.15, "bar": 0.05},
            {
                "all labels together": {"accuracy": ONE, "log_loss": ONE},
                "where 15.0% are ring": {"log_loss": OTHER},
            },
        ),
    ],
)
def test_scores_over_more_than_two_labels_have_a_table_of_their_own(shares, tables):
    scores = Scores("sky", shares, 100, 0.9, {"accuracy": ONE, "log_loss": ONE}, {"ring": {"log_loss": OTHER}})
    found = _scores_by_population(SimpleNamespace(scores=[scores]), "test galaxies")
    assert found == {f"expected in the sky, {words}": table for words, table in tables.items()}


def test_no_path_is_taken_for_a_name_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data/rings").mkdir(parents=True)
    assert _hub_id("galaxies/rings") == "galaxies/rings"
    for name in ("data/rings", "/home/someone/rings", "../shared/rings", "~/rings", "some/where/rings", "rings", None):
        assert _hub_id(name) is None
