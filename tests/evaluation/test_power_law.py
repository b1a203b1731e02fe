import math

import numpy as np
import pytest
from scipy.optimize import curve_fit
from scipy.stats import t as student

from zoobot_hf.evaluation import power_law
from zoobot_hf.evaluation.power_law import EXPONENTS, PowerLaw, extrapolate, fit_power_law

NUMBERS = np.array([5, 10, 20, 40, 80, 160])


def test_an_exact_law_is_found_again():
    law = fit_power_law(NUMBERS, PowerLaw(0.1, 0.8, 0.5)(NUMBERS))
    assert law(NUMBERS) == pytest.approx(PowerLaw(0.1, 0.8, 0.5)(NUMBERS), abs=2e-4)
    assert law == pytest.approx((0.1, 0.8, 0.5), rel=0.05)


@pytest.mark.parametrize("floor", [0.15, -0.05])
def test_the_fit_is_as_good_as_scipys(floor):
    generator = np.random.default_rng(0)
    errors = floor + 0.6 * NUMBERS**-0.4 + generator.normal(scale=0.01, size=6)
    weights = 1 / generator.uniform(0.01, 0.03, size=6) ** 2
    law = fit_power_law(NUMBERS, errors, weights=weights)

    def formula(labels, floor, scale, exponent):
        return floor + scale * labels**-exponent

    theirs, _ = curve_fit(
        formula, NUMBERS.astype(float), errors, [0.1, 0.5, 0.5], weights**-0.5, bounds=([0, 0, 0.02], [1, 10, 3])
    )
    ours, best = (weights @ (errors - curve) ** 2 for curve in (law(NUMBERS), formula(NUMBERS, *theirs)))
    assert ours == pytest.approx(best, rel=1e-2)  # the exponents lie 2.5% apart


def test_the_labels_for_an_error_by_hand():
    law = PowerLaw(0.1, 1.0, 0.5)
    assert law.labels_for(0.2) == pytest.approx(100)
    assert law.labels_for(0.1) == math.inf
    assert PowerLaw(0.1, 0.5, 0.001).labels_for(0.2) == math.inf  # 5 ** 1000


def runs(law, *, noise, seeds=20):
    generator = np.random.default_rng(1)
    return law(NUMBERS) + generator.normal(scale=noise, size=(seeds, 6))


def test_the_labels_for_one_more_point_are_told_with_an_interval():
    # 1 / sqrt(160) is 0.0791 above the floor; 0.0691 above it takes 209.7 galaxies of each class.
    found = extrapolate(NUMBERS, runs(PowerLaw(0.05, 1.0, 0.5), noise=0.005), classes=2)
    assert found.can_tell
    assert found.more.value == pytest.approx(2 * (0.069057**-2 - 160), rel=0.1)
    assert found.more.low < 2 * (0.069057**-2 - 160) < found.more.high
    assert found.describe().startswith("about ")
    assert "more labels beyond 160 of each class for 1 more point of accuracy (90% interval: " in found.describe()


def test_the_interval_holds_the_truth_as_often_as_promised():
    law, truth = (
        PowerLaw(0.05, 0.9, 0.5),
        2 * (PowerLaw(0.05, 0.9, 0.5).labels_for(0.05 + 0.9 * 160**-0.5 - 0.01) - 160),
    )
    generator = np.random.default_rng(2)
    held = 0
    for seed in range(60):
        errors = law(NUMBERS) + generator.normal(scale=0.01, size=(20, 6))
        more = extrapolate(NUMBERS, errors, classes=2, draws=200, seed=seed).more
        held += more.low <= truth <= more.high
    assert held >= 48


@pytest.mark.parametrize(("value", "low", "high"), [(500, 49, 950), (20, 20, 950), (990, 49, 990)])
def test_the_interval_has_the_middle_of_the_draws_and_the_value(value, low, high, monkeypatch):
    more = iter([*np.random.default_rng(0).permutation(1000), value])
    monkeypatch.setattr(power_law, "_more_labels", lambda law, labels: float(next(more)))
    found = extrapolate(NUMBERS, runs(PowerLaw(0.05, 1.0, 0.5), noise=0.005), classes=3)
    assert found.more == (3 * value, 3 * low, 3 * high)


@pytest.mark.parametrize(("reach", "can_tell"), [(9.9, True), (10.1, False)])
def test_ten_times_the_labels_that_were_tried_is_as_far_as_a_law_is_believed(reach, can_tell):
    exponent = EXPONENTS[140]
    law = PowerLaw(0.05, 0.01 / (160**-exponent - (160 * reach) ** -exponent), exponent)
    found = extrapolate(NUMBERS, np.tile(law(NUMBERS), (2, 1)), classes=2)
    assert found.more == pytest.approx([2 * (reach - 1) * 160] * 3, rel=1e-6)
    assert found.can_tell is can_tell


def test_means_are_drawn_from_students_distribution_and_weighed_by_their_scatter():
    errors = 0.5 + np.random.default_rng(4).normal(size=(3, 6)) * np.linspace(0.03, 0.003, 6)
    drawn = power_law._draw_means(errors, draws=10000, seed=0)
    deviations = (drawn - errors.mean(axis=0)) / (errors.std(axis=0, ddof=1) / 3**0.5)
    assert np.quantile(deviations, 0.95, axis=0) == pytest.approx([student.ppf(0.95, df=2)] * 6, rel=0.1)
    law = extrapolate(NUMBERS, errors, classes=2, draws=2).law
    assert law == fit_power_law(NUMBERS, errors.mean(axis=0), weights=1 / errors.var(axis=0, ddof=1))


def test_a_flat_curve_says_that_it_can_not_tell():
    flat = extrapolate(NUMBERS, runs(PowerLaw(0.3, 2.0, 2.0), noise=0.0005), classes=2)
    assert not flat.can_tell
    assert flat.more.value == math.inf
    assert flat.describe() == (
        "no number of labels beyond 160 of each class seems to bring 1 more point of accuracy: the curve is flat"
    )
    noisy = extrapolate(NUMBERS, runs(PowerLaw(0.25, 0.5, 0.5), noise=0.08), classes=2)
    assert not noisy.can_tell
    assert "can't tell how many more labels beyond 160 of each class bring 1 more point" in noisy.describe()


def test_too_few_points_or_seeds_are_refused():
    with pytest.raises(ValueError, match=r"labels are \[5, 10, 20\]; a power law needs at least 4 different numbers"):
        fit_power_law([5, 10, 20], [0.5, 0.4, 0.3])
    with pytest.raises(ValueError, match="errors are of 1 seed"):
        extrapolate(NUMBERS, np.ones((1, 6)), classes=2)


def test_the_interval_of_three_seeds_is_not_three_times_too_narrow():
    law, generator = PowerLaw(0.05, 0.6, 0.6), np.random.default_rng(5)
    truth = 2 * (law.labels_for(float(law(160)) - 0.01) - 160)
    held = 0
    for seed in range(60):
        errors = law(NUMBERS) + generator.normal(size=(3, 6)) * 0.05 * (5 / NUMBERS) ** 0.3
        more = extrapolate(NUMBERS, errors, classes=2, draws=200, seed=seed).more
        held += more.low <= truth <= more.high
    assert held >= 40  # of runs drawn again, 26
