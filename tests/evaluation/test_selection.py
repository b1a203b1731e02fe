import json

import numpy as np
import pytest
from astropy.stats import binom_conf_interval
from scipy.special import softmax
from sklearn.metrics import f1_score, precision_recall_curve, precision_score, recall_score, roc_curve

from zoobot_hf.evaluation.intervals import class_weights_for
from zoobot_hf.evaluation.selection import (
    choose_threshold,
    completeness_by_column,
    measure_selection,
    selection_curve,
)


@pytest.fixture
def galaxies():
    generator = np.random.default_rng(0)
    has_label = generator.random(400) < 0.5
    return np.round(1 / (1 + np.exp(-generator.normal(2 * has_label - 1.0, 1.0))), 2), has_label


@pytest.mark.parametrize("share", [None, 0.05])
def test_the_curve_is_scikit_learns(galaxies, share):
    probability, has_label = galaxies
    weights = class_weights_for(has_label, None if share is None else [1 - share, share])
    curve = selection_curve(probability, has_label, weights=weights)
    purity, completeness, levels = precision_recall_curve(has_label, probability, sample_weight=weights)
    assert curve.purity[::-1] == pytest.approx(purity[:-1])
    assert curve.completeness[::-1] == pytest.approx(completeness[:-1])
    rate = roc_curve(has_label, probability, sample_weight=weights, drop_intermediate=False)[0]
    assert curve.false_positive_rate == pytest.approx(rate[1:])
    assert ((curve.thresholds < levels[::-1]) & (curve.thresholds > np.append(levels[::-1][1:], -0.01))).all()


@pytest.mark.parametrize(("aim", "goal"), [("purity", 0.8), ("completeness", 0.8), ("f1", None)])
def test_the_threshold_meets_its_aim_best(galaxies, aim, goal):
    probability, has_label = galaxies
    chosen = choose_threshold(probability, has_label, aim=aim, at_least=goal, prevalence=0.3)
    weights = class_weights_for(has_label, [0.7, 0.3])
    tried = {}
    for threshold in np.arange(0, 1, 0.005):
        predicted = probability >= threshold
        purity = precision_score(has_label, predicted, sample_weight=weights, zero_division=0)
        completeness = recall_score(has_label, predicted, sample_weight=weights)
        f1 = 2 * purity * completeness / max(purity + completeness, 1e-9)
        tried[threshold] = {"purity": purity, "completeness": completeness, "f1": f1}
    allowed = [one for one in tried.values() if goal is None or one[aim] >= goal]
    other = {"purity": "completeness", "completeness": "purity", "f1": "f1"}[aim]
    best = max(one[other] for one in allowed)
    assert getattr(chosen, other).value == pytest.approx(best)
    assert getattr(chosen, aim).value >= (goal or 0)
    assert chosen.aim == ("best F1" if aim == "f1" else f"{aim} of at least {goal}")
    assert chosen.prevalence == 0.3


def test_a_purity_that_cannot_be_reached_says_what_can_be():
    probability, has_label = [0.9, 0.8, 0.7, 0.6], [1, 0, 1, 0]
    message = r"a purity of 0.9 can't be reached: .* where 50.00% have the label, is 0.667, at a completeness of 1.000"
    with pytest.raises(ValueError, match=message):
        choose_threshold(probability, [0, 1, 1, 0], aim="purity", at_least=0.9)
    assert choose_threshold(probability, has_label, aim="purity", at_least=0.9).completeness.value == 0.5
    assert choose_threshold(probability, [1, 1, 0, 1], aim="purity", at_least=0.75).completeness.value == 1


@pytest.mark.parametrize(
    ("aim", "goal", "message"),
    [
        ("beauty", 0.9, "aim is 'beauty'; choose one of purity, completeness, f1"),
        (
            "purity",
            None,
            r"at_least is None; give the purity to be reached, .* as at_least \(in .*: decision_at_least\)",
        ),
        ("completeness", 90, "at_least is 90; give the completeness to be reached"),
        ("f1", 0.9, r"leave it out, or choose purity or completeness as aim \(in finetuning: decision_aim\)"),
    ],
)
def test_an_aim_that_does_not_exist_is_refused(aim, goal, message):
    with pytest.raises(ValueError, match=message):
        choose_threshold([0.1, 0.9], [0, 1], aim=aim, at_least=goal)


def test_galaxies_of_one_kind_are_refused():
    with pytest.raises(ValueError, match=r"all 2 galaxies are with the label; .* need some of both kinds"):
        choose_threshold([0.1, 0.9], [1, 1], aim="f1")
    with pytest.raises(ValueError, match="0 galaxies are with the label and 2 without"):
        measure_selection([0.1, 0.9], [0, 0], threshold=0.5)
    with pytest.raises(ValueError, match="0 galaxies are with the label and 2 without"):
        choose_threshold([0.1, 0.9], [0, 0], aim="f1", prevalence=[0.3, 0.7], classes=[0, 1])
    with pytest.raises(ValueError, match=r"prevalence is 1\.0; give the share of galaxies with the label"):
        measure_selection([0.1, 0.9], [0, 1], threshold=0.5, prevalence=1.0)


def test_purity_is_that_of_the_sky_and_completeness_that_of_any_sky():
    probability = [0.9] * 9 + [0.1] + [0.9] + [0.1] * 9
    has_label = [1] * 10 + [0] * 10
    balanced = measure_selection(probability, has_label, threshold=0.9)  # which selects 0.9 as well
    sky = measure_selection(probability, has_label, threshold=0.9, prevalence=0.05)
    assert (balanced.prevalence, sky.prevalence) == (0.5, 0.05)
    assert balanced.purity.value == pytest.approx(0.9)
    assert sky.purity.value == pytest.approx(0.05 * 0.9 / (0.05 * 0.9 + 0.95 * 0.1))
    assert sky.completeness == balanced.completeness
    assert sky.completeness == pytest.approx(
        (0.9, *binom_conf_interval(9, 10, confidence_level=0.9, interval="jeffreys"))
    )
    assert sky.f1.value == pytest.approx(2 / (1 / sky.purity.value + 1 / 0.9))
    assert json.loads(json.dumps(sky.to_dict()))["purity"]["value"] == sky.purity.value


def test_no_false_positive_among_few_galaxies_is_no_proof_of_purity():
    selection = measure_selection([0.9] * 20 + [0.1] * 50, [1] * 20 + [0] * 50, threshold=0.5, prevalence=0.05)
    assert selection.purity.value == selection.purity.high == 1
    # With 1 in 50 false: 0.05 / (0.05 + 0.95 / 50) = 0.72.
    assert 0.5 < selection.purity.low < 0.75


def test_the_interval_of_purity_holds_the_truth_as_often_as_it_says():
    generator = np.random.default_rng(1)
    true = 0.05 * 0.8 / (0.05 * 0.8 + 0.95 * 0.02)
    inside = 0
    for _ in range(300):
        hits, mistakes = generator.binomial(60, 0.8), generator.binomial(200, 0.02)
        probability = [0.9] * hits + [0.1] * (60 - hits) + [0.9] * mistakes + [0.1] * (200 - mistakes)
        interval = measure_selection(probability, [1] * 60 + [0] * 200, threshold=0.5, prevalence=0.05).purity
        inside += interval.low <= true <= interval.high
    assert 0.85 < inside / 300 < 0.96


def test_a_selection_of_nothing_has_no_purity():
    selection = measure_selection([0.1, 0.2], [0, 1], threshold=0.9)
    assert np.isnan(selection.purity.value)
    assert selection.completeness.value == 0


def test_completeness_along_a_column():
    magnitude = [17.0, 17.5, 18.0, 18.5, 19.0, np.nan, 17.2]
    probability = [0.9, 0.4, 0.5, 0.9, 0.1, 0.9, 0.9]
    has_label = [1, 1, 1, 1, 1, 1, 0]
    table = completeness_by_column(magnitude, probability, has_label, threshold=0.5, bins=[17, 18, 19, 20])
    assert table["galaxies"].tolist() == [2, 2, 1]
    assert table["selected"].tolist() == [1, 2, 0]
    assert table["completeness"].tolist() == [0.5, 1, 0]
    low, high = binom_conf_interval(1, 2, confidence_level=0.9, interval="jeffreys")
    assert table.loc[0, ["completeness_low", "completeness_high"]].tolist() == pytest.approx([low, high])
    halves = completeness_by_column(magnitude, probability, has_label, threshold=0.5, bins=2)
    assert halves["galaxies"].sum() == 5
    assert halves[["low", "high"]].to_numpy().tolist() == [[17.0, 18.0], [18.0, 19.0]]
    inner = completeness_by_column(magnitude, probability, has_label, threshold=0.5, bins=[17.5, 18.5])
    assert inner["galaxies"].tolist() == [3]
    empty = completeness_by_column(magnitude, probability, has_label, threshold=0.5, bins=[17, 20, 21])
    assert empty["galaxies"].tolist() == [5, 0]
    assert np.isnan(empty["completeness"].iloc[1])


@pytest.mark.parametrize(
    ("values", "bins", "message"),
    [
        ([1.0], 2, r"values have the shape \(1,\) for 2 galaxies"),
        ([1.0, np.nan], 2, "no galaxy with the label has a value"),
        ([1.0, 2.0], [3, 2], r"bins are \[3.0, 2.0\]; give rising edges"),
    ],
)
def test_a_column_that_does_not_fit_is_refused(values, bins, message):
    with pytest.raises(ValueError, match=message):
        completeness_by_column(values, [0.5, 0.5], [0, 1], threshold=0.5, bins=bins)


def test_of_thresholds_of_equal_purity_the_most_complete_is_chosen():
    probability = np.linspace(0.05, 0.95, 20)
    chosen = choose_threshold(probability, probability > 0.5, aim="completeness", at_least=0.5)
    assert chosen.completeness.value == 1
    assert chosen.purity.value == 1
    assert chosen.threshold == pytest.approx(0.5)


def test_a_threshold_between_two_neighbouring_floats_selects_the_higher_alone():
    chosen = choose_threshold([0.25, 0.75, np.nextafter(0.75, 1)], [0, 0, 1], aim="f1")
    assert chosen.threshold > 0.75
    assert chosen.f1.value == 1


SKY = [0.9, 0.05, 0.05]


def draw_three(counts, generator):
    """Probabilities of class 1 in the sky, which class 2 resembles more than class 0 does, and class numbers."""
    means = np.array([[0, 0], [3, 0], [3, 1.5]])
    classes = np.repeat(np.arange(3), counts)
    places = means[classes] + generator.normal(size=(len(classes), 2))
    return softmax(np.log(SKY) - ((places[:, None] - means) ** 2).sum(axis=2) / 2, axis=1)[:, 1], classes


@pytest.mark.parametrize(("aim", "goal"), [("purity", 0.6), ("completeness", 0.8), ("f1", None)])
def test_of_three_classes_all_have_their_share_of_the_sky(aim, goal):
    generator = np.random.default_rng(3)
    given, classes = draw_three([4000] * 3, generator)
    chosen = choose_threshold(given, classes == 1, aim=aim, at_least=goal, prevalence=SKY, classes=classes)
    sky, sky_classes = draw_three(generator.multinomial(200_000, SKY), generator)
    selected = sky >= chosen.threshold
    assert chosen.prevalence == pytest.approx(0.05)
    assert chosen.purity.value == pytest.approx(precision_score(sky_classes == 1, selected), abs=0.02)
    assert chosen.completeness.value == pytest.approx(recall_score(sky_classes == 1, selected), abs=0.02)
    assert chosen.false_positive_rate.value == pytest.approx(selected[sky_classes != 1].mean(), abs=0.002)
    assert chosen.f1.value == pytest.approx(f1_score(sky_classes == 1, selected), abs=0.02)
    curve = selection_curve(sky, sky_classes == 1)
    allowed = goal is None or getattr(curve, aim) >= goal
    other = {"purity": "completeness", "completeness": "purity", "f1": "f1"}[aim]
    best = np.where(allowed, getattr(curve, other), 0).max()
    assert getattr(chosen, other).value == pytest.approx(best, abs=0.03)
    # Galaxies that are not of the class, as they were labelled, are another mixture.
    assert measure_selection(given, classes == 1, threshold=chosen.threshold, prevalence=0.05).purity.high < (
        chosen.purity.low
    )


def test_the_intervals_of_three_classes_hold_the_truth_as_often_as_they_say():
    generator, rates = np.random.default_rng(1), np.array([0.02, 0.8, 0.3])
    false = (0.9 * 0.02 + 0.05 * 0.3) / 0.95
    true = {"purity": 0.05 * 0.8 / (0.05 * 0.8 + 0.95 * false), "false_positive_rate": false}
    classes, inside = np.repeat(np.arange(3), [100, 60, 40]), dict.fromkeys(true, 0)
    for _ in range(300):
        given = np.where(generator.random(200) < rates[classes], 0.9, 0.1)
        selection = measure_selection(given, classes == 1, threshold=0.5, prevalence=SKY, classes=classes)
        for name, value in true.items():
            estimate = getattr(selection, name)
            inside[name] += estimate.low <= value <= estimate.high
    assert all(0.85 < count / 300 < 0.96 for count in inside.values()), inside


def test_of_two_classes_the_share_of_one_says_it_all(galaxies):
    probability, has_label = galaxies
    for options in ({"aim": "f1"}, {"aim": "purity", "at_least": 0.5}):
        one = choose_threshold(probability, has_label, prevalence=0.05, **options)
        assert choose_threshold(probability, has_label, prevalence=[0.95, 0.05], classes=has_label, **options) == one


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prevalence": [0.9, 0.1]}, r"prevalence is \[0.9, 0.1\]; give the share of galaxies with the label, between"),
        ({"prevalence": 0.1, "classes": [0, 1, 2]}, r"prevalence is 0.1; give .* or with classes the share of each"),
        ({"prevalence": SKY, "classes": [0, 1]}, r"classes, of the shape \(2,\), don't go with has_label, .* \(3,\)"),
        ({"prevalence": SKY, "classes": [1, 1, 2]}, "one of them for all galaxies with the label, and for no others"),
        ({"prevalence": SKY, "classes": [0, 1, 0]}, r"galaxies of each class are \[2, 1, 0\]"),
    ],
)
def test_shares_that_are_not_those_of_the_classes_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        measure_selection([0.1, 0.9, 0.2], [0, 1, 0], threshold=0.5, **options)


@pytest.mark.parametrize("labels", [[0, 1, np.nan], [-1, 1, 1]])
def test_labels_that_are_not_true_or_false_are_refused(labels):
    message = "has_label holds .*; give True and False for known labels only"
    with pytest.raises(ValueError, match=message):
        choose_threshold([0.1, 0.2, 0.9], labels, aim="f1", prevalence=0.1)
    with pytest.raises(ValueError, match=message):
        measure_selection([0.1, 0.2, 0.9], labels, threshold=0.5, prevalence=0.1)
