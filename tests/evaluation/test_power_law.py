import math

import numpy as np
import pytest
from scipy.optimize import curve_fit

from zoobot_hf.evaluation.power_law import PowerLaw, extrapolate, fit_power_law

NUMBERS = np.array([5, 10, 20, 40, 80, 160])


def test_an_exact_law_is_found_again():
    law = fit_power_law(NUMBERS, PowerLaw(0.1, 0.8, 0.5)(NUMBERS))
    assert law(NUMBERS) == pytest.approx(PowerLaw(0.1, 0.8, 0.5)(NUMBERS), abs=2e-4)
    assert law == pytest.approx((0.1, 0.8, 0.5), rel=0.05)


def test_the_fit_is_as_good_as_scipys():
    generator = np.random.default_rng(0)
    errors = 0.15 + 0.6 * NUMBERS**-0.4 + generator.normal(scale=0.01, size=6)
    weights = 1 / generator.uniform(0.01, 0.03, size=6) ** 2
    law = fit_power_law(NUMBERS, errors, weights=weights)

    def formula(labels, floor, scale, exponent):
        return floor + scale * labels**-exponent

    theirs, _ = curve_fit(
        formula, NUMBERS.astype(float), errors, [0.1, 0.5, 0.5], weights**-0.5, bounds=([0, 0, 0.02], [1, 10, 3])
    )
    ours, best = (weights @ (errors - curve) ** 2 for curve in (law(NUMBERS), formula(NUMBERS, *theirs)))
    assert ours == pytest.approx(best, rel=1e-3)


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
