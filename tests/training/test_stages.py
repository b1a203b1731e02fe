import errno
import json
import math
from types import SimpleNamespace

import pytest
from safetensors import SafetensorError
from transformers import TrainerState

from zoobot_hf.training import stages
from zoobot_hf.training.stages import StageResult


def result_of(name, *, validation=0.0, test=0.0):
    return StageResult(name, [], 1.0, 0.5, [[0.0, validation]], [[0.0, test]], 1.0)


@pytest.fixture
def whole(tmp_path):
    """A checkpoint that was written to its end."""
    checkpoint = tmp_path / "stage" / "checkpoint-4"
    checkpoint.mkdir(parents=True)
    TrainerState().save_to_json(checkpoint / "trainer_state.json")
    return checkpoint


@pytest.mark.parametrize("written", [None, "", '{"best_global_step": 4, "best_'])
def test_a_half_written_checkpoint_is_passed_over_and_deleted_when_every_process_has_seen_it(
    written, whole, monkeypatch
):
    half = whole.with_name("checkpoint-8")
    half.mkdir()
    if written is not None:
        (half / "trainer_state.json").write_text(written)
    is_there = []
    processes = SimpleNamespace(is_main_process=True, wait_for_everyone=lambda: is_there.append(half.exists()))
    monkeypatch.setattr(stages, "PartialState", lambda: processes)
    assert stages._last_whole_checkpoint(whole.parent) == whole
    assert is_there == [True, False, False]


@pytest.mark.parametrize("original", ["original/checkpoint-2", r"C:\runs\original\checkpoint-2"])
def test_the_best_checkpoint_of_a_copied_run_is_its_own(original, whole, tmp_path):
    path = whole / "trainer_state.json"
    (tmp_path / original).mkdir(parents=True)
    best = str(tmp_path / original) if "/" in original else original
    TrainerState(best_global_step=2, best_model_checkpoint=best).save_to_json(path)
    with pytest.raises(FileNotFoundError, match=r"stage/checkpoint-2, the best .* is gone; put it back, or start anew"):
        stages._take_best_beside(whole)
    own = whole.with_name("checkpoint-2")
    own.mkdir()
    stages._take_best_beside(whole)
    assert json.loads(path.read_text())["best_model_checkpoint"] == str(own)


def test_a_run_that_does_not_say_what_is_asked_now_is_another(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({"balance": None}))
    with pytest.raises(ValueError, match="had another seed; resume"):
        stages.check_same_run(tmp_path, {"balance": None, "seed": 1})


# What a run wrote as JSON has None for what is not finite.
@pytest.mark.parametrize("wrong", [{"validation": math.nan}, {"test": math.inf}, {"test": None}])
def test_a_stage_with_outputs_that_are_not_finite_is_left_out(wrong, caplog):
    frozen, unfrozen = result_of("frozen"), result_of("unfrozen", **wrong)
    assert stages._without_diverged([frozen, unfrozen]) == [frozen]
    assert "The unfrozen stage has diverged" in caplog.text
    with pytest.raises(ValueError, match=r"The unfrozen stage has diverged .* lower learning_rate"):
        stages._without_diverged([unfrozen])


@pytest.mark.parametrize(
    "error",
    [
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        RuntimeError("[enforce fail at inline_container.cc:671] . unexpected pos 8512 vs 8406"),
        RuntimeError("basic_ios::clear: iostream error"),
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
    ],
)
def test_a_full_disk_is_said_to_be_one_in_the_same_words(error, tmp_path):
    message = rf"no space is left for the run in {tmp_path} \(.+\); make room, and go on .*--resume"
    with pytest.raises(OSError, match=message), stages.full_disk_named(tmp_path):
        raise error


@pytest.mark.parametrize(
    "error",
    [
        SafetensorError("Error while deserializing header: header too large"),
        RuntimeError("CUDA out of memory"),
        RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)"),
        PermissionError(errno.EACCES, "Permission denied"),
        OSError("the embeddings take 9.0 MB, and No space left on device; clear the cache"),
    ],
)
def test_what_is_no_full_disk_of_the_run_is_said_as_it_is(error, tmp_path):
    with pytest.raises(type(error)) as raised, stages.full_disk_named(tmp_path):
        raise error
    assert raised.value is error
