import numpy as np
import pytest
import scipy.stats
import torch
from small_trees import make_question

from zoobot_hf.data.decision_tree import DecisionTree, load_survey, survey_names
from zoobot_hf.models.votes import (
    concentrations_from_logits,
    expected_share_asked,
    expected_vote_fractions,
    shared_answers,
    tree_layout,
    vote_fraction_intervals,
    vote_log_likelihood,
    vote_loss,
)

NAN = float("nan")

# smooth -> round; disk -> bar; merging after smooth or disk: two paths.
TREE = {
    "name": "small",
    "questions": [
        make_question("shape", "smooth", "disk", "artifact"),
        make_question("bar", "yes", "no", asked_after=["shape_disk"]),
        make_question("merging", "yes", "no", asked_after=["shape_smooth", "shape_disk"]),
        make_question("ends", "yes", "no", asked_after=["bar_yes", "merging_yes"]),
    ],
}
LAYOUT = tree_layout(TREE)


def slices_of(layout):
    starts = np.flatnonzero(np.diff(layout.question_of_answer, prepend=-1)).tolist()
    return [slice(start, stop) for start, stop in zip(starts, [*starts[1:], len(layout.vote_columns)], strict=True)]


def random_votes(layout, generator, *, galaxies):
    """Votes of 1 to 40 volunteers a question; some questions are not asked, and some missing."""
    votes = np.zeros((galaxies, len(layout.vote_columns)))
    for row in votes:
        for part in slices_of(layout):
            kind = generator.choice(["asked", "not asked", "missing"], p=[0.6, 0.2, 0.2])
            size = part.stop - part.start
            if kind == "asked":
                row[part] = generator.multinomial(generator.integers(1, 41), generator.dirichlet(np.ones(size)))
            if kind == "missing":
                row[part] = NAN
    return votes


def loss_by_scipy(concentrations, votes, layout):
    """Minus the log likelihood of each galaxy's questions, one at a time."""
    losses = np.zeros((len(votes), len(layout.question_names)))
    for galaxy, number in np.ndindex(losses.shape):
        part = slices_of(layout)[number]
        counts = votes[galaxy, part]
        if not np.isnan(counts).any() and counts.sum() > 0:
            distribution = scipy.stats.dirichlet_multinomial(concentrations[galaxy, part], int(counts.sum()))
            losses[galaxy, number] = -distribution.logpmf(counts.astype(int))
    return losses


# The loss -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", survey_names())
def test_the_loss_is_scipys_for_every_survey_with_missing_questions(name):
    layout = tree_layout(load_survey(name).to_dict())
    generator = np.random.default_rng(0)
    votes = random_votes(layout, generator, galaxies=6)
    concentrations = generator.uniform(1, 101, votes.shape)
    expected = loss_by_scipy(concentrations, votes, layout)
    exact, given = torch.tensor(concentrations), torch.tensor(votes)
    assert -vote_log_likelihood(exact, given, layout).numpy() == pytest.approx(expected, abs=1e-9)
    for reduction, value in {"sum": expected.sum(1).mean(), "mean": expected.mean()}.items():
        assert vote_loss(exact, given, layout, reduction=reduction).item() == pytest.approx(value, abs=1e-9)
        in_float32 = vote_loss(exact.float(), given.float(), layout, reduction=reduction)
        assert in_float32.dtype == torch.float32
        assert in_float32.item() == pytest.approx(value, rel=1e-5)


def test_a_question_without_votes_has_a_likelihood_of_exactly_1():
    votes = torch.tensor([[5.0, 2, 0, 0, 0, NAN, NAN, 0, 0], [0, 0, 0, NAN, 3, NAN, NAN, 1, 0]])
    concentrations = torch.rand(2, 9) * 100 + 1
    asked = vote_log_likelihood(concentrations, votes, LAYOUT) != 0
    assert asked.tolist() == [[True, False, False, False], [False, False, False, True]]
    zeros = vote_log_likelihood(concentrations, torch.zeros(2, 9), LAYOUT)
    assert torch.equal(zeros, torch.zeros(2, 4))


def test_one_missing_vote_makes_its_question_missing_and_no_other():
    concentrations = torch.rand(1, 9, dtype=torch.float64) * 100 + 1
    votes = torch.tensor([[5.0, 2, 1, 4, NAN, 2, 2, 0, 1]], dtype=torch.float64)
    without = torch.tensor([[5.0, 2, 1, 0, 0, 2, 2, 0, 1]], dtype=torch.float64)
    assert torch.equal(
        vote_log_likelihood(concentrations, votes, LAYOUT), vote_log_likelihood(concentrations, without, LAYOUT)
    )


def test_a_single_vote_costs_the_cross_entropy_of_its_expected_fraction():
    concentrations = torch.tensor([[2.0, 5, 3, 1, 1, 1, 1, 1, 1]], dtype=torch.float64)
    votes = torch.tensor([[0.0, 1, 0, 0, 0, 0, 0, 0, 0]], dtype=torch.float64)
    assert vote_loss(concentrations, votes, LAYOUT, reduction="sum").item() == pytest.approx(-np.log(0.5))


def test_the_mean_is_the_sum_divided_by_the_number_of_questions():
    concentrations, votes = torch.rand(3, 9, dtype=torch.float64) + 1, torch.randint(0, 9, (3, 9)).double()
    total = vote_loss(concentrations, votes, LAYOUT, reduction="sum")
    assert vote_loss(concentrations, votes, LAYOUT, reduction="mean").item() == pytest.approx(total.item() / 4)


def test_the_gradient_is_right_and_zero_where_nobody_was_asked():
    generator = np.random.default_rng(1)
    votes = torch.tensor(random_votes(LAYOUT, generator, galaxies=5))
    votes[0, :3], votes[1, :3] = NAN, 0
    concentrations = (torch.rand(5, 9, dtype=torch.float64) * 100 + 1).requires_grad_()
    assert torch.autograd.gradcheck(lambda a: vote_log_likelihood(a, votes, LAYOUT), concentrations)
    vote_loss(concentrations, votes, LAYOUT, reduction="sum").backward()
    assert torch.equal(concentrations.grad[:2, :3], torch.zeros(2, 3, dtype=torch.float64))
    assert concentrations.grad[2:].abs().sum() > 0


def test_a_batch_without_votes_has_a_loss_and_a_gradient_of_zero():
    concentrations = (torch.rand(2, 9) + 1).requires_grad_()
    loss = vote_loss(concentrations, torch.full((2, 9), NAN), LAYOUT, reduction="sum")
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(concentrations.grad, torch.zeros(2, 9))


def test_the_loss_of_half_precision_is_float32():
    concentrations = concentrations_from_logits(torch.randn(4, 9).bfloat16(), (1, 101))
    assert concentrations.dtype == torch.float32
    loss = vote_loss(concentrations.bfloat16(), torch.ones(4, 9, dtype=torch.int64), LAYOUT, reduction="sum")
    assert loss.dtype == torch.float32


def test_concentrations_are_between_their_limits():
    logits = torch.tensor([[-100.0, 0, 100]])
    assert concentrations_from_logits(logits, (1, 101)).tolist() == [[1, 51, 101]]
    assert concentrations_from_logits(logits, (0.5, 10.5)).tolist() == [[0.5, 5.5, 10.5]]


@pytest.mark.parametrize(("value", "shown"), [(-1, "-1"), (2.5, "2.5")])
def test_votes_that_are_no_counts_are_refused_by_name(value, shown):
    votes = torch.zeros(2, 9)
    votes[1, 4] = value
    with pytest.raises(ValueError, match=f"votes hold {shown} in bar_no; give counts of volunteers, whole"):
        vote_loss(torch.ones(2, 9), votes, LAYOUT, reduction="sum")


def test_fractions_for_votes_are_refused():
    with pytest.raises(ValueError, match=r"votes hold 0.5 in shape_smooth, shape_disk; give counts"):
        vote_loss(torch.ones(1, 9), torch.tensor([[0.5, 0.5, 0, 1, 0, 0, 0, 0, 0]]), LAYOUT, reduction="sum")


def test_votes_for_another_tree_are_refused():
    message = (
        r"votes have the shape \(2, 8\) and the model's outputs \(2, 9\); give each galaxy a count for each of the 9"
    )
    with pytest.raises(ValueError, match=message):
        vote_loss(torch.ones(2, 9), torch.ones(2, 8), LAYOUT, reduction="sum")


# What concentrations say ----------------------------------------------------------------------------------------

CONCENTRATIONS = np.array([[6.0, 3, 1, 1, 3, 2, 8, 5, 5], [1, 1, 2, 4, 4, 1, 1, 1, 3]])


def test_expected_fractions_are_the_concentrations_shares_of_their_question():
    expected = [[0.6, 0.3, 0.1, 0.25, 0.75, 0.2, 0.8, 0.5, 0.5], [0.25, 0.25, 0.5, 0.5, 0.5, 0.5, 0.5, 0.25, 0.75]]
    assert expected_vote_fractions(torch.tensor(CONCENTRATIONS), LAYOUT) == pytest.approx(np.array(expected))


def test_intervals_are_those_of_the_beta_distribution():
    lower, upper = vote_fraction_intervals(CONCENTRATIONS, LAYOUT)
    assert (lower[0, 0], upper[0, 0]) == pytest.approx(scipy.stats.beta(6, 4).ppf([0.05, 0.95]))
    assert (lower[1, 8], upper[1, 8]) == pytest.approx(scipy.stats.beta(3, 1).ppf([0.05, 0.95]))
    half = vote_fraction_intervals(CONCENTRATIONS, LAYOUT, share=0.5)
    assert (half[0][0, 3], half[1][0, 3]) == pytest.approx(scipy.stats.beta(1, 3).ppf([0.25, 0.75]))


def test_intervals_hold_the_probabilities_that_they_say():
    generator = np.random.default_rng(0)
    drawn = generator.dirichlet(CONCENTRATIONS[0, :3], 20000)
    lower, upper = vote_fraction_intervals(CONCENTRATIONS, LAYOUT)
    inside = (drawn > lower[0, :3]) & (drawn < upper[0, :3])
    assert inside.mean(0) == pytest.approx([0.9, 0.9, 0.9], abs=0.01)


def test_the_share_asked_is_added_up_over_all_paths():
    shares = expected_share_asked(CONCENTRATIONS, LAYOUT)
    # ends is asked after bar: yes (0.3 x 0.25) and after merging: yes (0.9 x 0.2).
    assert shares[0] == pytest.approx([1, 0.3, 0.9, 0.075 + 0.18])
    assert shares[1] == pytest.approx([1, 0.25, 0.5, 0.125 + 0.25])


def test_the_share_asked_is_no_more_than_all_where_paths_do_not_exclude_each_other():
    ring = make_question("ring", "yes", "no", asked_after=["bar_yes", "arms_yes"])
    questions = [make_question("bar", "yes", "no"), make_question("arms", "yes", "no"), ring]
    layout = tree_layout({"name": "parallel", "questions": questions})
    shares = expected_share_asked([[9, 1, 9, 1, 1, 1], [3, 7, 3, 7, 1, 1]], layout)
    assert shares[:, 2] == pytest.approx([1, 0.6])
    assert shares.max() == 1


def test_the_share_asked_of_a_real_tree():
    tree = load_survey("euclid")
    layout = tree_layout(tree.to_dict())
    shares = expected_share_asked(np.ones((1, len(layout.vote_columns))), layout)[0]
    by_name = dict(zip(layout.question_names, shares, strict=True))
    assert layout.depth == 4
    assert by_name["merging-euclid"] == pytest.approx(2 / 3)
    assert by_name["spiral-winding-euclid"] == pytest.approx(1 / 3 / 2 / 2)
    assert by_name["artifact-euclid"] == pytest.approx(1 / 3 / 3)


# Layouts --------------------------------------------------------------------------------------------------------


def test_a_layout_says_what_belongs_where():
    assert LAYOUT.question_names == ["shape", "bar", "merging", "ends"]
    assert LAYOUT.vote_columns[:4] == ["shape_smooth", "shape_disk", "shape_artifact", "bar_yes"]
    assert LAYOUT.question_of_answer.tolist() == [0, 0, 0, 1, 1, 2, 2, 3, 3]
    assert np.argwhere(LAYOUT.is_asked_after).tolist() == [[0, 2], [1, 1], [1, 2], [3, 3], [5, 3]]
    assert LAYOUT.depth == 3


def test_a_loop_is_refused_by_name():
    first, second = make_question("a", "1", "2", asked_after=["b_1"]), make_question("b", "1", "2", asked_after=["a_1"])
    with pytest.raises(ValueError, match="decision_tree has a loop among a, b; ask one of them after an earlier"):
        tree_layout({"name": "loop", "questions": [TREE["questions"][0], first, second]})


def test_an_unknown_parent_is_refused_by_name():
    with pytest.raises(ValueError, match="the question 'a' is asked after b_1, which the decision tree 'bad' doesn't"):
        tree_layout({"name": "bad", "questions": [make_question("a", "1", "2", asked_after=["b_1"])]})


@pytest.mark.parametrize("values", [{}, {"name": "x", "questions": [3]}, {"name": "x", "questions": None}, 3])
def test_what_is_no_tree_is_refused(values):
    with pytest.raises(ValueError, match="decision_tree is not of the form name, questions"):
        tree_layout(values)


@pytest.mark.parametrize("questions", [[], [make_question("a", "1")], [make_question("a", "1", "2")] * 2])
def test_a_tree_without_questions_or_with_repeats_is_refused(questions):
    with pytest.raises(ValueError, match="'bad' needs questions of two or more answers, each with its own names"):
        tree_layout({"name": "bad", "questions": questions})


# Shared answers -------------------------------------------------------------------------------------------------


def columns_shared(old, new):
    old_columns, new_columns = old.vote_columns, new.vote_columns
    shared = shared_answers(old.to_dict(), new.to_dict())
    return {new_columns[number]: old_columns[old_number] for number, old_number in shared.items()}


def test_answers_are_shared_where_question_and_answer_are_the_same_but_for_the_suffix():
    shared = columns_shared(load_survey("decals_dr5"), load_survey("euclid"))
    assert len(shared) == 33
    assert all(new == old.replace("-dr5", "-euclid") for new, old in shared.items())
    fresh = set(load_survey("euclid").vote_columns) - set(shared)
    assert {column.split("-euclid_")[0] for column in fresh} == {"smooth-or-featured", "clumps", "problem", "artifact"}
    assert "smooth-or-featured-euclid_problem" in fresh


def test_other_spellings_are_not_shared():
    shared = columns_shared(load_survey("gz2"), load_survey("hubble"))
    assert "smooth-or-featured-hubble_features" not in shared
    assert "how-rounded-hubble_completely" not in shared
    assert shared["how-rounded-hubble_in-between"] == "how-rounded-gz2_in-between"


def test_surveys_without_a_suffix_share_with_those_that_have_one():
    shared = columns_shared(load_survey("desi_dr8"), load_survey("desi_catalog"))
    assert list(shared) == load_survey("desi_catalog").vote_columns


def test_of_several_old_questions_that_with_most_in_common_counts_and_the_last_of_these():
    shared = columns_shared(load_survey("decals_all"), load_survey("euclid"))
    assert shared["bar-euclid_strong"] == "bar-dr8_strong"
    assert shared["bar-euclid_no"] == "bar-dr8_no"
    assert columns_shared(load_survey("decals_all"), load_survey("gz2"))["bar-gz2_yes"] == "bar-dr12_yes"


def test_the_same_columns_come_before_all_others():
    shared = columns_shared(load_survey("decals_all"), load_survey("decals_dr5"))
    assert all(new == old for new, old in shared.items())
    assert len(shared) == 34


@pytest.mark.parametrize("suffixes", [[], ["-mine"]])
def test_the_same_columns_are_shared_whatever_the_suffixes(suffixes):
    old = load_survey("decals_dr5").to_dict()
    bar = make_question(f"bar{''.join(suffixes)}", "strong", "no", "double")
    mine = DecisionTree.from_dict({"name": "mine", "suffixes": suffixes, "questions": [bar, *old["questions"][:2]]})
    expected = [(f"{bar['name']}_{answer}", f"bar-dr5_{answer}") for answer in ("strong", "no")]
    expected += [(column, column) for column in mine.vote_columns[3:]]
    assert list(columns_shared(load_survey("decals_dr5"), mine).items()) == expected
    back = columns_shared(mine, load_survey("decals_dr5"))
    assert back == {old_column: new_column for new_column, old_column in expected}


def test_trees_about_different_things_share_nothing():
    assert columns_shared(load_survey("rings"), load_survey("euclid")) == {}
