import json

import pytest
from conftest import SHARED
from small_trees import BAR, SMOOTH, make_question

from zoobot_hf.data.decision_tree import DecisionTree, join_trees, load_survey, load_tree, survey_names

FACTS = SHARED / "facts/galaxy_zoo_schemas.json"
FACTS_NAMES = {
    "gz2": "gz2",
    "ukidss": "gz_ukidss",
    "decals_dr12": "gz_decals_dr12",
    "decals_dr5": "gz_decals_dr5",
    "desi_dr8": "gz_desi_dr8",
    "decals_all": "gz_decals_all",
    "desi_catalog": "desi_catalog",
    "hubble": "gz_hubble",
    "hubble_v2": "gz_hubble_v2",
    "candels": "gz_candels",
    "rings": "gz_rings",
    "cosmic_dawn": "gz_cosmic_dawn",
    "euclid": "gz_euclid",
    "euclid_catalog": "euclid_catalog",
    "cosmic_dawn_catalog": "cosmic_dawn_catalog",
    "jwst_ceers": "gz_jwst_ceers",
    "jwst_cosmos": "gz_jwst_cosmos",
}
GROUPS = ("gz_evo_v1", "gz_evo_v1_public", "gz_evo_v2", "gz_evo_v2_public")
CORRECTED = {
    "gz2": ["has-spiral-arms", "bar", "bulge-size", "something-odd"],
    "ukidss": ["has-spiral-arms", "bar", "bulge-size", "something-odd"],
    "decals_dr12": ["merging"],
    "decals_dr5": ["merging"],
    "desi_dr8": ["merging"],
    "desi_catalog": ["merging"],
    "hubble": ["spiral-winding", "spiral-arm-count"],
    "hubble_v2": ["spiral-winding", "spiral-arm-count"],
    "candels": ["spiral-winding", "spiral-arm-count", "merging"],
    "rings": [],
    "cosmic_dawn": ["merging"],
    "euclid": ["merging"],
    "euclid_catalog": ["merging"],
    "cosmic_dawn_catalog": ["merging"],
    "jwst_ceers": ["merging"],
    "jwst_cosmos": ["merging"],
}


def tree_of(*questions, **fields):
    return DecisionTree.from_dict({"name": "mine", "questions": list(questions), **fields})


MERGING = make_question("merging", "yes", "no", asked_after=["smooth_no", "smooth_yes"])


def read_file(name):
    from importlib.resources import files

    return json.loads((files("zoobot_hf.data") / "surveys" / f"{name}.json").read_text())


# Surveys --------------------------------------------------------------------------------------------------------


def test_every_survey_of_galaxy_zoo_is_there():
    assert survey_names() == sorted([*FACTS_NAMES, *GROUPS])


@pytest.mark.parametrize("name", [*FACTS_NAMES, *GROUPS])
def test_a_survey_loads_and_passes_its_own_checks(name):
    tree = load_survey(name)
    assert tree.name == name
    assert len(set(tree.vote_columns)) == len(tree.vote_columns) > 0
    assert DecisionTree.from_dict(tree.to_dict()) == tree


@pytest.mark.skipif(not FACTS.is_file(), reason="needs the facts file, which is not in the project")
@pytest.mark.parametrize(("name", "facts_name"), FACTS_NAMES.items())
def test_a_survey_is_the_facts_file_column_for_column_but_for_the_stated_corrections(name, facts_name):
    facts = json.loads(FACTS.read_text())[facts_name]
    tree = load_survey(name)
    assert tree.vote_columns == facts["label_cols"]
    if name == "decals_all":
        return
    assert [question.name for question in tree.questions] == list(facts["questions"])
    corrections = {correction["question"]: correction for correction in read_file(name)["corrections"]}
    for question in tree.questions:
        fact = facts["questions"][question.name]
        in_source = [] if fact["asked_after"] is None else [fact["asked_after"]]
        assert [answer.name for answer in question.answers] == fact["answers"]
        assert [answer.vote_column for answer in question.answers] == fact["label_cols"]
        correction = corrections.get(question.name, {"asked_after_in_source": in_source, "asked_after": in_source})
        assert correction["asked_after_in_source"] == in_source
        assert list(question.asked_after) == correction["asked_after"]


@pytest.mark.skipif(not FACTS.is_file(), reason="needs the facts file, which is not in the project")
@pytest.mark.parametrize("name", GROUPS)
def test_a_group_joins_the_surveys_of_the_facts_file(name):
    facts = json.loads(FACTS.read_text())
    tree = load_survey(name)
    columns = [
        column for component in facts["_groups"][name]["components"] for column in facts[component]["label_cols"]
    ]
    assert tree.vote_columns == columns
    assert len(tree.questions) == facts["_groups"][name]["n_questions"]


def test_the_second_gz_evo_has_86_questions_and_279_answers():
    tree = load_survey("gz_evo_v2")
    assert (len(tree.questions), len(tree.vote_columns)) == (86, 279)
    assert set(tree.suffixes) == {"-dr12", "-dr5", "-dr8", "-gz2", "-candels", "-hubble", "-cd", "-euclid"}


@pytest.mark.parametrize(("name", "questions"), CORRECTED.items())
def test_a_file_states_each_correction_with_its_reason(name, questions):
    content = read_file(name)
    suffix = content["suffixes"][0] if content["suffixes"] else ""
    tree = load_survey(name)
    assert [correction["question"].removesuffix(suffix) for correction in content["corrections"]] == questions
    for correction in content["corrections"]:
        asked_after = next(q.asked_after for q in tree.questions if q.name == correction["question"])
        assert list(asked_after) == correction["asked_after"] != correction["asked_after_in_source"]
        assert len(correction["reason"]) > 40


@pytest.mark.parametrize("name", [*FACTS_NAMES, *GROUPS])
def test_a_file_says_where_its_facts_come_from(name):
    content = read_file(name)
    assert content["title"]
    assert all("galaxy-datasets 0.0.25" in source for key, source in content["sources"].items() if "order" in key)


def test_merging_is_asked_after_smooth_or_featured():
    tree = load_survey("decals_dr5")
    merging = tree.questions[-1]
    assert merging.name == "merging-dr5"
    assert merging.asked_after == ("smooth-or-featured-dr5_smooth", "smooth-or-featured-dr5_featured-or-disk")


@pytest.mark.parametrize("name", list(CORRECTED))
def test_a_suffix_ends_every_question_of_its_survey(name):
    tree = load_survey(name)
    for suffix in tree.suffixes:
        assert all(question.name.endswith(suffix) for question in tree.questions)
    assert bool(tree.suffixes) == (name != "rings" and not name.endswith("_catalog"))


def test_an_unknown_survey_is_named_with_those_that_are_known():
    with pytest.raises(ValueError, match=r"survey is 'euklid'; known are candels, cosmic_dawn, .*, ukidss. For a tree"):
        load_survey("euklid")


# Trees of one's own ---------------------------------------------------------------------------------------------


def test_a_tree_of_ones_own_is_read_from_a_file_or_a_dictionary(tmp_path):
    values = {"name": "mine", "questions": [SMOOTH, BAR, MERGING], "author": "passed over"}
    (tmp_path / "tree.json").write_text(json.dumps(values))
    tree = load_tree(tmp_path / "tree.json")
    assert tree == load_tree(values)
    assert tree.vote_columns == ["smooth_yes", "smooth_no", "bar_yes", "bar_no", "merging_yes", "merging_no"]
    assert [question.asked_after for question in tree.questions] == [(), ("smooth_no",), ("smooth_no", "smooth_yes")]


def test_a_file_can_join_surveys(tmp_path):
    (tmp_path / "tree.json").write_text(json.dumps({"name": "both", "surveys": ["rings", "euclid"]}))
    tree = load_tree(tmp_path / "tree.json")
    assert tree.name == "both"
    assert tree.vote_columns == load_survey("rings").vote_columns + load_survey("euclid").vote_columns


@pytest.mark.parametrize(
    ("values", "error"),
    [
        ({"surveys": ["rings", "euclid"]}, "KeyError 'name'"),
        ({"name": "both", "surveys": "rings"}, "TypeError surveys is 'rings', not a list"),
    ],
)
def test_a_file_that_joins_surveys_in_another_form_is_refused(values, error):
    with pytest.raises(ValueError, match=f"not of the form name, surveys: {error}; give it a name of its own"):
        load_tree(values)


def test_trees_with_a_column_in_common_are_not_joined():
    with pytest.raises(ValueError, match=r"'both': question 'bar-jwst', .* is there more than once"):
        join_trees("both", [load_survey("jwst_ceers"), load_survey("jwst_cosmos")])


def test_plain_values_survive_json():
    values = tree_of(SMOOTH, BAR, MERGING, suffixes=["-x"]).to_dict()
    assert json.loads(json.dumps(values)) == values
    assert values["questions"] == [SMOOTH, BAR, MERGING]
    assert values["suffixes"] == ["-x"]


def test_questions_may_come_in_any_order():
    assert tree_of(BAR, SMOOTH).vote_columns == ["bar_yes", "bar_no", "smooth_yes", "smooth_no"]


def test_an_unknown_parent_is_named():
    with pytest.raises(ValueError, match="question 'bar' is asked after 'smooth_no', which no answer has as its vote"):
        tree_of(BAR)


def test_a_loop_is_named():
    first = make_question("first", "yes", "no", asked_after=["second_yes"])
    second = make_question("second", "yes", "no", asked_after=["first_yes"])
    with pytest.raises(ValueError, match="'mine' has a loop: 'first', 'second' are asked after each other"):
        tree_of(SMOOTH, first, second)


def test_a_question_is_not_asked_after_itself():
    with pytest.raises(ValueError, match="'mine' has a loop: 'bar'"):
        tree_of(make_question("bar", "yes", "no", asked_after=["bar_no"]))


def test_a_column_is_there_once():
    twice = {**BAR, "answers": [*BAR["answers"], {"name": "perhaps", "vote_column": "smooth_yes"}]}
    with pytest.raises(ValueError, match="vote column 'smooth_yes' is there more than once"):
        tree_of(SMOOTH, twice)


def test_a_question_is_there_once():
    other = {**make_question("other", "a", "b"), "name": "smooth"}
    with pytest.raises(ValueError, match="question 'smooth' is there more than once"):
        tree_of(SMOOTH, other)


def test_an_answer_is_there_once():
    repeated = {"name": "bar", "asked_after": [], "answers": [{"name": "yes", "vote_column": c} for c in "ab"]}
    with pytest.raises(ValueError, match="question 'bar': answer 'yes' is there more than once"):
        tree_of(repeated)


def test_a_parent_is_listed_once():
    with pytest.raises(ValueError, match="'bar': asked_after 'smooth_no' is there more than once"):
        tree_of(SMOOTH, make_question("bar", "yes", "no", asked_after=["smooth_no", "smooth_no"]))


def test_a_question_has_two_answers_or_more():
    with pytest.raises(ValueError, match="the question 'bar' has 1 answers; give two or more"):
        tree_of(make_question("bar", "yes"))


def test_a_tree_has_questions():
    with pytest.raises(ValueError, match="the decision tree 'mine' has no questions"):
        tree_of()


@pytest.mark.parametrize("name", ["", 3])
def test_names_are_text(name):
    with pytest.raises(ValueError, match=f"has the name {name!r}; names are text, not empty"):
        load_tree({"name": name, "questions": [SMOOTH]})


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"name": "mine"},
        {"name": "mine", "questions": 3},
        {"name": "mine", "questions": ["bar"]},
        {"name": "mine", "questions": [{**SMOOTH, "asked_after": None}]},
        {"name": "mine", "questions": [{**SMOOTH, "asked_after": "bar_no"}]},
        {"name": "mine", "questions": [{**SMOOTH, "answers": [{"name": "yes"}]}]},
        {"name": "mine", "questions": [SMOOTH], "suffixes": "-mine"},
    ],
)
def test_what_is_no_tree_is_refused_with_the_form_that_is_due(values):
    with pytest.raises(ValueError, match=r"the decision tree is not of the form name, questions .*; compare it with"):
        load_tree(values)


def test_a_file_that_is_not_there_or_not_json_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"tree.json does not exist; give a JSON file, or use load_survey"):
        load_tree(tmp_path / "tree.json")
    (tmp_path / "tree.json").write_text("{")
    with pytest.raises(ValueError, match=r"tree.json is not JSON: "):
        load_tree(tmp_path / "tree.json")
    (tmp_path / "tree.json").write_text("[]")
    with pytest.raises(ValueError, match="the decision tree is not of the form"):
        load_tree(tmp_path / "tree.json")
