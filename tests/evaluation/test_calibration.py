import logging
import warnings

import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from scipy.special import expit, softmax
from scipy.stats import beta, norm
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss

from zoobot_hf.evaluation import calibration
from zoobot_hf.evaluation.calibration import (
    conformal_sets,
    estimate_prevalence,
    expected_counts,
    fit_calibration,
    fit_conformal_thresholds,
    name_conformal_sets,
    prevalence_from_counts,
    probabilities_at_prevalence,
)
from zoobot_hf.evaluation.reliability import expected_calibration_error

SINGLE, MULTI = "single_label_classification", "multi_label_classification"
BALANCED = [0.5, 0.5]


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def draw_galaxies(generator, count, share, *, separation=2.0):
    """Classes, and the true logarithm of the likelihood ratio: the score has two Gaussians of width 1."""
    classes = (generator.random(count) < share).astype(int)
    score = generator.normal((2 * classes - 1) * separation / 2)
    return separation * score, classes


def draw_exactly(generator, without, having, **options):
    """The same with fixed numbers of both classes."""
    parts = [draw_galaxies(generator, n, share, **options) for n, share in ((without, 0.0), (having, 1.0))]
    return tuple(np.concatenate(both) for both in zip(*parts, strict=True))


def overconfident(ratios, *, temperature=1.7, shift=0.4):
    """Logits of a model that was trained on balanced classes, too sure of itself and a little off."""
    return np.stack([np.zeros(len(ratios)), temperature * ratios + shift], axis=1)


# Calibration ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [12, 800])
def test_the_temperature_is_the_most_probable_one(count):
    ratios, classes = draw_galaxies(np.random.default_rng(0), count, 0.5)
    logits = overconfident(ratios, shift=0)

    def doubt(temperature):
        likelihood = count * log_loss(classes, softmax(logits / temperature, axis=1))
        return likelihood - norm(1, 0.5).logpdf(1 / temperature)

    fitted = fit_calibration(logits, classes)
    best = minimize_scalar(doubt, bounds=(1, 3), method="bounded").x
    assert fitted.temperature == pytest.approx([best] * 2, abs=0.001)
    assert fitted.log_loss_after == pytest.approx(log_loss(classes, softmax(logits / best, axis=1)), abs=1e-5)
    assert fitted.log_loss_before == pytest.approx(log_loss(classes, softmax(logits, axis=1)))
    assert fitted.helps
    assert fitted.config_fields() == {"calibration_temperature": fitted.temperature[0], "calibration_shift": None}


def test_bias_corrected_scaling_of_two_classes_is_logistic_regression():
    ratios, classes = draw_galaxies(np.random.default_rng(1), 50_000, 0.3)  # so many that the prior says nothing
    logits = overconfident(ratios)
    fitted = fit_calibration(logits, classes, method="bias_corrected")
    regression = LogisticRegression(C=np.inf, tol=1e-10).fit(logits[:, 1:], classes)
    assert 1 / fitted.temperature[1] == pytest.approx(regression.coef_[0, 0], abs=1e-3)
    assert fitted.shift[1] - fitted.shift[0] == pytest.approx(regression.intercept_[0], abs=1e-3)
    assert softmax(fitted.apply(logits), axis=1) == pytest.approx(regression.predict_proba(logits[:, 1:]), abs=1e-3)


def test_vector_scaling_of_three_classes_finds_each_classes_scale():
    generator = np.random.default_rng(2)
    true = generator.normal(size=(20000, 3)) * 2
    classes = (softmax(true, axis=1).cumsum(axis=1) < generator.random((20000, 1))).sum(axis=1)
    temperature, shift = np.array([2.0, 1.0, 0.5]), np.array([0.5, 0.0, -0.5])
    fitted = fit_calibration((true - shift) * temperature, classes, method="vector")
    assert fitted.temperature == pytest.approx(temperature, rel=0.06)
    assert fitted.shift == pytest.approx(shift, abs=0.06)


def test_validation_galaxies_of_the_sky_calibrate_a_model_trained_balanced():
    # A model that is right for balanced galaxies is not shifted by what the sky's prevalence does to its odds.
    ratios, classes = draw_galaxies(np.random.default_rng(3), 20000, 0.05)
    logits = overconfident(ratios, temperature=1.5, shift=0)
    fitted = fit_calibration(logits, classes, training_prevalence=BALANCED)
    assert fitted.temperature[0] == pytest.approx(1.5, abs=0.06)
    here = np.log(np.bincount(classes) / len(classes) / BALANCED)
    assert fitted.log_loss_before == pytest.approx(log_loss(classes, softmax(logits + here, axis=1)))
    assert fitted.log_loss_after == pytest.approx(log_loss(classes, softmax(fitted.apply(logits) + here, axis=1)))
    known = fit_calibration(logits, classes, training_prevalence=BALANCED, method="bias_corrected")
    assert known.shift == pytest.approx([0, 0], abs=0.1)
    unknown = fit_calibration(logits, classes, method="bias_corrected")
    assert unknown.shift[1] - unknown.shift[0] == pytest.approx(np.log(0.05 / 0.95), abs=0.2)


def test_several_labels_are_calibrated_one_by_one_where_they_are_known():
    generator = np.random.default_rng(4)
    first, second = (draw_galaxies(generator, 600, 0.5) for _ in range(2))
    logits = np.stack([2 * first[0], 0.5 * second[0]], axis=1)
    labels = np.stack([first[1], second[1]], axis=1).astype(float)
    labels[:100, 1] = np.nan
    fitted = fit_calibration(logits, labels, problem_type=MULTI)
    alone = [
        fit_calibration(np.stack([0 * z, z], axis=1), y)
        for z, y in ((logits[:, 0], first[1]), (logits[100:, 1], second[1][100:]))
    ]
    assert fitted.temperature == pytest.approx([one.temperature[0] for one in alone], rel=1e-4)
    assert fitted.config_fields()["calibration_temperature"] == fitted.temperature
    with_shift = fit_calibration(logits + 1, labels, problem_type=MULTI, method="bias_corrected")
    assert expit(with_shift.apply(logits + 1)).mean(axis=0) == pytest.approx(np.nanmean(labels, axis=0), abs=0.02)


def test_galaxies_without_a_known_label_are_not_counted():
    ratios, classes = draw_galaxies(np.random.default_rng(8), 60, 0.5)
    labels = np.stack([classes, 1 - classes], axis=1).astype(float)
    labels[:20] = np.nan
    labels[20:30, 0] = np.nan
    assert fit_calibration(np.stack([ratios, -ratios], axis=1), labels, problem_type=MULTI).galaxies == 40


def test_calibration_that_does_not_help_changes_nothing_and_says_so(caplog):
    logits, classes = np.array([[0.0, 0.0]] * 4), [0, 1, 0, 1]
    fitted = fit_calibration(logits, classes)
    assert (fitted.temperature, fitted.shift, fitted.helps) == ([1.0, 1.0], [0.0, 0.0], False)
    assert fitted.log_loss_after == fitted.log_loss_before == pytest.approx(np.log(2))
    assert fitted.config_fields() == {"calibration_temperature": None, "calibration_shift": None}
    assert "can't lower the validation log loss of 0.6931 on 4 galaxies; the temperature stays 1" in caplog.text


@pytest.mark.parametrize("method", calibration.METHODS)
@pytest.mark.parametrize("seed", range(5))
def test_calibration_never_makes_the_log_loss_worse(method, seed):
    generator = np.random.default_rng(seed)
    classes = generator.permutation([0, 1, 2] * 5)
    for size in (0.01, 1, 100):
        logits = generator.normal(size=(15, 3)) * size
        fitted = fit_calibration(logits, classes, method=method)
        after = log_loss(classes, softmax(fitted.apply(logits), axis=1))
        assert after <= log_loss(classes, softmax(logits, axis=1)) + 1e-9
        assert after == pytest.approx(fitted.log_loss_after, abs=1e-6)


def test_few_galaxies_that_are_told_apart_without_error_hardly_make_a_model_surer():
    assert 0.8 < fit_calibration([[1.0, -1.0], [-1.0, 1.0]], [0, 1]).temperature[0] < 1
    assert 0.6 < fit_calibration([[1.0, -1.0], [-1.0, 1.0]] * 10, [0, 1] * 10).temperature[0] < 0.8


@pytest.mark.parametrize("method", calibration.METHODS)
def test_calibration_on_few_galaxies_costs_little(method):
    generator = np.random.default_rng(5)
    ratios, classes = draw_exactly(generator, 20_000, 20_000)
    logits = overconfident(ratios, temperature=1, shift=0)
    right = log_loss(classes, softmax(logits, axis=1))
    losses = []
    for _ in range(50):
        chosen = np.concatenate([generator.choice(np.flatnonzero(classes == label), 8) for label in (0, 1)])
        fitted = fit_calibration(logits[chosen], classes[chosen], method=method)
        losses.append(log_loss(classes, softmax(fitted.apply(logits), axis=1)))
    assert np.mean(losses) < right + {"temperature": 0.02, "bias_corrected": 0.05, "vector": 0.05}[method]


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        ([0, 0, 0], {}, r"labelled galaxies of each class are \[3, 0\]; .* larger validation split"),
        ([0, 1, 2], {}, "labels run from 0 to 2 for 2 classes"),
        ([0.7, 1.0, 0.0], {}, r"labels hold \[0.0, 0.7, 1.0\]; give whole numbers from 0 on"),
        (["a", "b", "a"], {}, r"labels hold \['a', 'b'\]; give whole numbers from 0 on"),
        ([0, 1], {}, r"labels have the shape \(2,\) and the scores \(3, 2\); give labels \(3,\)"),
        ([0, 1, 0], {"method": "magic"}, "method is 'magic'; choose one of temperature, bias_corrected, vector"),
        ([0, 1, 0], {"problem_type": "regression"}, "problem_type is 'regression'; choose one of single_label"),
        ([0, 1, 0], {"training_prevalence": [1.0]}, "the prevalence has 1 shares for 2 labels"),
        ([0, 1, 0], {"training_prevalence": [0.0, 1.0]}, "lies between 0 and 1, both excluded"),
        ([[0, 2], [1, 0], [0, 1]], {"problem_type": MULTI}, r"labels hold \[.*2.*\]; a multi-label one is 0, 1 or NaN"),
    ],
)
def test_labels_that_cannot_calibrate_are_refused(labels, options, message):
    with pytest.raises(ValueError, match=message):
        fit_calibration(np.ones((3, 2)), np.array(labels), **options)


def test_logits_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match=r"pass finite numbers, \(n, labels\), before softmax"):
        fit_calibration([[np.nan, 0.0]], [0])


# Prevalence -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("problem_type", [SINGLE, MULTI])
def test_probabilities_go_to_another_prevalence_and_back(problem_type):
    generator = np.random.default_rng(0)
    given = generator.dirichlet([1, 1, 1], size=50)
    there = {"assumed_prevalence": [0.2, 0.3, 0.5], "prevalence": [0.7, 0.25, 0.05]}
    back = {"assumed_prevalence": [0.7, 0.25, 0.05], "prevalence": [0.2, 0.3, 0.5]}
    moved = probabilities_at_prevalence(given, problem_type=problem_type, **there)
    assert not np.allclose(moved, given, atol=0.1)
    assert np.allclose(probabilities_at_prevalence(moved, problem_type=problem_type, **back), given)


def test_a_galaxy_that_was_nine_to_one_among_balanced_ones():
    # Odds of 9 to 1, times 5/95 against 1.
    moved = probabilities_at_prevalence([[0.1, 0.9]], assumed_prevalence=BALANCED, prevalence=[0.95, 0.05])
    odds = 9 * 0.05 / 0.95
    assert moved[0, 1] == pytest.approx(odds / (1 + odds))
    certain = probabilities_at_prevalence([[0.0, 1.0]], assumed_prevalence=BALANCED, prevalence=[0.95, 0.05])
    assert certain.tolist() == [[0.0, 1.0]]


def test_expectation_maximisation_finds_the_likeliest_shares():
    ratios = np.exp(np.random.default_rng(0).normal(size=(400, 2)) * [0, 1.5])
    found = calibration._maximise_expectation(ratios, np.array(BALANCED))
    grid = np.arange(0.001, 1, 0.001)
    likelihoods = [np.log(ratios @ [1 - share, share]).sum() for share in grid]
    assert found[1] == pytest.approx(grid[np.argmax(likelihoods)], abs=0.001)
    slow = np.array([0.2, 0.3, 0.5])
    three = np.exp(np.random.default_rng(1).normal(size=(300, 3)))
    for _ in range(5000):  # plain steps
        slow = slow * ((1 / len(three)) / (three @ slow) @ three)
    assert calibration._maximise_expectation(three, np.full(3, 1 / 3)) == pytest.approx(slow, abs=1e-4)


def test_prevalence_of_three_classes_is_found(caplog):
    generator = np.random.default_rng(5)
    true = np.array([0.7, 0.2, 0.1])

    def draw(counts):
        classes = np.repeat(np.arange(3), counts)
        points = generator.normal(size=(len(classes), 3)) + 2.5 * np.eye(3)[classes]
        return softmax(2.5 * points, axis=1), classes

    validation, labels = draw([150] * 3)
    catalog, _ = draw((3000 * true).astype(int))
    estimate = estimate_prevalence(
        catalog,
        assumed_prevalence=[1 / 3] * 3,
        validation_probabilities=validation,
        validation_labels=labels,
        draws=100,
    )
    assert estimate.shares == pytest.approx(true, abs=0.04)
    assert all(one.low < share < one.high for one, share in zip(estimate.prevalence, true, strict=True))
    assert estimate.assumption_holds
    assert caplog.text == ""
    counts = expected_counts(catalog, estimate, confidence=0.98)
    assert sum(count.value for count in counts) == pytest.approx(3000)
    assert all(count.low < 3000 * share < count.high for count, share in zip(counts, true, strict=True))


def test_each_of_several_labels_has_its_own_prevalence():
    generator = np.random.default_rng(6)
    catalog = [draw_galaxies(generator, 3000, share, separation=3) for share in (0.1, 0.6)]
    validation = [draw_galaxies(generator, 400, 0.5, separation=3) for _ in range(2)]
    estimate = estimate_prevalence(
        expit(np.stack([ratios for ratios, _ in catalog], axis=1)),
        assumed_prevalence=BALANCED,
        validation_probabilities=expit(np.stack([ratios for ratios, _ in validation], axis=1)),
        validation_labels=np.stack([classes for _, classes in validation], axis=1),
        problem_type=MULTI,
        draws=60,
    )
    assert estimate.shares == pytest.approx([0.1, 0.6], abs=0.04)
    assert len(estimate.p_values) == 2
    counts = expected_counts(expit(np.stack([ratios for ratios, _ in catalog], axis=1)), estimate)
    for count, (_, classes) in zip(counts, catalog, strict=True):
        assert count.low <= classes.sum() <= count.high


def estimate_from(generator, catalog, *, draws, validation_size=1000, seed=0):
    ratios, classes = draw_galaxies(generator, validation_size, 0.5)
    return estimate_prevalence(
        softmax(overconfident(catalog), axis=1),
        assumed_prevalence=BALANCED,
        validation_probabilities=softmax(overconfident(ratios), axis=1),
        validation_labels=classes,
        draws=draws,
        seed=seed,
    )


def test_without_labelled_galaxies_the_log_says_what_the_interval_lacks(caplog):
    ratios, _ = draw_galaxies(np.random.default_rng(0), 500, 0.2)
    probabilities = softmax(overconfident(ratios, temperature=1, shift=0), axis=1)
    estimate, other = (
        estimate_prevalence(probabilities, assumed_prevalence=BALANCED, draws=30, seed=seed) for seed in (0, 1)
    )
    assert estimate.shares == other.shares
    assert estimate.prevalence != other.prevalence
    assert estimate.assumption_holds is None
    assert "leaves out the error of the calibration" in caplog.text
    low, high = estimate.prevalence[1][1:]
    assert low < 0.2 < high


def test_a_catalog_of_other_galaxies_is_warned_of(caplog):
    # A third of the galaxies are of neither class: stars, say, that the model is sure of.
    generator = np.random.default_rng(7)
    ratios, _ = draw_galaxies(generator, 2000, 0.2)
    ratios[:600] = generator.normal(0, 0.3, size=600)
    estimate = estimate_from(generator, ratios, draws=120)
    assert estimate.assumption_holds is False
    assert "does not look like a mixture of the validation galaxies' classes (p = 0.008)" in caplog.text


def test_so_few_draws_that_no_p_value_is_small_do_not_test_the_assumption(caplog):
    generator = np.random.default_rng(7)
    catalog = generator.normal(0, 0.3, size=300)
    few, enough = (estimate_from(generator, catalog, draws=draws, validation_size=300) for draws in (99, 100))
    assert (few.p_value, few.assumption_holds) == (0.01, None)
    assert (enough.p_value, enough.assumption_holds) == (1 / 101, False)
    assert caplog.text.count("does not look like") == 1
    assert "without labelled galaxies" not in caplog.text


def test_the_test_of_the_assumption_rejects_a_true_one_as_rarely_as_it_says():
    generator = np.random.default_rng(8)
    p_values = []
    for _ in range(40):
        ratios, _ = draw_galaxies(generator, 500, 0.2)
        p_values += estimate_from(generator, ratios, draws=30, validation_size=300).p_values
    assert np.mean(np.array(p_values) < 0.1) <= 0.2  # 4 expected, and 8 or fewer in 98 of 100 such tests
    assert 0.3 < np.mean(p_values) < 0.7


def test_few_validation_galaxies_that_are_told_apart_without_error_leave_the_scale_near_one():
    ratios, _ = draw_galaxies(np.random.default_rng(3), 300, 0.1)
    classes = np.repeat([0, 1], 6)
    estimate = estimate_prevalence(
        softmax(overconfident(ratios, temperature=1, shift=0), axis=1),
        assumed_prevalence=BALANCED,
        validation_probabilities=softmax(overconfident(2.0 * classes - 1, temperature=1, shift=0), axis=1),
        validation_labels=classes,
        draws=20,
    )
    assert 1 < estimate.scale.max() < 2  # without a prior above 11


def test_the_smallest_of_many_p_values_does_not_break_the_assumption():
    generator = np.random.default_rng(23)
    labels = (generator.random((60, 8)) < 0.5).astype(float)
    validation, catalog = (
        expit(2 * generator.normal(2 * truth - 1.0)) for truth in (labels, generator.random((60, 8)) < 0.3)
    )
    options = {
        "assumed_prevalence": [0.5] * 8,
        "validation_probabilities": validation,
        "validation_labels": labels,
        "problem_type": MULTI,
        "draws": 100,
    }
    estimate = estimate_prevalence(catalog, **options)
    assert min(estimate.p_values) < calibration.DOUBTFUL
    assert estimate.assumption_holds
    catalog[:, 3] = 0.5  # a label that looks like neither of its classes
    assert not estimate_prevalence(catalog, **options).assumption_holds


def test_validation_probabilities_without_labels_are_refused():
    with pytest.raises(ValueError, match="validation_probabilities and validation_labels belong together"):
        estimate_prevalence([[0.5, 0.5]], assumed_prevalence=BALANCED, validation_probabilities=[[0.5, 0.5]])


def test_a_prevalence_for_other_labels_is_refused():
    with pytest.raises(ValueError, match="the prevalence has 3 shares for 2 labels"):
        estimate_prevalence([[0.5, 0.5]], assumed_prevalence=[0.3, 0.3, 0.4])


def test_the_prevalence_of_a_labelled_sample_has_its_posterior():
    estimate = prevalence_from_counts([19, 1], assumed_prevalence=BALANCED, draws=4000)
    assert estimate.shares == [0.95, 0.05]
    assert estimate.prevalence[1][1:] == pytest.approx(beta.ppf([0.05, 0.95], 1.5, 19.5), abs=0.005)
    options = {"assumed_prevalence": BALANCED, "problem_type": MULTI, "draws": 4000}
    several = prevalence_from_counts([30, 100], galaxies=200, **options)
    assert several.shares == [0.15, 0.5]
    assert several.prevalence[0][1:] == pytest.approx(beta.ppf([0.05, 0.95], 30.5, 170.5), abs=0.004)


@pytest.mark.parametrize("counts", [[10, 0], [10], [5, -1]])
def test_counts_without_a_galaxy_of_each_label_are_refused(counts):
    with pytest.raises(ValueError, match="each label needs galaxies with and without it"):
        prevalence_from_counts(counts, assumed_prevalence=BALANCED)


# Counts ---------------------------------------------------------------------------------------------------------


def test_counts_of_several_labels_need_the_size_of_the_sample():
    with pytest.raises(ValueError, match=r"galaxies is None; .*: give the size of the sample"):
        prevalence_from_counts([30, 20], assumed_prevalence=[0.3, 0.2], problem_type=MULTI)


def test_counts_without_any_other_error_have_that_of_drawing():
    # 1000 galaxies of 0.3 each: a binomial of mean 300 and width 14.5.
    estimate = prevalence_from_counts([70 * 10**6, 30 * 10**6], assumed_prevalence=[0.7, 0.3], draws=2000)
    count = expected_counts(np.tile([0.7, 0.3], (1000, 1)), estimate)[1]
    assert count.value == pytest.approx(300)
    assert (count.low, count.high) == pytest.approx((300 - 1.645 * 14.5, 300 + 1.645 * 14.5), abs=2.5)


def count_sky(seed, *, draws):
    """One sky of 5% with the label: a labelled sample to calibrate with, and a catalog to count."""
    generator = np.random.default_rng(seed)
    ratios, classes = draw_galaxies(generator, 2000, 0.05)
    catalog, truth = draw_galaxies(generator, 4000, 0.05)
    sky = np.bincount(classes) / len(classes)
    fitted = fit_calibration(overconfident(ratios), classes, method="bias_corrected", training_prevalence=BALANCED)
    probabilities, validation = (
        probabilities_at_prevalence(
            softmax(fitted.apply(overconfident(z)), axis=1), assumed_prevalence=BALANCED, prevalence=sky
        )
        for z in (catalog, ratios)
    )
    estimate = prevalence_from_counts(
        np.bincount(classes),
        assumed_prevalence=sky,
        validation_probabilities=validation,
        validation_labels=classes,
        draws=draws,
        seed=seed,
    )
    count = expected_counts(probabilities, estimate, seed=seed)[1]
    uncorrected = softmax(overconfident(catalog), axis=1)[:, 1]
    return count, probabilities[:, 1], uncorrected, truth


def check_skies(number, *, draws, at_least):
    inside, errors, uncorrected_errors, counts = 0, [], [], []
    for seed in range(number):
        count, probability, uncorrected, truth = count_sky(seed, draws=draws)
        inside += count.low <= truth.sum() <= count.high
        errors.append(expected_calibration_error(probability, truth))
        uncorrected_errors.append(expected_calibration_error(uncorrected, truth))
        counts.append([truth.sum(), count.value, uncorrected.sum()])
    mean = np.mean(counts, axis=0)
    print(
        f"\n{number} skies: in the interval {inside}; ECE {np.mean(errors):.4f} (at most {np.max(errors):.4f}), "
        f"uncorrected {np.mean(uncorrected_errors):.3f}; true, expected, uncorrected counts {mean.round(1).tolist()}"
    )
    assert np.mean(errors) <= 0.02
    assert np.mean(uncorrected_errors) > 0.1
    assert mean[2] > 3 * mean[0]
    assert inside >= at_least


def test_expected_counts_of_a_sky_hold_the_truth():
    check_skies(12, draws=60, at_least=9)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_expected_counts_of_a_hundred_skies_hold_the_truth():
    check_skies(100, draws=100, at_least=85)


def test_the_prevalence_of_a_catalog_is_in_the_interval():
    inside = 0
    for seed in range(12):
        generator = np.random.default_rng(seed)
        catalog, _ = draw_galaxies(generator, 2000, 0.2)
        estimate = estimate_from(generator, catalog, draws=40, validation_size=500, seed=seed)
        inside += estimate.prevalence[1].low <= 0.2 <= estimate.prevalence[1].high
    assert inside >= 9


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("share", [0.01, 0.05, 0.2, 0.5])
def test_the_prevalence_of_a_hundred_catalogs_is_in_the_interval(share):
    logging.disable(logging.WARNING)
    inside, values = 0, []
    for seed in range(100):
        generator = np.random.default_rng([seed, int(1000 * share)])
        catalog, _ = draw_galaxies(generator, 3000, share)
        low_and_high = estimate_from(generator, catalog, draws=100, seed=seed).prevalence[1]
        inside += low_and_high.low <= share <= low_and_high.high
        values.append(low_and_high.value)
    logging.disable(logging.NOTSET)
    print(f"\nprevalence {share}: in the interval {inside} of 100; mean {np.mean(values):.4f} +- {np.std(values):.4f}")
    assert inside >= 85


# Conformal sets -------------------------------------------------------------------------------------------------


def test_conformal_thresholds_by_hand():
    # Of 9 galaxies of class 1, a tenth one is below the lowest in 1 of 10 cases, below the second lowest in 2 of 10.
    probability = np.array([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9])
    given = np.concatenate([np.stack([1 - probability, probability], axis=1)] * 2)
    labels = [0] * 9 + [1] * 9
    assert fit_conformal_thresholds(given, labels, coverage=0.9) == pytest.approx([0.1, 0.1])
    assert fit_conformal_thresholds(given, labels, coverage=0.8) == pytest.approx([0.2, 0.2])
    assert fit_conformal_thresholds(given, labels, coverage=0.95).tolist() == [
        0,
        0,
    ]  # too few galaxies to leave one out


@pytest.mark.parametrize("coverage", [0.8, 0.9, 0.95])
@pytest.mark.parametrize("share", [0.05, 0.5])
def test_conformal_sets_cover_each_class_as_promised(coverage, share):
    generator = np.random.default_rng(0)
    covered = []
    for _ in range(40):
        ratios, classes = draw_exactly(generator, 400, 200)
        thresholds = fit_conformal_thresholds(softmax(overconfident(ratios), axis=1), classes, coverage=coverage)
        ratios, truth = draw_galaxies(generator, 20000, share)
        sets = conformal_sets(softmax(overconfident(ratios), axis=1), thresholds)
        held = sets[np.arange(len(truth)), truth]
        covered.append([held[truth == 0].mean(), held[truth == 1].mean()])
    assert np.mean(covered, axis=0) == pytest.approx([coverage, coverage], abs=0.02)


def test_sets_with_one_class_are_named_and_others_are_not():
    sets = conformal_sets([[0.9, 0.1], [0.5, 0.5], [0.2, 0.8], [0.35, 0.65]], [0.4, 0.4])
    assert name_conformal_sets(sets, ["not ring", "ring"]) == ["not ring", "can't tell", "ring", "ring"]
    assert conformal_sets([[0.4, 0.6]], [0.4, 0.6]).all()  # a threshold is some validation galaxy's probability
    empty = conformal_sets([[0.5, 0.5]], [0.6, 0.6])
    assert name_conformal_sets(empty, ["not ring", "ring"]) == ["can't tell"]


def test_conformal_sets_refuse_what_does_not_fit():
    with pytest.raises(ValueError, match="no galaxy of class 1"):
        fit_conformal_thresholds([[0.5, 0.5]], [0])
    with pytest.raises(ValueError, match="coverage is 90; give a share between 0 and 1"):
        fit_conformal_thresholds([[0.5, 0.5]], [0], coverage=90)
    with pytest.raises(ValueError, match=r"thresholds are .* for 2 classes; give one for each"):
        conformal_sets([[0.5, 0.5]], [0.1, 0.2, 0.3])


def overlapping_probabilities(count, share, *, assumed, seed):
    """Galaxies of a rare class, whose evidence is one standard deviation away from the others'."""
    generator = np.random.default_rng(seed)
    evidence = generator.normal((generator.random(count) < share) * 1.0, 1) - 0.5
    odds = np.exp(evidence) * assumed / (1 - assumed)
    return np.stack([1 / (1 + odds), odds / (1 + odds)], axis=1)


@pytest.mark.parametrize("assumed", [1e-6, 1e-5, 1e-3, 0.9])
def test_a_prevalence_does_not_stay_where_it_was_assumed(assumed):
    shares = [
        estimate_prevalence(
            overlapping_probabilities(20_000, 0.01, assumed=share, seed=5),
            assumed_prevalence=[1 - share, share],
            draws=2,
        ).shares[1]
        for share in (0.5, assumed)
    ]
    assert shares[0] == pytest.approx(shares[1], rel=1e-3)
    assert shares[0] > 1e-3


def test_the_interval_of_a_class_that_seems_absent_does_not_end_there():
    values = overlapping_probabilities(3000, 0.01, assumed=0.5, seed=20)
    estimate = estimate_prevalence(values, assumed_prevalence=[0.5, 0.5])
    share, low, high = estimate.prevalence[1]
    assert share < 1e-3
    assert low <= share
    assert high > 5e-3


@pytest.mark.parametrize("assumed", [[1.0, 0.0], [0.7, 0.7]])
def test_shares_that_are_none_are_refused(assumed):
    with pytest.raises(ValueError, match="prevalence"):
        estimate_prevalence([[0.5, 0.5], [0.3, 0.7]], assumed_prevalence=assumed)
    with pytest.raises(ValueError, match="prevalence"):
        prevalence_from_counts([1, 2], assumed_prevalence=assumed)
