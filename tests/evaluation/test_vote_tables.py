import numpy as np
import pytest
from scipy import stats
from small_trees import CONCENTRATIONS, TREE

from zoobot_hf import ZoobotConfig
from zoobot_hf.evaluation.vote_tables import advanced_table, concentration_table, friendly_table


@pytest.fixture
def config():
    return ZoobotConfig(decision_tree=TREE)


@pytest.fixture
def concentrations(config):
    return concentration_table(["a", "b", "c"], CONCENTRATIONS, config.label_names)


def test_friendly_fractions_are_empty_where_less_than_half_are_asked(concentrations, config):
    table = friendly_table(concentrations, config).set_index("id_str")
    # By hand. a: 0.8 are asked about the bar, 0.8 x 0.75 = 0.6 about its strength. b: 0.1 and 0.05.
    # c: 0.6 about the bar, 0.6 x 0.25 = 0.15 about its strength.
    nan = np.nan
    assert table.columns.tolist()[2] == "bar_yes_fraction"
    np.testing.assert_allclose(table.loc["a"], [0.2, 0.8, 0.75, 0.25, 0.75, 0.25], rtol=1e-6)
    np.testing.assert_allclose(table.loc["b"], [0.9, 0.1, nan, nan, nan, nan], rtol=1e-6)
    np.testing.assert_allclose(table.loc["c"], [0.4, 0.6, 0.25, 0.75, nan, nan], rtol=1e-6)
    half = concentrations.tail(1).assign(smooth_yes_concentration=5.0, smooth_no_concentration=5.0)
    assert friendly_table(half, config)["bar_yes_fraction"].tolist() == [0.25]


def test_the_advanced_table_has_all_fractions_with_intervals_and_shares_asked(concentrations, config):
    table = advanced_table(concentrations, config).set_index("id_str")
    assert table.columns.tolist()[:4] == [
        "smooth_yes_fraction",
        "smooth_yes_90pc-lower",
        "smooth_yes_90pc-upper",
        "smooth_yes_proportion-asked",
    ]
    by_hand = {  # fraction, own concentration, the others', share asked
        ("a", "bar_strong"): (0.25, 2, 6, 0.6),
        ("b", "bar_no"): (0.5, 5, 5, 0.1),
        ("c", "bar_weak"): (0.5, 5, 5, 0.15),
        ("c", "smooth_no"): (0.6, 6, 4, 1.0),
    }
    for (galaxy, answer), (fraction, own, others, share) in by_hand.items():
        row = table.loc[galaxy, [f"{answer}_{part}" for part in ("fraction", "90pc-lower", "90pc-upper")]]
        np.testing.assert_allclose(row, [fraction, *stats.beta(own, others).ppf([0.05, 0.95])], rtol=1e-5)
        assert table.loc[galaxy, f"{answer}_proportion-asked"] == pytest.approx(share, rel=1e-6)


def test_what_has_no_tree_or_no_concentrations_is_refused(concentrations, config):
    with pytest.raises(ValueError, match="the model has no decision tree"):
        friendly_table(concentrations, ZoobotConfig(id2label={0: "a", 1: "b"}))
    with pytest.raises(ValueError, match="the table has no column 'bar_no_concentration'"):
        advanced_table(concentrations.drop(columns="bar_no_concentration"), config)
