import numpy as np
import pytest

from zoobot_hf.evaluation.tables import judged_table, prediction_table

VALUES = np.array([[0.1, 0.9], [0.8, 0.2], [0.5, 0.5]])
NAMES = ["a", "b", "c"]


def table_of(values=VALUES, *, identifiers=NAMES, labels=("not ring", "ring"), problem="single_label_classification"):
    return prediction_table(identifiers, values, label_names=labels, problem_type=problem)


def test_a_single_label_has_its_name_and_every_probability():
    table = table_of()
    assert list(table.columns) == ["id_str", "predicted_label", "probability_not_ring", "probability_ring"]
    assert table["id_str"].tolist() == ["a", "b", "c"]
    assert table["predicted_label"].tolist() == ["ring", "not ring", "not ring"]
    assert table["probability_ring"].tolist() == pytest.approx([0.9, 0.2, 0.5])
    assert table["probability_ring"].dtype == np.float32


def test_a_judged_galaxy_has_its_label_and_the_probability_of_that():
    table = judged_table(NAMES, VALUES, [1, 1, 0], label_names=["not ring", "ring"])
    assert list(table.columns) == [
        "id_str",
        "label",
        "predicted_label",
        "probability_not_ring",
        "probability_ring",
        "probability_of_label",
    ]
    assert table["label"].tolist() == ["ring", "ring", "not ring"]
    assert table["probability_of_label"].tolist() == [0.9, 0.2, 0.5]


def test_several_labels_have_no_single_prediction():
    table = table_of(problem="multi_label_classification")
    assert list(table.columns) == ["id_str", "probability_not_ring", "probability_ring"]


def test_a_regression_has_its_predicted_values():
    table = table_of(labels=["bar-fraction", "redshift"], problem="regression")
    assert list(table.columns) == ["id_str", "predicted_bar_fraction", "predicted_redshift"]
    assert table["predicted_redshift"].tolist() == pytest.approx([0.9, 0.2, 0.5])


def test_the_label_keeps_the_name_that_its_column_cannot_have():
    table = table_of(labels=["E/S0 (early)", "Sä"])
    assert list(table.columns[2:]) == ["probability_E_S0__early_", "probability_S_"]
    assert table["predicted_label"].tolist() == ["Sä", "E/S0 (early)", "E/S0 (early)"]


def test_no_column_is_lost_where_two_names_become_the_same():
    table = table_of(np.eye(3), labels=["ring-like", "ring like", "none"])
    assert list(table.columns[2:]) == ["probability_ring_like_0", "probability_ring_like_1", "probability_none"]
    assert table["probability_ring_like_1"].tolist() == [0, 1, 0]


def test_no_galaxies_make_an_empty_table_with_its_columns(tmp_path):
    table = table_of(np.empty((0, 2)), identifiers=[])
    assert list(table.columns) == ["id_str", "predicted_label", "probability_not_ring", "probability_ring"]
    assert len(table) == 0
    table.to_parquet(tmp_path / "empty.parquet")


def test_no_number_leads_to_the_name_of_another_label():
    table = table_of(np.eye(3), labels=["a b", "a_b", "a_b_0"])
    assert list(table.columns[2:]) == ["probability_a_b_0_0", "probability_a_b_1", "probability_a_b_0_2"]
