from functools import partial

import numpy as np
import pytest
from scipy.special import softmax
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score, log_loss, precision_score, roc_auc_score

from zoobot_hf import ZoobotConfig, choose_threshold
from zoobot_hf.evaluation import judgement as judgement_module
from zoobot_hf.evaluation.judgement import judge, judge_out_of_fold, prevalence_of
from zoobot_hf.evaluation.scores import score_probabilities
from zoobot_hf.evaluation.selection import selection_curve

TWO = {0: "not ring", 1: "ring"}


def config_of(labels=TWO, **fields):
    return ZoobotConfig(id2label=labels, embedding_size=4, **fields)


def draw(count, *, share=0.3, overconfidence=2.5, seed=0):
    """Logits of a head that is trained at equal shares and too sure of itself, and labels at another share."""
    generator = np.random.default_rng(seed)
    labels = (generator.random(count) < share).astype(int)
    odds = 2 * labels - 1 + generator.normal(0, 1, count)  # of two normal distributions the log odds are 2 x
    return np.stack([np.zeros(count), overconfidence * 2 * odds], axis=1), labels


@pytest.fixture(autouse=True)
def few_draws(monkeypatch):
    monkeypatch.setattr(judgement_module, "score_probabilities", partial(score_probabilities, draws=20))


@pytest.fixture
def balanced():
    """A configuration of balanced training and a sky with one ring in twenty."""
    return config_of(
        training_prevalence={"not ring": 0.5, "ring": 0.5}, sky_prevalence={"not ring": 0.95, "ring": 0.05}
    )


def judged(config, **options):
    validation, test = draw(4000, seed=1), draw(4000, seed=2)
    return judge(
        config,
        validation_logits=validation[0],
        validation_labels=validation[1],
        test_logits=test[0],
        test_labels=test[1],
        **options,
    )


def test_the_temperature_is_found_and_probabilities_are_for_the_sky(balanced):
    judgement = judged(balanced)
    temperature = judgement.fields["calibration_temperature"]
    assert temperature == pytest.approx(2.5, rel=0.1)
    logits, _ = draw(4000, seed=2)
    expected = softmax(logits / temperature + np.log([0.95 / 0.5, 0.05 / 0.5]), axis=1)
    np.testing.assert_allclose(judgement.probabilities, expected, atol=1e-5)
    assert judgement.fields["predictions_for"] == "sky"
    assert balanced.predictions_for == "training"  # nothing happens to the configuration itself


def test_smoothed_labels_leave_a_rare_label_as_common_as_it_is():
    generator = np.random.default_rng(0)

    def draw_rare(count):
        labels = (generator.random(count) < 0.1).astype(int)
        return generator.normal(3 * labels, 1), labels

    values, labels = draw_rare(20000)
    smoothed = 0.8 * labels + 0.1
    # A head at the end of its training: the logistic regression of lowest loss.
    fitted = LogisticRegression(C=np.inf).fit(
        np.tile(values, 2)[:, None], np.repeat([1, 0], 20000), sample_weight=np.append(smoothed, 1 - smoothed)
    )

    def logits_of(values):
        odds = fitted.decision_function(values[:, None]) / 2
        return np.stack([-odds, odds], axis=1)

    config = config_of(
        label_smoothing=0.2,
        training_prevalence={"not ring": 0.9, "ring": 0.1},
        sky_prevalence={"not ring": 0.97, "ring": 0.03},
    )
    validation, test = draw_rare(4000), draw_rare(20000)
    judgement = judge(
        config,
        validation_logits=logits_of(validation[0]),
        validation_labels=validation[1],
        test_logits=logits_of(test[0]),
        test_labels=test[1],
    )
    assert judgement.probabilities_as_labelled[:, 1].mean() == pytest.approx(test[1].mean(), rel=0.05)
    in_sky = np.where(test[1], 0.03 / 0.1, 0.97 / 0.9)
    assert np.average(judgement.probabilities[:, 1], weights=in_sky) == pytest.approx(0.03, rel=0.05)


def test_the_threshold_is_measured_out_of_fold_on_galaxies_that_did_not_choose_it(balanced):
    validation, everything = draw(1000, seed=1), draw(3000, seed=2)
    given = softmax(everything[0] / 2.5 + np.log([0.95 / 0.5, 0.05 / 0.5]), axis=1)
    is_validation = np.arange(3000) < 1000
    options = {"validation_logits": validation[0], "validation_labels": validation[1]}
    judgement = judge_out_of_fold(
        balanced, probabilities=given, labels=everything[1], is_validation=is_validation, **options
    )
    selected, is_ring = given[1000:, 1] >= judgement.selections["ring"].threshold, everything[1][1000:] == 1
    found, false = selected[is_ring].mean(), selected[~is_ring].mean()
    assert judgement.selections["ring"].completeness.value == pytest.approx(found)
    assert judgement.selections["ring"].purity.value == pytest.approx(0.05 * found / (0.05 * found + 0.95 * false))
    alone = judge(balanced, test_logits=everything[0], test_labels=everything[1], **options)
    assert judgement.fields == alone.fields  # calibration and threshold are those of the model itself
    assert judgement.scores[1].labels["ring"]["roc_auc"].value == pytest.approx(
        roc_auc_score(everything[1], given[:, 1])
    )


def test_scores_are_for_the_galaxies_as_they_are_and_for_the_sky(balanced):
    judgement = judged(balanced)
    _, labels = draw(4000, seed=2)
    as_they_are, sky = judgement.scores
    own = judgement.probabilities_as_labelled
    assert as_they_are.overall["log_loss"].value == pytest.approx(log_loss(labels, own))
    assert as_they_are.overall["accuracy"].value == pytest.approx(np.mean(own.argmax(1) == labels))
    assert as_they_are.labels["ring"]["expected_calibration_error"].value < 0.03
    weights = np.where(labels == 1, 0.05 / labels.mean(), 0.95 / (1 - labels.mean()))
    assert sky.overall["log_loss"].value == pytest.approx(
        log_loss(labels, judgement.probabilities, sample_weight=weights)
    )
    assert sky.labels["ring"]["roc_auc"].value == pytest.approx(
        roc_auc_score(labels, judgement.probabilities[:, 1]), abs=1e-6
    )
    assert sky.prevalence == {"not ring": 0.95, "ring": 0.05}


@pytest.mark.parametrize(
    ("aim", "at_least", "words"),
    [
        ("completeness", 0.8, "completeness of at least 0.8"),
        ("purity", 0.4, "purity of at least 0.4"),
        ("f1", None, "best F1"),
    ],
)
def test_the_threshold_is_chosen_for_the_sky_on_validation_and_measured_on_test(balanced, aim, at_least, words):
    judgement = judged(balanced, aim=aim, at_least=at_least)
    selection = judgement.selections["ring"]
    assert selection.aim == judgement.fields["decision_aim"] == words
    assert judgement.fields["decision_threshold"] == {"ring": selection.threshold}
    logits, labels = draw(4000, seed=1)
    given = softmax(logits / judgement.fields["calibration_temperature"] + np.log([0.95, 0.05]), axis=1)[:, 1]
    chosen = choose_threshold(given, labels, aim=aim, at_least=at_least, prevalence=0.05)
    assert selection.threshold == pytest.approx(chosen.threshold, rel=1e-4)
    _, labels = draw(4000, seed=2)
    selected = judgement.probabilities[:, 1] >= selection.threshold
    assert selection.completeness.value == pytest.approx(selected[labels == 1].mean())
    rings, others = 0.05 * selected[labels == 1].mean(), 0.95 * selected[labels == 0].mean()
    assert selection.purity.value == pytest.approx(rings / (rings + others))
    assert selection.completeness.value == pytest.approx(chosen.completeness.value, abs=0.06)


def test_an_aim_that_cannot_be_met_is_a_remark(balanced):
    logits, labels = draw(400, seed=1)
    logits[0], labels[0] = [0, 100], 0  # the likeliest ring of all is none
    galaxies = {"validation_logits": logits, "validation_labels": labels, "test_logits": logits, "test_labels": labels}
    judgement = judge(balanced, **galaxies, aim="purity", at_least=0.99999)
    assert judgement.fields["decision_threshold"] is None
    assert judgement.selections == {}
    assert "No threshold selects 'ring': a purity of 0.99999 can't be reached" in judgement.remarks[0]
    assert len(judgement.scores) == 2


def test_a_class_that_validation_lacks_leaves_the_rest_in_place(balanced):
    logits, labels = draw(200, seed=2)
    judgement = judge(
        balanced,
        validation_logits=logits[:5],
        validation_labels=np.zeros(5, int),
        test_logits=logits,
        test_labels=labels,
    )
    assert judgement.calibration is None
    assert judgement.fields["calibration_temperature"] is None
    assert judgement.fields["decision_threshold"] is None
    assert len(judgement.scores) == 2
    assert judgement.remarks == [
        "The probabilities are not calibrated, and no threshold selects ring: the validation galaxies need some with "
        "and some without it."
    ]


def test_without_a_prevalence_predictions_stay_for_training():
    judgement = judged(config_of())
    assert judgement.fields["predictions_for"] == "training"
    assert [scores.population for scores in judgement.scores] == ["labelled galaxies"]
    # The sky's alone says nothing of what the head believes in.
    selection = judged(config_of(sky_prevalence={"not ring": 0.95, "ring": 0.05})).selections["ring"]
    assert selection.prevalence == judgement.selections["ring"].prevalence == draw(4000, seed=2)[1].mean()


@pytest.mark.parametrize("sky", [None, {"not ring": 0.95, "ring": 0.05}])
def test_a_class_weight_counts_like_that_many_galaxies(sky):
    weighted = config_of(class_weights=[1, 3], training_prevalence={"not ring": 0.5, "ring": 0.5}, sky_prevalence=sky)
    repeated = config_of(training_prevalence={"not ring": 0.25, "ring": 0.75}, sky_prevalence=sky)
    own, expected = judged(weighted), judged(repeated)
    assert own.fields == expected.fields
    np.testing.assert_array_equal(own.probabilities, expected.probabilities)
    np.testing.assert_array_equal(own.probabilities_as_labelled, expected.probabilities_as_labelled)


def test_each_of_several_labels_has_a_threshold_where_it_is_known():
    logits, ring = draw(600, seed=3)
    labels = np.stack([ring, 1 - ring], axis=1).astype(float)
    labels[::7, 1] = np.nan
    outputs = np.stack([logits[:, 1], -logits[:, 1]], axis=1)
    config = config_of({0: "ring", 1: "no ring"}, problem_type="multi_label_classification")
    given = [[None if np.isnan(value) else value for value in row] for row in labels]  # as a table has it
    judgement = judge(
        config, validation_logits=outputs, validation_labels=given, test_logits=outputs, test_labels=given
    )
    assert set(judgement.fields["decision_threshold"]) == {"ring", "no ring"}
    known = int(np.isfinite(labels[:, 1]).sum())
    assert judgement.selections["no ring"].with_label + judgement.selections["no ring"].without_label == known


def test_the_share_of_each_label_leaves_out_what_is_not_known():
    assert prevalence_of([0, 1, 1, 1], "single_label_classification", count=3) == [0.25, 0.75, 0.0]
    shares = prevalence_of([[0, None], [1, 1]], "multi_label_classification", count=2)
    assert shares == [0.5, 1.0]


@pytest.mark.parametrize("mergers", [[0.0], [1.0, np.nan]])
def test_a_label_without_contrast_among_the_test_galaxies_costs_the_others_nothing(mergers):
    generator = np.random.default_rng(4)
    labels = np.stack([np.arange(400) % 2, np.arange(400) < 40], axis=1).astype(float)
    logits = 2 * generator.normal(2 * labels - 1.0)
    tested = np.stack([labels[40:, 0], np.resize(mergers, 360)], axis=1)
    equal, rare = {"ring": 0.5, "merger": 0.5}, {"ring": 0.02, "merger": 0.02}
    config = config_of(
        {0: "ring", 1: "merger"},
        problem_type="multi_label_classification",
        training_prevalence=equal,
        sky_prevalence=rare,
    )
    judgement = judge(
        config,
        validation_logits=logits,
        validation_labels=labels,
        test_logits=logits[40:],
        test_labels=tested,
    )
    own = judgement.probabilities_as_labelled
    assert own[:, 0].mean() == pytest.approx(0.5, abs=0.05)
    np.testing.assert_array_equal(own[:, 1], judgement.probabilities[:, 1])
    assert [list(scores.labels) for scores in judgement.scores] == [["ring"], ["ring"]]
    need = "the test galaxies need some with and some without it."
    assert judgement.remarks == [
        f"There are no scores of merger: {need}",
        f"The selections of merger can't be measured: {need}",
    ]


def test_a_class_that_no_test_galaxy_has_gets_no_probability_and_the_rest_is_scored():
    generator = np.random.default_rng(5)
    labels = np.arange(300) % 3
    logits = 2 * generator.normal(np.eye(3)[labels])
    names = ["smooth", "ring", "rare"]
    config = config_of(
        dict(enumerate(names)),
        training_prevalence=dict.fromkeys(names, 1 / 3),
        sky_prevalence=dict(zip(names, [0.97, 0.02, 0.01], strict=True)),
    )
    there = labels < 2
    judgement = judge(
        config,
        validation_logits=logits,
        validation_labels=labels,
        test_logits=logits[there],
        test_labels=labels[there],
    )
    own = judgement.probabilities_as_labelled
    assert own.sum(axis=0) == pytest.approx([100, 100, 0], abs=10)
    assert own.sum(axis=1) == pytest.approx(np.ones(200))
    (scores,) = judgement.scores
    assert list(scores.labels) == ["smooth", "ring"]
    assert scores.overall["accuracy"].value == pytest.approx(np.mean(own.argmax(axis=1) == labels[there]))
    need = "the test galaxies need some with and some without it."
    assert judgement.remarks == [
        f"There are no scores of rare: {need}",
        f"There are no scores for the sky, which has rare: {need}",
        f"No selection can be measured for the sky, which has rare: {need}",
    ]
    assert judgement.selections == {}
    judgement = judge(
        config,
        validation_logits=logits[there],
        validation_labels=labels[there],
        test_logits=logits,
        test_labels=labels,
    )
    need = "the validation galaxies need some with and some without it."
    assert judgement.remarks == [
        f"The probabilities are not calibrated, and no threshold selects rare: {need}",
        f"There are no thresholds for the sky, which has rare: {need}",
    ]
    assert judgement.fields["decision_threshold"] is None


@pytest.mark.parametrize("is_out_of_fold", [False, True])
def test_selections_of_three_classes_are_for_a_sky_with_the_share_of_each(is_out_of_fold):
    labels, means = np.arange(600) % 3, np.array([[0, 0], [3, 0], [3, 1.5]])  # what passes for a ring is often edge on
    places = means[labels] + np.random.default_rng(6).normal(size=(600, 2))
    logits = -((places[:, None] - means) ** 2).sum(axis=2) / 2
    names, shares = ["smooth", "ring", "edge on"], np.array([0.9, 0.05, 0.05])
    config = config_of(
        dict(enumerate(names)),
        training_prevalence=dict.fromkeys(names, 1 / 3),
        sky_prevalence=dict(zip(names, shares.tolist(), strict=True)),
    )
    galaxies, used = {"validation_logits": logits, "validation_labels": labels}, np.arange(600) >= 300 * is_out_of_fold
    judgement = judge(config, **galaxies, test_logits=logits, test_labels=labels)
    if is_out_of_fold:
        given = judgement.probabilities
        judgement = judge_out_of_fold(config, **galaxies, probabilities=given, labels=labels, is_validation=~used)
    for number, name in enumerate(names):
        selection, has_label = judgement.selections[name], labels == number
        selected = judgement.probabilities[:, number] >= selection.threshold
        purity = precision_score(has_label[used], selected[used], sample_weight=shares[labels[used]])
        assert (selection.prevalence, selection.purity.value) == pytest.approx((shares[number], purity))
        curve = selection_curve(judgement.probabilities[:, number], has_label, weights=shares[labels])
        assert f1_score(has_label, selected, sample_weight=shares[labels]) == pytest.approx(curve.f1.max())


def test_the_share_of_a_label_that_nobody_knows_is_not_a_number():
    shares = prevalence_of([[0, np.nan], [1, np.nan]], "multi_label_classification", count=2)
    assert shares == [0.5, pytest.approx(np.nan, nan_ok=True)]


def test_galaxies_of_one_class_allow_no_scores(balanced):
    logits, labels = draw(200, seed=2)
    others, validation = logits[labels == 0], {"validation_logits": logits, "validation_labels": labels}
    judgement = judge(balanced, **validation, test_logits=others, test_labels=np.zeros(len(others), int))
    assert judgement.scores == []
    assert judgement.selections == {}
    np.testing.assert_array_equal(judgement.probabilities_as_labelled, judgement.probabilities)
    out_of_fold = judge_out_of_fold(
        balanced,
        **validation,
        probabilities=judgement.probabilities,
        labels=np.zeros(len(others), int),
        is_validation=np.zeros(len(others), bool),
    )
    for own, whose in ((judgement, "test galaxies"), (out_of_fold, "galaxies out of fold")):
        need = f"the {whose} need some with and some without it."
        assert own.remarks == [
            f"There are no scores of ring: {need}",
            f"The selections of ring can't be measured: {need}",
        ]
