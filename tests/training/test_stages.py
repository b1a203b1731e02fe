import math

import pytest

from zoobot_hf.training import stages
from zoobot_hf.training.stages import StageResult


def result_of(name, *, validation=0.0, test=0.0):
    return StageResult(name, [], 1.0, 0.5, [[0.0, validation]], [[0.0, test]], 1.0)


def test_a_half_written_checkpoint_is_passed_over(tmp_path):
    whole, half = tmp_path / "checkpoint-4", tmp_path / "checkpoint-8"
    for folder in (whole, half):
        folder.mkdir()
    (whole / "trainer_state.json").touch()
    assert stages._last_whole_checkpoint(tmp_path) == str(whole)
    assert not half.exists()


# What a run wrote as JSON has None for what is not finite.
@pytest.mark.parametrize("wrong", [{"validation": math.nan}, {"test": math.inf}, {"test": None}])
def test_a_stage_with_outputs_that_are_not_finite_is_left_out(wrong, caplog):
    frozen, unfrozen = result_of("frozen"), result_of("unfrozen", **wrong)
    assert stages._without_diverged([frozen, unfrozen]) == [frozen]
    assert "The unfrozen stage has diverged" in caplog.text
    with pytest.raises(ValueError, match=r"The unfrozen stage has diverged .* lower learning_rate"):
        stages._without_diverged([unfrozen])
