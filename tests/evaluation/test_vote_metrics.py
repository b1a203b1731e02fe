import math

import numpy as np
import pytest
import scipy.stats
import torch
from small_trees import make_question
from transformers import EvalPrediction

from zoobot_hf import load_survey, tree_layout
from zoobot_hf.evaluation.vote_metrics import (
    VoteAccuracy,
    VoteIntervalCoverage,
    VoteLogLikelihood,
    VoteMeanAbsoluteError,
    VoteRootMeanSquaredError,
    coverage_of_probabilities,
    error_of_probabilities,
    score_votes,
    vote_metrics_for,
    vote_metrics_for_trainer,
    were_asked,
)
from zoobot_hf.models.votes import vote_loss

NAN = float("nan")

TREE = {
    "name": "small",
    "questions": [
        make_question("shape", "smooth", "disk"),
        make_question("bar", "yes", "no", asked_after=["shape_disk"]),
    ],
}
CONCENTRATIONS = [[8, 2, 5, 5], [3, 1, 1, 3], [1, 9, 2, 8], [4, 4, 7, 3]]
VOTES = [[18, 2, 0, 0], [1, 9, NAN, NAN], [0, 20, 1, 9], [3, 1, 1, 0]]


def compute(metric, concentrations=CONCENTRATIONS, votes=VOTES, **options):
    return metric(TREE, **options).compute(predictions=concentrations, references=votes)


def draw(generator, *, galaxies, volunteers):
    """Votes whose Dirichlet distributions are known, and the probabilities behind them."""
    concentrations = generator.uniform(1, 20, (galaxies, 4))
    probabilities = np.concatenate(
        [[generator.dirichlet(row[part]) for row in concentrations] for part in (slice(0, 2), slice(2, 4))], axis=1
    )
    votes = np.concatenate([generator.multinomial(volunteers, probabilities[:, i : i + 2]) for i in (0, 2)], axis=1)
    return concentrations, votes, probabilities


def test_accuracy_counts_confident_galaxies_alone():
    # Shape: galaxies 0 (right), 1 (wrong), 2 (right); galaxy 3 has 4 votes. Bar: galaxy 2 alone, and right.
    assert compute(VoteAccuracy) == {"vote_accuracy": pytest.approx(5 / 6), "vote_accuracy_shape": pytest.approx(2 / 3),
                                     "vote_accuracy_bar": 1.0}  # fmt: skip
    assert compute(VoteAccuracy, majority=0.95)["vote_accuracy_shape"] == 1.0
    assert compute(VoteAccuracy, least_votes=11)["vote_accuracy_shape"] == 1.0
    assert compute(VoteAccuracy, least_votes=4, majority=0.7)["vote_accuracy_shape"] == 3 / 4


def test_errors_by_hand():
    shape, bar = [0.1, 0.65, 0.1, 0.25], [0.1, 0.3]
    absolute = compute(VoteMeanAbsoluteError)
    assert absolute["vote_mean_absolute_error_shape"] == pytest.approx(np.mean(shape))
    assert absolute["vote_mean_absolute_error_bar"] == pytest.approx(np.mean(bar))
    assert absolute["vote_mean_absolute_error"] == pytest.approx((np.mean(shape) + np.mean(bar)) / 2)
    squared = compute(VoteRootMeanSquaredError)
    assert squared["vote_root_mean_squared_error_shape"] == pytest.approx(np.sqrt(np.mean(np.square(shape))))
    assert compute(VoteMeanAbsoluteError, least_votes=5)["vote_mean_absolute_error_bar"] == pytest.approx(0.1)


def test_the_log_likelihood_is_scipys_over_the_galaxies_that_were_asked():
    expected = [
        scipy.stats.dirichlet_multinomial(CONCENTRATIONS[galaxy][2:], sum(VOTES[galaxy][2:])).logpmf(VOTES[galaxy][2:])
        for galaxy in (2, 3)
    ]
    assert compute(VoteLogLikelihood)["vote_log_likelihood_bar"] == pytest.approx(np.mean(expected))


def test_log_likelihoods_add_up_to_the_loss():
    results = compute(VoteLogLikelihood)
    total = results["vote_log_likelihood_shape"] + results["vote_log_likelihood_bar"] * 2 / 4
    loss = vote_loss(torch.tensor(CONCENTRATIONS).double(), torch.tensor(VOTES), tree_layout(TREE), reduction="sum")
    assert -total == pytest.approx(loss.item())


@pytest.mark.parametrize("volunteers", [1, 3, 40])
def test_nine_tenths_of_the_votes_are_inside_their_interval_whatever_their_number(volunteers):
    concentrations, votes, _ = draw(np.random.default_rng(0), galaxies=4000, volunteers=volunteers)
    coverage = compute(VoteIntervalCoverage, concentrations, votes)
    assert list(coverage.values()) == pytest.approx([0.9] * 3, abs=0.012)


def test_concentrations_that_are_too_sure_or_unsure_miss_the_interval():
    concentrations, votes, _ = draw(np.random.default_rng(0), galaxies=1000, volunteers=40)
    assert compute(VoteIntervalCoverage, concentrations * 5, votes)["vote_interval_coverage"] < 0.75
    assert compute(VoteIntervalCoverage, concentrations / 5, votes)["vote_interval_coverage"] > 0.95


def test_coverage_by_hand():
    # Three volunteers and a flat distribution: each count has a probability of 1/4, and 0.05 of either end is outside.
    coverage = compute(VoteIntervalCoverage, [[1, 1, 1, 1]], [[3, 0, 1, 2]])
    assert coverage["vote_interval_coverage_shape"] == pytest.approx(0.8)
    assert coverage["vote_interval_coverage_bar"] == pytest.approx(1.0)


def test_a_count_that_the_model_thinks_impossible_is_outside():
    coverage = compute(VoteIntervalCoverage, [[1, 1e5, 50, 50]], [[2000, 0, 0, 0]])
    assert coverage["vote_interval_coverage_shape"] == 0


def test_true_probabilities_are_inside_nine_tenths_of_the_intervals():
    concentrations, _, probabilities = draw(np.random.default_rng(0), galaxies=4000, volunteers=1)
    probabilities[:1000, 2:] = NAN
    coverage = coverage_of_probabilities(concentrations, probabilities, TREE)
    assert list(coverage) == ["shape", "bar"]
    assert list(coverage.values()) == pytest.approx([0.9, 0.9], abs=0.015)
    assert coverage_of_probabilities(concentrations, probabilities, TREE, share=0.5)["bar"] == pytest.approx(
        0.5, abs=0.03
    )
    assert math.isnan(coverage_of_probabilities([[1, 1, 1, 1]], [[0.5, 0.5, NAN, NAN]], TREE)["bar"])


def test_the_error_of_true_probabilities_holds_no_chance_of_votes():
    errors = error_of_probabilities([[8, 2, 5, 5], [1, 1, 3, 1]], [[0.7, 0.3, NAN, NAN], [0.5, 0.5, 0.25, 0.75]], TREE)
    assert errors == pytest.approx({"shape": 0.05, "bar": 0.5})
    assert math.isnan(error_of_probabilities([[1, 1, 1, 1]], [[0.5, 0.5, NAN, NAN]], TREE)["bar"])


def test_a_question_that_nobody_was_asked_is_undefined_and_left_out_of_the_mean():
    for metric in (VoteMeanAbsoluteError, VoteLogLikelihood, VoteIntervalCoverage, VoteAccuracy):
        results = compute(metric, [[8, 2, 5, 5]], [[18, 2, 0, 0]])
        name = metric(TREE).name
        assert math.isnan(results[f"{name}_bar"])
        assert results[name] == results[f"{name}_shape"]
        assert all(math.isnan(value) for value in compute(metric, [[8, 2, 5, 5]], [[0, 0, NAN, NAN]]).values())


def test_nobody_asks_with_no_votes_however_few_are_needed():
    votes = np.zeros((2, sum(len(question["answers"]) for question in TREE["questions"])))
    votes[1, 0] = 1
    assert were_asked(votes, tree_layout(TREE), least_votes=0).sum() == 1


def test_all_metrics_together_for_a_real_survey():
    tree = load_survey("euclid").to_dict()
    generator = np.random.default_rng(0)
    concentrations, votes = generator.uniform(1, 101, (20, 46)), generator.integers(0, 9, (20, 46))
    results = vote_metrics_for(tree).compute(predictions=concentrations, references=votes)
    assert len(results) == 5 * 14
    evaluated = EvalPrediction(predictions=concentrations.astype(np.float32), label_ids=votes.astype(np.float32))
    means = vote_metrics_for_trainer(tree)(evaluated)
    assert list(means) == [
        "vote_accuracy",
        "vote_mean_absolute_error",
        "vote_root_mean_squared_error",
        "vote_log_likelihood",
        "vote_interval_coverage",
    ]
    assert means["vote_log_likelihood"] == pytest.approx(results["vote_log_likelihood"], rel=1e-5)
    assert vote_metrics_for_trainer(tree, by_question=True)(evaluated).keys() == results.keys()


@pytest.mark.parametrize("by_question", [False, True])
def test_a_model_that_has_diverged_has_scores_of_nan_in_training(by_question):
    function = vote_metrics_for_trainer(TREE, by_question=by_question)
    good, votes = np.array(CONCENTRATIONS, dtype=np.float32), np.array(VOTES, dtype=np.float32)
    diverged = np.where(np.arange(4) == 3, np.float32(NAN), good)
    scores = function(EvalPrediction(diverged, votes))
    assert list(scores) == list(function(EvalPrediction(good, votes)))
    assert all(math.isnan(score) for score in scores.values())


@pytest.mark.parametrize(
    ("concentrations", "votes", "message"),
    [
        ([], [], "predictions and references are empty; a metric needs at least one galaxy"),
        (
            [[1.0, 1]],
            [[1.0, 1]],
            r"predictions have the shape \(1, 2\) and references \(1, 2\); pass \(n, 4\) for both",
        ),
        ([[1.0, 0, 1, 1]], [[1.0, 0, 0, 0]], "predictions go down to 0; pass concentrations, which are above 0"),
        ([[1.0, 1, 1, NAN]], [[1.0, 0, 0, 0]], "predictions go down to nan; pass concentrations, which are above 0"),
        ([[1.0] * 4], [[-1.0, 0, 0, 0]], "references hold -1; pass counts of votes, whole and not negative, or NaN"),
        ([[1.0] * 4], [[0.5, 0.5, 0, 0]], "references hold 0.5; pass counts of votes"),
    ],
)
def test_bad_input_is_refused(concentrations, votes, message):
    with pytest.raises(ValueError, match=message):
        compute(VoteMeanAbsoluteError, concentrations, votes)


def test_scores_count_the_galaxies_behind_them():
    tree = {"name": "rings", "questions": [make_question("ring", "yes", "no")]}
    votes = [[9, 1], [8, 2], [0, 9], [0, 0], [NAN, NAN], [0, 10]]
    scores = score_votes([[3, 1]] * 6, votes, tree)
    # 0.9 and 1 are above 0.8 with ten votes; the expected fraction of "yes" is 0.75 everywhere.
    assert scores["questions"]["ring"]["asked"] == 4
    assert scores["questions"]["ring"]["confident"] == 2
    assert scores["vote_accuracy"] == 0.5
    assert scores["vote_mean_absolute_error"] == pytest.approx((0.15 + 0.05 + 0.75 + 0.75) / 4)
    assert scores["questions"]["ring"]["vote_mean_absolute_error"] == scores["vote_mean_absolute_error"]
