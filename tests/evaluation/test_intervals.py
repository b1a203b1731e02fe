import numpy as np
import pytest
from scipy.stats import beta

from zoobot_hf.evaluation.intervals import (
    bootstrap_counts,
    bootstrap_estimates,
    class_weights_for,
    draw_with_ends,
    interval_of_draws,
    share_with_interval,
)


def test_the_interval_of_a_share_is_that_of_jeffreys():
    share = share_with_interval(7, 10, confidence=0.9)
    assert share == pytest.approx((0.7, *beta.ppf([0.05, 0.95], 7.5, 3.5)))
    all_of_them = share_with_interval(10, 10, confidence=0.9)
    assert (all_of_them.value, all_of_them.high) == (1, 1)
    assert 0.8 < all_of_them.low < 0.9
    assert np.isnan(share_with_interval(0, 0)).all()


def test_an_interval_holds_the_middle_draws_and_the_value():
    assert interval_of_draws(50, np.arange(1, 100), confidence=0.9) == pytest.approx((50, 5, 95))
    assert interval_of_draws(120, np.arange(1, 100), confidence=0.9) == pytest.approx((120, 5, 120))
    assert interval_of_draws(50, [np.nan, *range(1, 100)], confidence=0.9) == pytest.approx((50, 5, 95))


@pytest.mark.parametrize("confidence", [0, 1, 90])
def test_a_confidence_that_is_no_share_is_refused(confidence):
    with pytest.raises(ValueError, match=f"confidence is {confidence}; give a share between 0 and 1"):
        interval_of_draws(0, [0, 1], confidence=confidence)


def test_weights_give_each_class_its_share_of_the_sky():
    labels = np.array([0, 0, 1, 1, 1, 1])
    weights = class_weights_for(labels, [0.9, 0.1])
    assert weights[labels == 0].sum() / weights.sum() == pytest.approx(0.9)
    assert weights.sum() == pytest.approx(6)
    assert class_weights_for(labels, None).tolist() == [1] * 6


@pytest.mark.parametrize("prevalence", [[0.5, 0.4, 0.1], [0.5, 0.1], [0.5, 0.49], [1.0]])
def test_a_sky_that_the_galaxies_cannot_stand_for_is_refused(prevalence):
    with pytest.raises(
        ValueError, match=r"galaxies of each class are \[2, 1.*\]; .* at least one galaxy of each class"
    ):
        class_weights_for([0, 0, 1], prevalence)


def test_every_draw_has_as_many_galaxies_of_each_class():
    strata = np.array([0] * 50 + [1] * 3)
    drawn = list(bootstrap_counts(strata, draws=20, seed=0))
    assert {(counts[:50].sum(), counts[50:].sum()) for counts in drawn} == {(50, 3)}
    assert len({tuple(counts) for counts in drawn}) == 20
    assert np.mean([counts[0] for counts in bootstrap_counts(strata, draws=2000, seed=0)]) == pytest.approx(1, abs=0.1)


def test_the_bootstrap_of_a_mean_has_its_standard_error():
    strata = np.repeat([0, 1], [100, 300])
    values, weights_in_sky = np.random.default_rng(0).normal(5 * strata), class_weights_for(strata, [0.9, 0.1])

    def estimate(**options):
        def score(weights):
            return {"mean": float(np.average(values, weights=weights))}

        return bootstrap_estimates(score, strata, weights_in_sky, draws=1000, **options)["mean"]

    first, second = values[:100], values[100:]
    mean = 0.9 * first.mean() + 0.1 * second.mean()
    error = np.hypot(0.9 * first.std() / 10, 0.1 * second.std() / 300**0.5)
    assert estimate() == pytest.approx((mean, mean - 1.645 * error, mean + 1.645 * error), abs=0.15 * error)
    half = estimate(confidence=0.5, seed=1)
    assert half == pytest.approx((mean, mean - 0.674 * error, mean + 0.674 * error), abs=0.15 * error)
    assert estimate(confidence=0.5, seed=2) != half


def test_draws_that_nearly_all_agree_say_nothing_about_the_truth():
    scores = iter([0.0, 0.7, *[0.0] * 99])
    estimates = bootstrap_estimates(
        lambda weights: {"share": 1.0, "completeness": next(scores)}, np.zeros(40), np.ones(40), draws=100
    )
    assert estimates["share"] == pytest.approx((1.0, np.nan, np.nan), nan_ok=True)
    assert estimates["completeness"] == pytest.approx((0.0, np.nan, np.nan), nan_ok=True)


@pytest.mark.parametrize("selected", [0, 3, 25])
def test_the_drawn_share_above_a_threshold_has_the_interval_of_jeffreys(selected):
    strata = np.repeat([0, 1], [25, 60])
    weights = class_weights_for(strata, [0.9, 0.1])
    is_above = np.concatenate([np.arange(25) < selected, np.ones(60), [False, True, False, True]])
    shares = []
    for drawn in draw_with_ends(strata, weights, draws=4000, seed=0):
        of_first = np.append(np.repeat([1, 0], [25, 60]), [1, 1, 0, 0]) == 1
        assert drawn[of_first].sum() == pytest.approx(0.9 * 85)
        assert drawn[~of_first].sum() == pytest.approx(0.1 * 85)
        shares.append(drawn[of_first] @ is_above[of_first] / (0.9 * 85))
    jeffreys = beta.ppf([0.05, 0.95], selected + 0.5, 25 - selected + 0.5)
    assert np.quantile(shares, [0.05, 0.95]) == pytest.approx(jeffreys, abs=0.01)
    one, other = (next(draw_with_ends(strata, weights, draws=1, seed=seed)) for seed in (1, 2))
    assert not np.allclose(one, other)


@pytest.mark.parametrize("count", [1, 9, 10])
def test_a_class_of_few_galaxies_has_no_bootstrap_interval(count):
    strata, values = np.repeat([0, 1], [count, 40]), 1e-6 * np.random.default_rng(0).normal(size=40 + count)
    mean = bootstrap_estimates(
        lambda weights: {"mean": float(np.average(values, weights=weights))}, strata, np.ones(40 + count), draws=50
    )["mean"]
    assert mean.value == pytest.approx(values.mean())
    assert np.isnan(mean[1:]).all() if count < 10 else mean.low < mean.value < mean.high
