import numpy as np
import pytest
from datasets import Image
from small_trees import make_question

from zoobot_hf import DecisionTree, join_trees, load_survey, read_votes
from zoobot_hf.data.population import draw_survey_parameters
from zoobot_hf.data.volunteers import (
    SCATTER,
    answer_probabilities,
    read_probabilities,
    simulate_votes,
    simulate_votes_dataset,
)

DECALS, RINGS = load_survey("decals_dr5"), load_survey("rings")
TREE = join_trees("both", [DECALS, RINGS])
KNOWN_SURVEYS = ["gz2", "decals_dr12", "decals_dr5", "desi_dr8", "rings"]


@pytest.fixture(scope="module")
def galaxies():
    return draw_survey_parameters(400, seed=1)


def chance_of(parameters, column, tree=TREE):
    """The mean probability of an answer."""
    return answer_probabilities(parameters, tree, seed=0)[:, tree.vote_columns.index(column)].mean()


def votes_on(question, votes, tree=TREE):
    return votes[:, [tree.vote_columns.index(answer.vote_column) for answer in question.answers]].sum(axis=1)


@pytest.mark.parametrize("survey", KNOWN_SURVEYS)
def test_the_answers_of_a_question_add_up_to_one(survey, galaxies):
    tree = load_survey(survey)
    probabilities = answer_probabilities(galaxies, tree, seed=0)
    assert probabilities.min() > 0
    start = 0
    for question in tree.questions:
        stop = start + len(question.answers)
        assert probabilities[:, start:stop].sum(axis=1) == pytest.approx(1)
        start = stop


@pytest.mark.parametrize("survey", KNOWN_SURVEYS)
def test_each_question_is_asked_of_those_whose_answers_lead_to_it(survey, galaxies):
    tree = load_survey(survey)
    votes = simulate_votes(galaxies, tree, seed=0, volunteers=30).votes
    assert votes.dtype == np.float32
    for question in tree.questions:
        led = sum(votes[:, tree.vote_columns.index(column)] for column in question.asked_after)
        asked = led if question.asked_after else np.full(len(votes), 30)
        assert np.array_equal(votes_on(question, votes, tree), asked)


def test_nobody_is_asked_a_question_twice(galaxies):
    bar, ring = make_question("bar", "yes", "no"), make_question("ring", "yes", "no")
    arms = make_question("has-spiral-arms", "yes", "no", asked_after=["bar_yes", "bar_no", "ring_yes", "ring_no"])
    tree = DecisionTree.from_dict({"name": "mine", "questions": [arms, bar, ring]})
    votes = simulate_votes(galaxies.head(3), tree, seed=0, volunteers=30).votes
    assert votes_on(tree.questions[0], votes, tree).tolist() == [30, 30, 30]


def test_votes_follow_the_probabilities(galaxies):
    said = simulate_votes(galaxies, DECALS, seed=0, volunteers=2000)
    fractions = said.votes[:, :3] / 2000
    assert np.abs(fractions - said.probabilities[:, :3]).max() < 6 * np.sqrt(0.25 / 2000)
    deeper = DECALS.vote_columns.index("bar-dr5_no")
    asked = votes_on(DECALS.questions[3], said.votes, DECALS)
    often = asked > 500
    fractions = said.votes[often, deeper] / asked[often]
    assert np.abs(fractions - said.probabilities[often, deeper]).max() < 6 * np.sqrt(0.25 / 500)


def test_a_galaxys_votes_do_not_depend_on_the_others(galaxies):
    whole, some = (simulate_votes(table, TREE, seed=0) for table in (galaxies, galaxies.iloc[100:103]))
    assert np.array_equal(whole.votes[100:103], some.votes)
    assert np.array_equal(whole.probabilities[100:103], some.probabilities)


def test_galaxies_that_look_the_same_have_a_scatter_of_their_own(galaxies):
    same = galaxies.iloc[[0] * 400].set_index(galaxies.index)
    yes, no = np.log(answer_probabilities(same, RINGS, seed=0)).T[:2]
    assert (yes - no).std() == pytest.approx(SCATTER * np.sqrt(2), rel=0.1)


@pytest.mark.parametrize(
    ("column", "weak", "strong"),
    [
        ("bar-dr5_strong", {"bar_strength": 0.0}, {"bar_strength": 8.0, "bar_length": 0.9}),
        ("has-spiral-arms-dr5_yes", {"spiral_strength": 0.0}, {"spiral_strength": 1.5}),
        ("ring_yes", {"ring_strength": 0.0}, {"ring_strength": 2.0, "ring_width": 0.1}),
        ("disk-edge-on-dr5_yes", {"inclination_deg": 20.0}, {"inclination_deg": 88.0, "disk_thickness": 0.1}),
        ("bulge-size-dr5_dominant", {"bulge_to_total": 0.02}, {"bulge_to_total": 0.8}),
        ("spiral-winding-dr5_tight", {"pitch_angle_deg": 35.0}, {"pitch_angle_deg": 8.0}),
        ("spiral-arm-count-dr5_2", {"spiral_arms": 5}, {"spiral_arms": 2}),
        ("merging-dr5_merger", {"companion_strength": 0.0}, {"companion_strength": 1.0, "disturbance": 0.4}),
        ("how-rounded-dr5_round", {"inclination_deg": 85.0}, {"inclination_deg": 5.0}),
        ("smooth-or-featured-dr5_smooth", {"spiral_strength": 1.5}, {"spiral_strength": 0.0, "clump_strength": 0.0}),
    ],
)
def test_an_answer_is_likelier_the_more_there_is_of_it(column, weak, strong, galaxies):
    assert chance_of(galaxies.assign(**strong), column) > 1.2 * chance_of(galaxies.assign(**weak), column)


@pytest.mark.parametrize(
    ("easy", "hard"),
    [
        ({"sky_noise": 0.3}, {"sky_noise": 4.0}),  # noise
        ({"psf_fwhm_px": 1.0}, {"psf_fwhm_px": 12.0}),  # distance
        ({"inclination_deg": 10.0}, {"inclination_deg": 85.0}),
    ],
)
def test_confusion_grows_with_noise_distance_and_inclination(easy, hard, galaxies):
    arms = galaxies.assign(spiral_strength=1.5, disk_radius_px=12.0, psf_fwhm_px=2.0)
    clear, confused = (chance_of(arms.assign(**values), "has-spiral-arms-dr5_yes") for values in (easy, hard))
    assert confused < clear - 0.1


@pytest.mark.parametrize("question", ["spiral-winding-dr5", "spiral-arm-count-dr5"])
def test_arms_that_can_not_be_seen_decide_no_answer(question, galaxies, monkeypatch):
    monkeypatch.setattr("zoobot_hf.data.volunteers.SCATTER", 0.0)
    columns = [column for column in TREE.vote_columns if column.startswith(question)]
    places = [TREE.vote_columns.index(column) for column in columns]

    def spread_with(strength):
        bright = galaxies.assign(spiral_strength=strength, inclination_deg=10.0)
        return answer_probabilities(bright, TREE, seed=0)[:, places].std(axis=0).mean()

    assert spread_with(0.0) < 0.1 * spread_with(2.0)


def test_the_dataset_holds_images_votes_and_true_probabilities(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    settings = {"seed": 8, "size": 48, "frame": 159.0, "volunteers": 20}
    dataset = simulate_votes_dataset(20, TREE, first=5, **settings)
    parameters = draw_survey_parameters(20, seed=8, size=48, frame=159.0, first=5)
    said = simulate_votes(parameters, TREE, seed=8, volunteers=20)
    assert dataset.features["image"] == Image()
    assert dataset[3]["image"].size == (48, 48)
    assert dataset["id_str"][:] == parameters["id_str"].tolist()
    assert np.array_equal(read_votes(dataset, TREE), said.votes)
    probabilities = read_probabilities(dataset, TREE)
    np.testing.assert_allclose(probabilities[:, :3], said.probabilities[:, :3], rtol=1e-6)
    edge_on_bulge = TREE.questions[6]
    assert np.array_equal(
        np.isnan(probabilities[:, TREE.vote_columns.index("edge-on-bulge-dr5_boxy")]),
        votes_on(edge_on_bulge, said.votes) == 0,
    )


def test_a_question_or_an_answer_that_volunteers_do_not_know_is_named(galaxies):
    answers = [{"name": name, "vote_column": f"x_{name}"} for name in ("yes", "perhaps")]
    for name, message in (("colour", "don't know the question 'colour'"), ("bar", "don't know the answer perhaps")):
        tree = DecisionTree.from_dict(
            {"name": "mine", "questions": [{"name": name, "asked_after": [], "answers": answers}]}
        )
        with pytest.raises(ValueError, match=message):
            answer_probabilities(galaxies, tree, seed=0)
        with pytest.raises(ValueError, match=message):
            simulate_votes_dataset(1, tree, seed=0)


def test_somebody_has_to_vote(galaxies):
    with pytest.raises(ValueError, match="volunteers is 0; give 1 or more"):
        simulate_votes(galaxies, TREE, seed=0, volunteers=0)
