import numpy as np
import pytest
from scipy.stats import beta
from sklearn.calibration import calibration_curve
from sklearn.metrics import brier_score_loss

from zoobot_hf.evaluation.reliability import (
    calibration_error_by_chance,
    decompose_brier_score,
    expected_calibration_error,
    reliability_table,
)


@pytest.fixture
def galaxies():
    generator = np.random.default_rng(0)
    probability = generator.beta(0.7, 1.5, size=500)
    return probability, generator.random(500) < probability**1.5


def test_the_table_has_scikit_learns_bins(galaxies):
    table = reliability_table(*galaxies, bins=10)
    share, mean = calibration_curve(galaxies[1], galaxies[0], n_bins=10, strategy="quantile")
    assert table["share"].to_numpy() == pytest.approx(share)
    assert table["mean_probability"].to_numpy() == pytest.approx(mean)
    assert (table["galaxies"] == 50).all()
    hits = share * table["galaxies"]
    low = beta.ppf(0.05, hits + 0.5, table["galaxies"] - hits + 0.5)
    assert table["share_low"].to_numpy()[2:] == pytest.approx(low[2:])


def test_the_calibration_error_by_hand():
    probability, has_label = [0.1, 0.2, 0.3, 0.8, 0.9, 1.0], [0, 0, 1, 1, 1, 1]
    # The lower three: 0.2 said, 1/3 found; the upper three: 0.9 said, 1 found.
    assert expected_calibration_error(probability, has_label, bins=2) == pytest.approx((0.2 / 1.5 + 0.1) / 2)
    # Weighted: the one galaxy of the lower three with the label counts twice: (0.1 + 0.2 + 0.6) / 4 said, 1/2 found.
    weights = [1, 1, 2, 1, 1, 1]
    error = expected_calibration_error(probability, has_label, weights=weights, bins=2)
    assert error == pytest.approx(4 / 7 * 0.275 + 3 / 7 * 0.1)


def test_galaxies_of_the_same_probability_share_a_bin():
    # Sorted by truth as they are, a bin's edge between equal probabilities would make an error of nothing.
    probability, has_label = [0.5] * 100, [0] * 50 + [1] * 50
    assert expected_calibration_error(probability, has_label) == pytest.approx(0)
    assert len(reliability_table(probability, has_label)) == 1


@pytest.mark.parametrize("is_mirrored", [False, True])
def test_many_galaxies_of_one_probability_are_in_no_bin_with_others(is_mirrored):
    probability, has_label = np.repeat([0.05, 0.9], [950, 50]), np.repeat([1, 0, 1], [93, 905, 2])
    if is_mirrored:
        probability, has_label = 1 - probability, 1 - has_label
    by_hand = 0.95 * (93 / 950 - 0.05) + 0.05 * (0.9 - 2 / 50)
    assert expected_calibration_error(probability, has_label) == pytest.approx(by_hand)
    assert sorted(reliability_table(probability, has_label)["galaxies"]) == [50, 950]


def test_perfect_probabilities_have_the_error_of_chance():
    generator = np.random.default_rng(1)
    probability = generator.random(300)
    by_chance = calibration_error_by_chance(probability, draws=200)
    measured = [expected_calibration_error(probability, generator.random(300) < probability) for _ in range(200)]
    assert by_chance == pytest.approx(np.mean(measured), abs=0.004)
    assert 0.03 < by_chance < 0.08


@pytest.mark.parametrize("bins", [None, 1, 5, 10])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_parts_of_the_brier_score_add_up(galaxies, bins, weighted):
    probability, has_label = np.round(galaxies[0], 2), galaxies[1]
    weights = np.random.default_rng(2).random(500) if weighted else None
    parts = decompose_brier_score(probability, has_label, weights=weights, bins=bins)
    assert parts.score == pytest.approx(brier_score_loss(has_label, probability, sample_weight=weights))
    whole = parts.reliability - parts.resolution + parts.uncertainty
    whole += parts.within_bin_variance - parts.within_bin_covariance
    assert whole == pytest.approx(parts.score, abs=1e-12)
    share = np.average(has_label, weights=weights)
    assert parts.uncertainty == pytest.approx(share * (1 - share))
    if bins is None:  # Murphy's three parts
        assert (parts.within_bin_variance, parts.within_bin_covariance) == pytest.approx((0, 0), abs=1e-12)
    if bins == 1:
        assert parts.resolution == pytest.approx(0)


def test_murphys_parts_by_hand():
    # 0.2 is said of four galaxies, one of which has the label; 0.6 of two, one of which has.
    parts = decompose_brier_score([0.2] * 4 + [0.6] * 2, [1, 0, 0, 0, 1, 0], bins=None)
    assert parts.reliability == pytest.approx((4 * 0.05**2 + 2 * 0.1**2) / 6)
    assert parts.resolution == pytest.approx((4 * (1 / 4 - 1 / 3) ** 2 + 2 * (1 / 2 - 1 / 3) ** 2) / 6)
    assert parts.uncertainty == pytest.approx(2 / 9)


@pytest.mark.parametrize(
    ("probability", "has_label", "weights", "message"),
    [
        ([], [], None, "at least one galaxy"),
        ([0.5], [1, 0], None, r"have the shapes \(1,\), \(2,\) and \(1,\)"),
        ([1.5], [1], None, "probability is between 1.5 and 1.5; it lies in 0-1"),
        ([0.5], [np.nan], None, r"has_label holds \[nan\]; give True and False"),
        ([0.5], [1], [-1], "weights hold numbers below 0"),
    ],
)
def test_what_is_no_probability_is_refused(probability, has_label, weights, message):
    with pytest.raises(ValueError, match=message):
        expected_calibration_error(probability, has_label, weights=weights)
