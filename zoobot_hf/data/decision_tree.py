"""Decision trees: a survey's questions, their answers, and who is asked what.

A tree is plain values, as a JSON file or a dictionary; a model's configuration holds the same:

    {"name": "...", "suffixes": ["-dr5"],
     "questions": [{"name": "...", "asked_after": [...], "answers": [{"name": "...", "vote_column": "..."}]}]}

`asked_after` lists the vote columns of the answers that lead to a question, and is empty for one that everybody is
asked. `suffixes` is what is taken off the ends of the questions' names before those of two surveys are compared. Other
keys say where the facts come from and are passed over. A file may have `surveys` in place of `questions`: the names of
those whose trees it joins.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any, Self

from .catalog import quote


@dataclass(frozen=True)
class Answer:
    """An answer to a question.

    Attributes:
        name: What volunteers choose.
        vote_column: The catalog's column with the number of volunteers who chose it.
    """

    name: str
    vote_column: str


@dataclass(frozen=True)
class Question:
    """A question of a decision tree.

    Attributes:
        name: The question's name, with the survey's suffix where it has one.
        answers: In the order of the vote columns.
        asked_after: The vote columns of the answers after any of which it is asked; none where everybody is asked.
    """

    name: str
    answers: tuple[Answer, ...]
    asked_after: tuple[str, ...] = ()


@dataclass(frozen=True)
class DecisionTree:
    """A survey's questions.

    Attributes:
        name: The tree's name.
        questions: In the order of the vote columns.
        suffixes: What ends the questions' names in this survey, or surveys, and in no other.

    Raises:
        ValueError: A question or a vote column is there twice, a question has fewer than two answers, is asked after
            an answer that isn't there, or can only be asked after itself.
    """

    name: str
    questions: tuple[Question, ...]
    suffixes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self._check_names()
        self._check_parents()
        self._check_loops()

    @cached_property
    def vote_columns(self) -> list[str]:
        """The vote columns of all answers, in order: the order of a model's outputs."""
        return [answer.vote_column for question in self.questions for answer in question.answers]

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """A tree from plain values.

        Args:
            values: `name`, `questions` and, optionally, `suffixes`, as at the top of this module.

        Raises:
            ValueError: Something is missing or of another type, or the tree isn't one.
        """
        try:
            questions = tuple(_question_from_dict(question) for question in values["questions"])
            name, suffixes = values["name"], _tuple_of_names(values.get("suffixes", ()), what="suffixes")
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"the decision tree is not of the form name, questions (name, asked_after, answers (name, "
                f"vote_column)): {type(error).__name__} {error}; compare it with load_survey('euclid').to_dict()."
            ) from error
        return cls(name, questions, suffixes)

    def to_dict(self) -> dict[str, Any]:
        """The tree as plain values, for JSON and for a model's configuration."""
        # Through JSON, so that tuples are lists already and not only after a model was saved.
        values: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return values

    def _check_names(self) -> None:
        if not self.questions:
            raise ValueError(f"the decision tree {self.name!r} has no questions.")
        for question in self.questions:
            if len(question.answers) < 2:
                raise ValueError(
                    f"the question {question.name!r} has {len(question.answers)} answers; give two or more."
                )
            _check_no_repeats([answer.name for answer in question.answers], what=f"question {question.name!r}: answer")
        _check_no_repeats([question.name for question in self.questions], what=f"decision tree {self.name!r}: question")
        _check_no_repeats(self.vote_columns, what=f"decision tree {self.name!r}: vote column")
        for text in [self.name, *self.vote_columns, *(question.name for question in self.questions), *self.suffixes]:
            if not isinstance(text, str) or not text:
                raise ValueError(f"the decision tree {self.name!r} has the name {text!r}; names are text, not empty.")

    def _check_parents(self) -> None:
        for question in self.questions:
            unknown = [column for column in question.asked_after if column not in self.vote_columns]
            if unknown:
                raise ValueError(
                    f"the question {question.name!r} is asked after {quote(unknown)}, which no answer has as its vote "
                    f"column; choose among {quote(self.vote_columns)}."
                )
            _check_no_repeats(question.asked_after, what=f"question {question.name!r}: asked_after")

    def _check_loops(self) -> None:
        waiting = list(self.questions)
        answered: set[str] = set()
        while waiting:
            asked = [question for question in waiting if answered.issuperset(question.asked_after)]
            if not asked:
                raise ValueError(
                    f"the decision tree {self.name!r} has a loop: {quote(question.name for question in waiting)} are "
                    "asked after each other; let one of them be asked after an earlier question, or of everybody."
                )
            answered |= {answer.vote_column for question in asked for answer in question.answers}
            waiting = [question for question in waiting if question not in asked]


def survey_names() -> list[str]:
    """The names of the surveys whose decision trees come with the package, sorted."""
    return sorted(file.name.removesuffix(".json") for file in _survey_folder().iterdir())


def load_survey(name: str) -> DecisionTree:
    """The decision tree of a Galaxy Zoo survey.

    Args:
        name: One of `survey_names()`: "gz2", "decals_dr5", "euclid", ... Names with `_catalog` are the published
            catalogs, whose columns have no suffix; those with `gz_evo` join the surveys of that training set.

    Raises:
        ValueError: There is no such survey.
    """
    if name not in survey_names():
        raise ValueError(
            f"survey is {name!r}; known are {', '.join(survey_names())}. For a tree of your own use load_tree."
        )
    return _tree_of(json.loads((_survey_folder() / f"{name}.json").read_text(encoding="utf-8")))


def load_tree(source: str | Path | Mapping[str, Any]) -> DecisionTree:
    """A decision tree of one's own.

    Args:
        source: A JSON file, or a dictionary of the same content; the form is at the top of this module.

    Raises:
        ValueError: There is no such file, it is not JSON, or the tree is not one.
    """
    if isinstance(source, Mapping):
        return _tree_of(source)
    path = Path(source)
    if not path.is_file():
        raise ValueError(f"decision tree {path} does not exist; give a JSON file, or use load_survey for a survey's.")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"decision tree {path} is not JSON: {error}.") from error
    return _tree_of(values)


def join_trees(name: str, trees: Sequence[DecisionTree]) -> DecisionTree:
    """One tree with the questions of several, for a training set of several surveys.

    A galaxy has votes for the questions of its own survey only.

    Args:
        name: Of the new tree.
        trees: In the order of the vote columns; no two have a question in common.

    Raises:
        ValueError: Two trees have a question or a vote column in common.
    """
    questions = tuple(question for tree in trees for question in tree.questions)
    return DecisionTree(name, questions, tuple(suffix for tree in trees for suffix in tree.suffixes))


def _tree_of(values: Mapping[str, Any]) -> DecisionTree:
    if isinstance(values, Mapping) and "surveys" in values:
        try:
            name, surveys = values["name"], _tuple_of_names(values["surveys"], what="surveys")
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"the decision tree is not of the form name, surveys: {type(error).__name__} {error}; give it a name "
                "of its own and a list of names that load_survey knows."
            ) from error
        return join_trees(name, [load_survey(survey) for survey in surveys])
    return DecisionTree.from_dict(values)


def _question_from_dict(values: Mapping[str, Any]) -> Question:
    answers = tuple(Answer(answer["name"], answer["vote_column"]) for answer in values["answers"])
    return Question(values["name"], answers, _tuple_of_names(values["asked_after"], what="asked_after"))


def _tuple_of_names(names: Any, *, what: str) -> tuple[str, ...]:
    # Text would be taken for a list of its letters.
    if isinstance(names, str):
        raise TypeError(f"{what} is {names!r}, not a list")
    return tuple(names)


def _survey_folder() -> Any:
    return files("zoobot_hf.data") / "surveys"


def _check_no_repeats(names: Sequence[str], *, what: str) -> None:
    repeated = sorted({name for name in names if list(names).count(name) > 1})
    if repeated:
        raise ValueError(f"{what} {quote(repeated)} is there more than once; each has to be there once.")
