import pytest

from zoobot_hf.evaluation.scores import Scores
from zoobot_hf.training.run_report import _different_populations


@pytest.mark.parametrize(("here", "sky", "is_shown"), [(0.011, 0.002, True), (0.5, 0.51, False), (0.5, 0.05, True)])
def test_a_card_has_the_scores_of_another_sky(here, sky, is_shown):
    scores = [
        Scores(population, {"ring": share}, 100, 0.9, {}, {})
        for population, share in (("labelled galaxies", here), ("sky", sky))
    ]
    assert [own.population for own in _different_populations(scores)] == ["labelled galaxies", "sky"][: 1 + is_shown]
