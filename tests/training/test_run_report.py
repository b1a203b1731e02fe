from types import SimpleNamespace

import numpy as np
import pytest

from zoobot_hf import ZoobotConfig
from zoobot_hf.evaluation.judgement import judge
from zoobot_hf.evaluation.scores import Scores
from zoobot_hf.evaluation.selection import measure_selection
from zoobot_hf.training.run_report import (
    _different_populations,
    _hub_id,
    _judged_labels,
    _judged_table,
    _scores_by_population,
)


@pytest.mark.parametrize(("here", "sky", "is_shown"), [(0.011, 0.002, True), (0.5, 0.51, False), (0.5, 0.44, True)])
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


@pytest.mark.parametrize("is_for_sky", [True, False])
def test_figures_of_three_classes_are_for_the_sky_of_the_selections(is_for_sky):
    labels, names = np.arange(60) % 3, ["smooth", "ring", "edge on"]
    shares = dict(zip(names, [0.9, 0.05, 0.05], strict=True))
    config = ZoobotConfig(
        id2label=dict(enumerate(names)),
        embedding_size=4,
        training_prevalence=dict.fromkeys(names, 1 / 3),
        sky_prevalence=shares if is_for_sky else None,
    )
    logits = 2 * np.random.default_rng(0).normal(np.eye(3)[labels])
    judgement = judge(
        config, validation_logits=logits, validation_labels=labels, test_logits=logits, test_labels=labels
    )
    config.predictions_for = judgement.fields["predictions_for"]
    model, galaxies = SimpleNamespace(config=config), {"id_str": [str(row) for row in range(60)], "label": labels}
    judged = _judged_labels(model, judgement, galaxies)
    assert [label.name for label in judged] == names
    for number, label in enumerate(judged):
        again = measure_selection(label.probability, labels == number, threshold=label.selection.threshold, **label.sky)
        assert again._replace(aim="best F1") == label.selection
        assert ("classes" in label.sky) == is_for_sky
    table = _judged_table(model, judgement, galaxies)  # the most wrong are of the galaxies as they are
    assert table["probability_ring"].to_numpy() == pytest.approx(judgement.probabilities_as_labelled[:, 1])


def test_no_path_is_taken_for_a_name_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data/rings").mkdir(parents=True)
    assert _hub_id("galaxies/rings") == "galaxies/rings"
    for name in ("data/rings", "/home/someone/rings", "../shared/rings", "~/rings", "some/where/rings", "rings", None):
        assert _hub_id(name) is None
