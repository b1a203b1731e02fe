"""Volunteers who answer down a survey's decision tree about drawn galaxies, and their votes.

Every answer has a score that rises with what the galaxy's true parameters show of it: a bar's strength, the thickness
of a disk. The probability of an answer is the softmax of the scores, mixed with what people say who can't tell. The
share of those, the confusion, grows with noise, with distance (a galaxy that is small against the seeing), with
inclination for what only a disk seen from above shows, and for questions about spiral arms as these fade. Each galaxy
has some scatter of its own in the logarithms of the probabilities that its image doesn't show, as real galaxies have.
The strengths of all this are made up, so that votes look like Galaxy Zoo's; they are no measurement.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import datasets
import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.special import softmax

from zoobot_hf.data.dataset import read_votes
from zoobot_hf.data.decision_tree import DecisionTree, Question
from zoobot_hf.data.population import draw_survey_parameters
from zoobot_hf.data.simulation import SURVEY_SIZE, draw_galaxies, jpeg_of

Floats = NDArray[np.floating[Any]]
# An answer's name, or names where surveys differ, to its score.
Scores = dict[str, Floats]

VOLUNTEERS = 40  # as in Galaxy Zoo DECaLS for what is worth it (Walmsley et al. 2022, MNRAS 509, 3966)
SCATTER = 0.25  # of the logarithms of probabilities, from galaxy to galaxy

# `Dataset.from_generator` keeps what it made on disk: raise this number when galaxies or answers change.
DRAWING_VERSION = 3

# Streams of random numbers, apart from those of the drawing.
SCATTER_STREAM, VOTE_STREAM = 200, 201
GALAXIES_AT_ONCE = 512


class SimulatedVotes(NamedTuple):
    """What volunteers say about drawn galaxies.

    Attributes:
        probabilities: Of each answer for a volunteer who is asked its question, (galaxies, answers), 0-1.
        votes: Counts, (galaxies, answers); 0 for a question that nobody was asked.
    """

    probabilities: Floats
    votes: Floats


def simulate_votes_dataset(
    count: int,
    tree: DecisionTree,
    *,
    seed: int,
    size: int = 128,
    frame: float = SURVEY_SIZE,
    volunteers: int = VOLUNTEERS,
    first: int = 0,
    processes: int | None = None,
) -> datasets.Dataset:
    """A dataset of drawn galaxies with volunteers' votes, written to the datasets cache chunk by chunk.

    Args:
        count: How many galaxies, 1 or more.
        tree: The questions; see `answer_probabilities` for those that the volunteers know.
        seed: Names the sample; 0 or more.
        size: Height and width of the images in pixels, 32 or more.
        frame: Height and width of the images in the survey's pixels; a smaller frame shows the centre alone.
        volunteers: How many look at each galaxy.
        first: Number of the first galaxy, 0 or more: samples that don't overlap are galaxies of one seed.
        processes: How many draw at the same time.

    Returns:
        `id_str`, `image` (JPEG, decoded on access), `label` (the votes by column, as `votes_to_dataset` has them) and
        `probability` (the true ones, by column). The same arguments give the same dataset, the second time from the
        cache.

    Raises:
        ValueError: As `answer_probabilities` and `draw_survey_parameters`.
    """
    answer_probabilities(draw_survey_parameters(1, seed=seed), tree, seed=seed)  # refuses an unknown question now
    columns = {column: datasets.Value("float32") for column in tree.vote_columns}
    features = {
        "id_str": datasets.Value("string"),
        "image": datasets.Image(),
        "label": columns,
        "probability": dict(columns),
    }
    return datasets.Dataset.from_generator(
        _examples,
        features=datasets.Features(features),
        gen_kwargs={
            # The library takes a list for pieces of work that several processes can share.
            "starts": list(range(first, first + count, GALAXIES_AT_ONCE)),
            "stop": first + count,
            "tree": tree.to_dict(),
            "seed": seed,
            "size": size,
            "frame": frame,
            "volunteers": volunteers,
            "drawing_version": DRAWING_VERSION,
        },
        num_proc=processes,
    )


def simulate_votes(
    parameters: pd.DataFrame, tree: DecisionTree, *, seed: int, volunteers: int = VOLUNTEERS
) -> SimulatedVotes:
    """The votes on drawn galaxies, and the probabilities that they were drawn from.

    Args:
        parameters: Table of `draw_survey_parameters` or `draw_parameters`.
        tree: The questions.
        seed: Names the sample; 0 or more.
        volunteers: How many look at each galaxy, 1 or more.

    Raises:
        ValueError: `volunteers` is below 1; or as `answer_probabilities`.
    """
    if volunteers < 1:
        raise ValueError(f"volunteers is {volunteers}; give 1 or more.")
    probabilities = answer_probabilities(parameters, tree, seed=seed)
    votes = np.stack(
        [
            _ask(np.random.default_rng((seed, int(str(number)), VOTE_STREAM)), row, tree, volunteers)
            for number, row in zip(parameters.index, probabilities, strict=True)
        ]
    )
    return SimulatedVotes(probabilities, votes)


def read_probabilities(dataset: datasets.Dataset, tree: DecisionTree) -> Floats:
    """The true answer probabilities of a dataset where a galaxy's volunteers were asked, without decoding an image.

    Args:
        dataset: From `simulate_votes_dataset`.
        tree: The tree that it was made with.

    Returns:
        (galaxies, answers), 0-1, in the order of the dataset and of the tree's vote columns; NaN for a question that
        nobody was asked.
    """
    table = dataset.select_columns(["probability"]).flatten().to_pandas()
    probabilities = table[[f"probability.{column}" for column in tree.vote_columns]].to_numpy(dtype=np.float64)
    questions = np.repeat(np.arange(len(tree.questions)), [len(question.answers) for question in tree.questions])
    asked = np.stack([read_votes(dataset, tree)[:, questions == q].sum(axis=1) for q in range(len(tree.questions))], 1)
    return np.where(asked[:, questions] > 0, probabilities, np.nan)


def answer_probabilities(parameters: pd.DataFrame, tree: DecisionTree, *, seed: int) -> Floats:
    """The probability of each answer for a volunteer who is asked its question.

    Known are the questions of Galaxy Zoo 2, DECaLS, DESI and the rings, by their names without the survey's suffix.

    Args:
        parameters: Table of `draw_survey_parameters` or `draw_parameters`.
        tree: The questions.
        seed: Decides each galaxy's scatter.

    Returns:
        (galaxies, answers), 0-1, in the order of the table and of the tree's vote columns; a question's add up to 1.

    Raises:
        ValueError: The tree has a question, or an answer, that the volunteers don't know.
    """
    scores = _scores(parameters)
    confusion = _confusion(parameters)
    generators = [np.random.default_rng((seed, int(str(number)), SCATTER_STREAM)) for number in parameters.index]
    scatter = SCATTER * np.stack([rng.standard_normal(len(tree.vote_columns)) for rng in generators])
    columns, start = [], 0
    for question in tree.questions:
        known = _known_answers(question, tree, scores)
        stop = start + len(known)
        share = confusion[_what_hides(_name(question, tree))][:, None]
        answered = (1 - share) * softmax(np.stack(known, axis=1), axis=1) + share * _guesses(question)
        columns.append(softmax(np.log(answered) + scatter[:, start:stop], axis=1))
        start = stop
    return np.concatenate(columns, axis=1)


def _examples(
    starts: list[int],
    stop: int,
    tree: dict[str, Any],
    seed: int,
    size: int,
    frame: float,
    volunteers: int,
    drawing_version: int,
) -> Iterator[dict[str, object]]:
    """Examples of the dataset; `drawing_version` only tells the cache apart."""
    decision_tree = DecisionTree.from_dict(tree)
    for start in starts:
        rows = min(GALAXIES_AT_ONCE, stop - start)
        parameters = draw_survey_parameters(rows, seed=seed, size=size, frame=frame, first=start)
        images = draw_galaxies(parameters, seed=seed, size=size, frame=frame)
        said = simulate_votes(parameters, decision_tree, seed=seed, volunteers=volunteers)
        rows_of_columns = zip(parameters["id_str"], images, said.votes, said.probabilities, strict=True)
        for identifier, image, votes, probabilities in rows_of_columns:
            yield {
                "id_str": identifier,
                "image": {"bytes": jpeg_of(image), "path": None},
                "label": dict(zip(decision_tree.vote_columns, votes.tolist(), strict=True)),
                "probability": dict(zip(decision_tree.vote_columns, probabilities.tolist(), strict=True)),
            }


# --- who is asked what -----------------------------------------------------------------------------------------------


def _ask(rng: np.random.Generator, probabilities: Floats, tree: DecisionTree, volunteers: int) -> Floats:
    """The votes on one galaxy: everybody answers the first questions, and goes on where the answers lead.

    The answers that lead to a question are taken to exclude each other, and no volunteer is asked it twice.
    """
    votes = dict.fromkeys(tree.vote_columns, 0)
    chances = dict(zip(tree.vote_columns, probabilities, strict=True))
    for question in _in_the_order_of_asking(tree):
        led = sum(votes[column] for column in question.asked_after)
        asked = min(led, volunteers) if question.asked_after else volunteers
        own = [answer.vote_column for answer in question.answers]
        counts = rng.multinomial(asked, _adding_up_to_one(np.array([chances[column] for column in own])))
        votes |= dict(zip(own, counts.tolist(), strict=True))
    return np.array(list(votes.values()), dtype=np.float32)


def _adding_up_to_one(values: Floats) -> Floats:
    return np.asarray(values / values.sum())


def _in_the_order_of_asking(tree: DecisionTree) -> list[Question]:
    """The tree's questions, each after those that lead to it."""
    ordered: list[Question] = []
    waiting = list(tree.questions)
    while waiting:
        answered = {answer.vote_column for question in ordered for answer in question.answers}
        asked = [question for question in waiting if answered.issuperset(question.asked_after)]
        ordered += asked
        waiting = [question for question in waiting if question not in asked]
    return ordered


# --- what volunteers see ---------------------------------------------------------------------------------------------

# What a disk seen from the side hides; and what nobody can tell of arms that can't be seen.
SHOWN_FROM_ABOVE = ("has-spiral-arms", "bar", "bulge-size", "ring")
SHOWN_BY_ARMS = ("spiral-winding", "spiral-arm-count")

# What people answer who can't tell; any other answer gets the same share as the rest of its question.
GUESSES = {"artifact": 0.15, "no": 2.0, "none": 2.0, "neither": 2.0, "more-than-4": 0.3, "4": 0.4, "cant-tell": 2.0}


def _guesses(question: Question) -> Floats:
    return _adding_up_to_one(np.array([GUESSES.get(answer.name, 1.0) for answer in question.answers]))


def _what_hides(question: str) -> str:
    if question in SHOWN_BY_ARMS:
        return "faint arms"
    return "inclined" if question in SHOWN_FROM_ABOVE else "any"


def _confusion(parameters: pd.DataFrame) -> dict[str, Floats]:
    """The share of volunteers who can't tell, 0.04 to 1, by what hides the answer: the least of it for any question."""
    noise = parameters["sky_noise"] / parameters["surface_brightness"]
    distance = parameters["psf_fwhm_px"] / parameters["disk_radius_px"]
    difficulty = np.log(20 * noise).clip(-1.5, 2.5) * 0.7 + np.log(4 * distance).clip(-1.5, 2.5) * 0.9
    inclination = np.clip((parameters["inclination_deg"] - 45) / 20, 0, 2.5)
    inclined = 0.04 + 0.71 * _sigmoid(difficulty + inclination - 1.8)
    arms_seen = _sigmoid(2 * _log_strength(parameters["spiral_strength"], 0.3) + 1)
    return {
        "any": 0.04 + 0.5 * _sigmoid(difficulty - 1.8),
        "inclined": inclined,
        "faint arms": 1 - (1 - inclined) * arms_seen,
    }


def _scores(parameters: pd.DataFrame) -> dict[str, Scores]:
    """For each question the score of each of its answers, by name."""
    return {name: score(parameters) for name, score in QUESTIONS.items()}


def _smooth_or_featured(galaxy: pd.DataFrame) -> Scores:
    features = 1.6 * _features(galaxy) + 2.5 * _flatness(galaxy) - 1.2
    zero = np.zeros(len(galaxy))
    return {"smooth": -features / 2, "featured-or-disk": features / 2, "artifact": zero - 2.6}


def _disk_edge_on(galaxy: pd.DataFrame) -> Scores:
    return _yes_or_no(9 * (_flatness(galaxy) - 0.57))


def _has_spiral_arms(galaxy: pd.DataFrame) -> Scores:
    return _yes_or_no(2.2 * _log_strength(galaxy["spiral_strength"], 0.3) + 1.0 * (galaxy["disturbance"] < 0.15) - 1.0)


def _bar(galaxy: pd.DataFrame) -> Scores:
    visible = 1.6 * _log_strength(galaxy["bar_strength"] * galaxy["bar_length"], 1.2)
    weak, strong = visible - 0.2, 2 * visible - 1.6
    return {"strong": strong, "weak": weak, "no": np.zeros(len(galaxy)), "yes": np.logaddexp(weak, strong)}


def _bulge_size(galaxy: pd.DataFrame) -> Scores:
    size = np.sqrt(galaxy["bulge_to_total"].to_numpy())
    places = {"none": 0.08, "small": 0.25, "moderate": 0.45, "large": 0.65, "dominant": 0.85}
    scores = {name: -0.5 * ((size - place) / 0.13) ** 2 for name, place in places.items()}
    return {**scores, "no": scores["none"], "just-noticeable": scores["small"], "obvious": scores["moderate"]}


def _how_rounded(galaxy: pd.DataFrame) -> Scores:
    ratio = 1 - _flatness(galaxy)
    round_score = -0.5 * ((ratio - 0.95) / 0.16) ** 2
    cigar_score = -0.5 * ((ratio - 0.25) / 0.16) ** 2
    return {
        "round": round_score,
        "completely": round_score,
        "in-between": -0.5 * ((ratio - 0.62) / 0.16) ** 2,
        "inbetween": -0.5 * ((ratio - 0.62) / 0.16) ** 2,
        "cigar-shaped": cigar_score,
        "cigar": cigar_score,
    }


def _edge_on_bulge(galaxy: pd.DataFrame) -> Scores:
    bulge = 7 * (np.sqrt(galaxy["bulge_to_total"].to_numpy()) - 0.28)
    boxy = bulge / 2 + 0.8 * _log_strength(galaxy["bar_strength"], 2.0) - 1.8
    zero = np.zeros(len(galaxy))
    return {"rounded": bulge, "round": bulge, "boxy": boxy, "none": zero, "no-bulge": zero}


def _spiral_winding(galaxy: pd.DataFrame) -> Scores:
    places = {"tight": 9.0, "medium": 20.0, "loose": 32.0}
    pitch = galaxy["pitch_angle_deg"].to_numpy()
    return {name: -0.5 * ((pitch - place) / 6.5) ** 2 for name, place in places.items()}


def _spiral_arm_count(galaxy: pd.DataFrame) -> Scores:
    arms = galaxy["spiral_arms"].to_numpy()
    hidden = galaxy["clumpiness"].to_numpy() + 4 * galaxy["disturbance"].to_numpy()
    counts = {name: -1.2 * np.abs(arms - number) for number, name in enumerate(["1", "2", "3", "4", "more-than-4"], 1)}
    return {**counts, "cant-tell": 2.2 * hidden - 2.4}


def _merging(galaxy: pd.DataFrame) -> Scores:
    disturbed = 1.5 * np.log(galaxy["disturbance"].to_numpy() / 0.12)
    companion = 1.4 * _log_strength(galaxy["companion_strength"], 0.3)
    scores = {
        "none": np.full(len(galaxy), 1.2),
        "minor-disturbance": disturbed.clip(-2.0, 1.5),
        "major-disturbance": (2 * disturbed - 1.5).clip(-3.0, 3.0),
        "merger": companion + 0.8 * disturbed.clip(-1.5, 2.0) - 0.5,
    }
    return {
        **scores,
        "neither": scores["none"],
        "tidal-debris": scores["major-disturbance"],
        "both": scores["merger"] - 1.0,
    }


def _something_odd(galaxy: pd.DataFrame) -> Scores:
    disturbed = 1.6 * np.log(galaxy["disturbance"].to_numpy() / 0.15)
    is_odd = np.maximum(disturbed, 1.5 * _log_strength(galaxy["ring_strength"], 1.0))
    return _yes_or_no(np.maximum(is_odd, 1.2 * _log_strength(galaxy["companion_strength"], 0.5)))


def _ring_answers(galaxy: pd.DataFrame) -> Scores:
    # A broad ring is taken for a disk; tight arms that go round are taken for a ring.
    ring = _log_strength(galaxy["ring_strength"], 0.45) - 4 * (galaxy["ring_width"].to_numpy() - 0.13)
    closed = 0.5 * _log_strength(galaxy["spiral_strength"], 0.3) * (galaxy["pitch_angle_deg"].to_numpy() < 12)
    return _yes_or_no(2.2 * np.maximum(ring, closed - 0.8) + 1.2 * galaxy["gap_depth"].to_numpy() - 0.4)


QUESTIONS: dict[str, Callable[[pd.DataFrame], Scores]] = {
    "smooth-or-featured": _smooth_or_featured,
    "disk-edge-on": _disk_edge_on,
    "has-spiral-arms": _has_spiral_arms,
    "bar": _bar,
    "bulge-size": _bulge_size,
    "how-rounded": _how_rounded,
    "edge-on-bulge": _edge_on_bulge,
    "bulge-shape": _edge_on_bulge,
    "spiral-winding": _spiral_winding,
    "spiral-arm-count": _spiral_arm_count,
    "merging": _merging,
    "something-odd": _something_odd,
    "ring": _ring_answers,
}


def _name(question: Question, tree: DecisionTree) -> str:
    suffix = next((suffix for suffix in tree.suffixes if question.name.endswith(suffix)), "")
    return question.name.removesuffix(suffix)


def _known_answers(question: Question, tree: DecisionTree, scores: dict[str, Scores]) -> list[Floats]:
    """The scores of a question's answers, in order."""
    known = scores.get(_name(question, tree))
    if known is None:
        raise ValueError(
            f"the volunteers don't know the question {question.name!r} of the decision tree {tree.name!r}; they know "
            f"{', '.join(scores)}: leave it out, or choose a tree such as load_survey('decals_dr5')."
        )
    unknown = [answer.name for answer in question.answers if answer.name not in known]
    if unknown:
        raise ValueError(
            f"the volunteers don't know the answer {', '.join(unknown)} to {question.name!r}; they know "
            f"{', '.join(known)}."
        )
    return [np.asarray(known[answer.name], dtype=np.float64) for answer in question.answers]


def _yes_or_no(score: Floats | pd.Series) -> Scores:
    values = np.asarray(score, dtype=np.float64)
    return {"yes": values / 2, "no": -values / 2}


def _features(galaxy: pd.DataFrame) -> Floats:
    """How much there is to see, about 0 for a plain galaxy and 2 for a rich one."""
    strongest = [
        _log_strength(galaxy["spiral_strength"], 0.3),
        _log_strength(galaxy["bar_strength"], 2.0),
        _log_strength(galaxy["ring_strength"], 0.5),
        _log_strength(galaxy["clump_strength"] * (galaxy["clump_count"] > 0), 0.7),
        np.log(galaxy["disturbance"].to_numpy() / 0.15),
    ]
    return np.logaddexp.reduce([1.5 * strength for strength in strongest]) / 1.5 + 0.2


def _log_strength(strength: pd.Series, seen_by_half: float) -> Floats:
    """The logarithm of a strength over that which half of the volunteers see, from -2 to 2."""
    values = strength.to_numpy(dtype=np.float64) / seen_by_half
    return np.asarray(np.log(np.maximum(values, 1e-6)).clip(-2.0, 2.0))


def _flatness(galaxy: pd.DataFrame) -> Floats:
    """One minus the apparent axis ratio, of disk and bulge together."""
    cosine = np.cos(np.deg2rad(galaxy["inclination_deg"].to_numpy()))
    disk = np.sqrt(cosine**2 + galaxy["disk_thickness"].to_numpy() ** 2 * (1 - cosine**2))
    bulge = np.cos(np.deg2rad(galaxy["inclination_deg"].to_numpy() / 2))
    share = galaxy["bulge_to_total"].to_numpy()
    return np.asarray(1 - (1 - share) * disk - share * bulge)


def _sigmoid(values: Floats | pd.Series) -> Floats:
    return np.asarray(1 / (1 + np.exp(-np.asarray(values, dtype=np.float64))))
