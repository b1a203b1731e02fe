import numpy as np
import pandas as pd
import pytest
from small_trees import CONCENTRATIONS, TREE

from zoobot_hf import ZoobotConfig
from zoobot_hf.evaluation.vote_tables import advanced_table, friendly_table
from zoobot_hf.prediction.tables import describe_column, survey_table


@pytest.fixture
def config():
    return ZoobotConfig(decision_tree=TREE)


@pytest.fixture
def concentrations(config):
    return survey_table(["a", "b", "c"], CONCENTRATIONS, config=config)


def test_a_trees_shards_hold_its_concentrations(concentrations):
    names = ["smooth_yes", "smooth_no", "bar_yes", "bar_no", "bar_weak", "bar_strong"]
    assert concentrations.columns.tolist() == ["id_str", *(f"{name}_concentration" for name in names)]
    np.testing.assert_array_equal(concentrations.iloc[:, 1:].to_numpy(), CONCENTRATIONS)


def labels(*names, **options):
    return ZoobotConfig(id2label=dict(enumerate(names)), label2id={n: i for i, n in enumerate(names)}, **options)


def test_a_galaxy_at_the_threshold_is_selected():
    config = labels("no ring", "ring", decision_threshold={"ring": 0.25})
    table = survey_table(["a", "b", "c"], [[0.76, 0.24], [0.75, 0.25], [0.1, 0.9]], config=config)
    assert table.columns.tolist() == [
        "id_str", "predicted_label", "probability_no_ring", "probability_ring", "selected"
    ]  # fmt: skip
    assert table["selected"].tolist() == [False, True, True]


def test_a_threshold_between_two_float32_probabilities_parts_them():
    above, below = np.float32(1 - 2**-24), np.float32(1 - 2**-23)
    config = labels("no ring", "ring", decision_threshold={"ring": (float(above) + float(below)) / 2})
    table = survey_table(["a", "b"], np.array([[0, above], [0, below]], dtype=np.float32), config=config)
    assert table["selected"].tolist() == [True, False]


def test_several_thresholds_have_a_column_each():
    thresholds = {"bar": 0.5, "odd shape": 0.2}
    config = labels("bar", "odd shape", problem_type="multi_label_classification", decision_threshold=thresholds)
    table = survey_table(["a", "b"], [[0.6, 0.1], [0.4, 0.3]], config=config)
    pd.testing.assert_series_equal(table["selected_bar"], pd.Series([True, False]), check_names=False)
    assert table["selected_odd_shape"].tolist() == [False, True]


def test_a_threshold_for_another_prevalence_selects_nothing():
    config = labels("no ring", "ring", decision_threshold={"ring": 0.25})
    assert "selected" not in survey_table(["a"], [[0.1, 0.9]], config=config, prevalence="sky")
    with pytest.raises(ValueError, match="decision_threshold names bar; the labels are no ring, ring"):
        survey_table(["a"], [[0.1, 0.9]], config=labels("no ring", "ring", decision_threshold={"bar": 0.5}))


def test_every_column_of_a_table_has_a_description(concentrations, config):
    for table in (concentrations, friendly_table(concentrations, config), advanced_table(concentrations, config)):
        assert all(describe_column(name) for name in table.columns)
    assert describe_column("bar_yes_90pc-upper").startswith("Upper end of the 90% interval")
    assert describe_column("redshift") == ""


@pytest.mark.parametrize(
    ("name", "beginning"),
    [
        ("probability_high_gas_fraction", "Probability of the label"),
        ("selected_low_concentration", "Whether the probability reaches"),
        ("predicted_gas_fraction", "Predicted value"),
    ],
)
def test_a_label_that_ends_as_a_column_of_votes_does_is_described_as_a_label(name, beginning):
    assert describe_column(name).startswith(beginning)
