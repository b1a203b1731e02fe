"""Votes and what is said about them: a Dirichlet distribution over each question's answers, and its loss.

A Dirichlet's concentrations say how probable each answer of a question is, and how sure that is. The votes of n
volunteers then follow a Dirichlet-multinomial distribution (Walmsley et al. 2022, MNRAS 509, 3966).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.special
import torch
from torch import Tensor

Floats = npt.NDArray[np.float64]

INTERVAL = 0.9  # as in the published Galaxy Zoo catalogs


@dataclass(frozen=True)
class TreeLayout:
    """A decision tree as arrays: which answer belongs to which question, and which answers lead to which.

    Attributes:
        question_names: In order.
        vote_columns: In the order of a model's outputs.
        question_of_answer: The number of each answer's question, int64 (answers,).
        is_asked_after: Whether a question is asked after an answer, bool (answers, questions).
        depth: How many questions stand one after the other on the longest path.
    """

    question_names: list[str]
    vote_columns: list[str]
    question_of_answer: npt.NDArray[np.int64]
    is_asked_after: npt.NDArray[np.bool_]
    depth: int


def tree_layout(decision_tree: dict[str, Any]) -> TreeLayout:
    """The layout of a decision tree.

    Args:
        decision_tree: Plain values as a configuration holds them: `name`, and `questions`, each with `name`,
            `asked_after` and `answers`, each with `name` and `vote_column`.

    Raises:
        ValueError: The values are of another form, or a question is asked after an answer that isn't there, or only
            after itself.
    """
    try:
        name, questions = decision_tree["name"], decision_tree["questions"]
        counts = [len(question["answers"]) for question in questions]
        columns = [answer["vote_column"] for question in questions for answer in question["answers"]]
        parents = {question["name"]: list(question["asked_after"]) for question in questions}
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"decision_tree is not of the form name, questions (name, asked_after, answers (name, vote_column)): "
            f"{type(error).__name__} {error}; give what to_dict() of a DecisionTree returns."
        ) from error
    if not counts or min(counts) < 2 or len(set(columns)) < len(columns) or len(parents) < len(counts):
        raise ValueError(f"the decision tree {name!r} needs questions of two or more answers, each with its own names.")
    for question_name, asked_after in parents.items():
        if not set(asked_after) <= set(columns):
            raise ValueError(
                f"the question {question_name!r} is asked after {', '.join(sorted(set(asked_after) - set(columns)))}, "
                f"which the decision tree {name!r} doesn't have as a vote column."
            )
    question_of_answer = np.repeat(np.arange(len(counts)), counts)
    is_asked_after = np.array([[column in asked_after for asked_after in parents.values()] for column in columns])
    depth = _length_of_longest_path(list(parents), question_of_answer, is_asked_after)
    return TreeLayout(list(parents), columns, question_of_answer, is_asked_after, depth)


def _length_of_longest_path(
    question_names: list[str], question_of_answer: npt.NDArray[np.int64], is_asked_after: npt.NDArray[np.bool_]
) -> int:
    leads_to = np.zeros((len(question_names), len(question_names)), dtype=bool)
    np.logical_or.at(leads_to, question_of_answer, is_asked_after)
    length = 1
    last: npt.NDArray[np.bool_] = np.asarray(leads_to.any(axis=0))
    while last.any():
        if length > len(question_names):
            names = ", ".join(name for name, is_last in zip(question_names, last, strict=True) if is_last)
            raise ValueError(f"decision_tree has a loop among {names}; ask one of them after an earlier question.")
        length, last = length + 1, np.asarray(leads_to[last].any(axis=0))
    return length


def shared_answers(old_tree: dict[str, Any], new_tree: dict[str, Any]) -> dict[int, int]:
    """The answers that two decision trees share: the same vote columns, or else the same question and answer.

    A question that has vote columns of the old tree shares these. Any other is compared by its text, without the
    surveys' suffixes; where the old tree has it several times, the one with the most answers in common counts, and the
    last of these.

    Args:
        old_tree: Plain values, as in `tree_layout`.
        new_tree: The same.

    Returns:
        For each answer's number in the new tree, in order, its number in the old one.
    """
    old_columns, new_columns = tree_layout(old_tree).vote_columns, tree_layout(new_tree).vote_columns
    old_questions = _columns_by_question(old_tree)
    shared: dict[int, int] = {}
    for text, answers in _columns_by_question(new_tree):
        common = {column: column for column in answers.values() if column in old_columns}
        if not common:
            candidates = [
                {column: old_answers[name] for name, column in answers.items() if name in old_answers}
                for old_text, old_answers in old_questions
                if old_text == text
            ]
            common = max(reversed(candidates), key=len, default={})
        shared |= {new_columns.index(column): old_columns.index(old_column) for column, old_column in common.items()}
    return shared


def _columns_by_question(decision_tree: dict[str, Any]) -> list[tuple[str, dict[str, str]]]:
    """Each question's text without the suffix, and the vote column of each of its answers by name."""
    suffixes = decision_tree.get("suffixes") or []
    questions = []
    for question in decision_tree["questions"]:
        suffix = next((suffix for suffix in suffixes if question["name"].endswith(suffix)), "")
        columns = {answer["name"]: answer["vote_column"] for answer in question["answers"]}
        questions.append((question["name"].removesuffix(suffix), columns))
    return questions


def concentrations_from_logits(logits: Tensor, limits: Sequence[float]) -> Tensor:
    """A concentration for each answer, between the limits, in float32 or, where that is given, float64.

    Args:
        logits: The head's output (batch, answers).
        limits: The lowest and the highest concentration; Zoobot 2.9.0 has 1 and 101.
    """
    lowest, highest = limits
    return lowest + (highest - lowest) * _at_least_float32(logits).sigmoid()


def vote_log_likelihood(concentrations: Tensor, votes: Tensor, layout: TreeLayout) -> Tensor:
    """The logarithm of the probability of the votes, for each galaxy and question.

    For the votes k of n volunteers, and concentrations a that add up to A, it is
    ln G(n+1) + ln G(A) - ln G(n+A) - sum(ln G(k+1) + ln G(a) - ln G(k+a)), where G is the gamma function. Terms without
    votes are zero and are not computed: a galaxy has none for most questions of a tree that joins several surveys.

    Args:
        concentrations: (batch, answers), above 0.
        votes: Counts (batch, answers). A question without votes was not asked. NaN is missing, and one NaN among the
            votes of a question counts as all of them.
        layout: The decision tree's.

    Returns:
        (batch, questions) in float32, or float64 where the concentrations are; exactly 0 where there are no votes.

    Raises:
        ValueError: Votes of another shape; negative or fractional ones.
    """
    if votes.shape != concentrations.shape or votes.shape[-1] != len(layout.vote_columns):
        raise ValueError(
            f"votes have the shape {tuple(votes.shape)} and the model's outputs {tuple(concentrations.shape)}; give "
            f"each galaxy a count for each of the {len(layout.vote_columns)} vote columns, NaN where it is missing."
        )
    concentrations = _at_least_float32(concentrations)
    questions = torch.as_tensor(layout.question_of_answer, device=votes.device)
    counts = _known_votes(votes.to(concentrations.dtype), questions, layout)
    # A question's sums follow the same formula as its answers, with the opposite sign.
    terms = _terms_with_votes(
        torch.cat([concentrations, _sum_by_question(concentrations, questions, layout)], dim=1),
        torch.cat([counts, _sum_by_question(counts, questions, layout)], dim=1),
        layout,
    )
    answer_terms, question_terms = terms.tensor_split([len(layout.vote_columns)], dim=1)
    return question_terms - _sum_by_question(answer_terms, questions, layout)


def vote_loss(concentrations: Tensor, votes: Tensor, layout: TreeLayout, *, reduction: str) -> Tensor:
    """Minus the mean log likelihood of the galaxies' votes, in float32 or, where that is given, float64.

    Args:
        concentrations: (batch, answers), above 0.
        votes: As in `vote_log_likelihood`.
        layout: The decision tree's.
        reduction: "sum" adds a galaxy's questions up, as Zoobot 2.9.0 does in training from scratch; "mean" divides
            that by the number of questions in the tree, asked or not, as its finetuning does.
    """
    losses = -vote_log_likelihood(concentrations, votes, layout)
    return losses.sum(1).mean() if reduction == "sum" else losses.mean()


def expected_vote_fractions(concentrations: npt.ArrayLike, layout: TreeLayout) -> Floats:
    """The expected share of the votes on a question that each of its answers gets: its Dirichlet's mean.

    Args:
        concentrations: (galaxies, answers), above 0.
        layout: The decision tree's.

    Returns:
        (galaxies, answers), 0-1; a question's fractions add up to 1.
    """
    values = np.asarray(concentrations, dtype=np.float64)
    return np.asarray(values / _totals_of_questions(values, layout))


def vote_fraction_intervals(
    concentrations: npt.ArrayLike, layout: TreeLayout, *, share: float = INTERVAL
) -> tuple[Floats, Floats]:
    """The ends of an interval around the probability of each answer, with the same chance on either side.

    An answer's probability follows a Beta distribution, with its own concentration and the sum of the others'. The
    interval is of that probability, and not of the fraction that a few volunteers happen to give: that scatters more.

    Args:
        concentrations: (galaxies, answers), above 0.
        layout: The decision tree's.
        share: The chance that the probability is inside, 0-1.

    Returns:
        Lower and upper ends, each (galaxies, answers), 0-1.
    """
    values = np.asarray(concentrations, dtype=np.float64)
    others = _totals_of_questions(values, layout) - values
    outside = (1 - share) / 2
    ends = (scipy.special.betaincinv(values, others, quantile) for quantile in (outside, 1 - outside))
    return next(ends), next(ends)


def expected_share_asked(concentrations: npt.ArrayLike, layout: TreeLayout) -> Floats:
    """The expected share of volunteers who are asked each question, added up over all paths that lead to it.

    It is 1 where everybody is asked, and else the sum, over the answers that lead to a question, of the share who are
    asked the answer's own question times the answer's expected fraction. Paths are taken to exclude each other, and a
    sum above 1 counts as 1.

    Args:
        concentrations: (galaxies, answers), above 0.
        layout: The decision tree's.

    Returns:
        (galaxies, questions), 0-1.
    """
    fractions = expected_vote_fractions(concentrations, layout)
    is_asked_of_all = 1.0 - layout.is_asked_after.any(axis=0)
    shares = np.tile(is_asked_of_all, (len(fractions), 1))
    for _ in range(layout.depth - 1):
        sums = (shares[:, layout.question_of_answer] * fractions) @ layout.is_asked_after
        shares = np.minimum(is_asked_of_all + sums, 1)
    return np.asarray(shares)


def _totals_of_questions(values: Floats, layout: TreeLayout) -> Floats:
    """The sum over a question's answers, for each of its answers."""
    starts = np.flatnonzero(np.diff(layout.question_of_answer, prepend=-1))
    return np.add.reduceat(values, starts, axis=1)[:, layout.question_of_answer]


def _at_least_float32(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()


def _sum_by_question(values: Tensor, questions: Tensor, layout: TreeLayout) -> Tensor:
    return values.new_zeros(len(values), len(layout.question_names)).index_add(1, questions, values)


def _known_votes(votes: Tensor, questions: Tensor, layout: TreeLayout) -> Tensor:
    if not votes.isnan().any():
        return votes
    # A question's sum is NaN where any of its votes is.
    sums = _sum_by_question(votes, questions, layout).index_select(1, questions)
    return torch.where(sums.isnan(), 0, votes)


def _terms_with_votes(concentrations: Tensor, votes: Tensor, layout: TreeLayout) -> Tensor:
    """The value of ln G(k+1) + ln G(a) - ln G(k+a); exactly 0 without votes."""
    where = votes.flatten().nonzero().squeeze(1)
    a, k = concentrations.flatten().index_select(0, where), votes.flatten().index_select(0, where)
    if bool(((k < 0) | (k != k.round())).any()):
        _refuse_votes(votes, layout)
    terms = torch.lgamma(k + 1) + torch.lgamma(a) - torch.lgamma(k + a)
    return torch.zeros_like(votes).flatten().index_copy(0, where, terms).view_as(votes)


def _refuse_votes(votes: Tensor, layout: TreeLayout) -> None:
    votes = votes[:, : len(layout.vote_columns)]
    is_wrong = (votes < 0) | (votes != votes.round())
    names = [name for name, wrong in zip(layout.vote_columns, is_wrong.any(0).tolist(), strict=True) if wrong]
    more = ", ..." if len(names) > 5 else ""
    raise ValueError(
        f"votes hold {votes[is_wrong][0].item():g} in {', '.join(names[:5])}{more}; give counts of volunteers, whole "
        "and not negative, and no fractions."
    )
