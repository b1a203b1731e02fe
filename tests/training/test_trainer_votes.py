"""Both stages on volunteers' votes."""

import copy

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Value
from tiny_models import ENCODERS

from zoobot_hf import (
    FrozenStageArguments,
    FrozenStageTrainer,
    UnfrozenStageArguments,
    UnfrozenStageTrainer,
    ZoobotConfig,
    ZoobotForGalaxyZoo,
    cross_validate,
    load_survey,
    read_votes,
)
from zoobot_hf.evaluation.vote_metrics import vote_metrics_for_trainer
from zoobot_hf.publishing.model_card import StageFacts
from zoobot_hf.publishing.run_folder import save_stage
from zoobot_hf.training.trainer import GalaxyCollator, check_labels

DECALS, EUCLID = load_survey("decals_dr5"), load_survey("euclid")
STAGES = [FrozenStageTrainer, UnfrozenStageTrainer]


def model_of(encoder, tree=DECALS):
    torch.manual_seed(0)
    return ZoobotForGalaxyZoo(ZoobotConfig(copy.deepcopy(ENCODERS[encoder]), decision_tree=tree.to_dict())).eval()


def arguments_of(trainer_class, folder, **changes):
    settings = {"num_train_epochs": 3, "per_device_train_batch_size": 8, "use_cpu": True, "disable_tqdm": True}
    if trainer_class is FrozenStageTrainer:
        cache = {"embedding_cache_dir": str(folder / "embeddings"), "learning_rate": 0.1}
        return FrozenStageArguments(output_dir=str(folder), **{**settings, **cache, **changes})
    return UnfrozenStageArguments(output_dir=str(folder), **{**settings, "learning_rate": 1e-2, **changes})


def trainer_of(trainer_class, model, arguments, galaxies, processor):
    return trainer_class(
        model,
        arguments,
        processing_class=processor,
        train_dataset=galaxies.select(range(24)),
        eval_dataset=galaxies.select(range(24, 40)),
        compute_metrics=vote_metrics_for_trainer(model.config.decision_tree),
    )


def state_of(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


@pytest.mark.parametrize("encoder", ["layer_norm", "batch_norm"])
@pytest.mark.parametrize("trainer_class", STAGES)
def test_a_stage_lowers_the_validation_loss(trainer_class, encoder, galaxies_with_votes, processor, tmp_path):
    model, arguments = model_of(encoder), arguments_of(trainer_class, tmp_path)
    trainer = trainer_of(trainer_class, model, arguments, galaxies_with_votes(DECALS), processor)
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_loss"] < 0.95 * before["eval_loss"]
    assert after["eval_vote_mean_absolute_error"] < before["eval_vote_mean_absolute_error"]


@pytest.mark.parametrize("settings", [{}, {"embedding_cache": False}], ids=["embedding cache", "images"])
@pytest.mark.parametrize("encoder", ["layer_norm", "batch_norm", "timm"])
def test_the_frozen_stage_moves_not_a_bit_of_the_encoder(encoder, settings, galaxies_with_votes, processor, tmp_path):
    model, arguments = model_of(encoder), arguments_of(FrozenStageTrainer, tmp_path, num_train_epochs=1, **settings)
    before, head = state_of(model.encoder), state_of(model.head)
    trainer_of(FrozenStageTrainer, model, arguments, galaxies_with_votes(DECALS), processor).train()
    after = model.encoder.state_dict()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    assert not any(torch.equal(head[name], tensor) for name, tensor in model.head.state_dict().items())


@pytest.mark.parametrize("trainer_class", STAGES)
def test_a_tree_finetuned_to_another_survey_starts_better_than_a_fresh_head(
    trainer_class, galaxies_with_votes, processor, tmp_path
):
    trained = model_of("batch_norm")
    arguments = arguments_of(UnfrozenStageTrainer, tmp_path / "decals", num_train_epochs=6)
    trainer_of(UnfrozenStageTrainer, trained, arguments, galaxies_with_votes(DECALS), processor).train()
    trained.save_pretrained(tmp_path / "model")

    losses = {}
    for start in ("old answers", "fresh head"):
        torch.manual_seed(1)
        model = ZoobotForGalaxyZoo.from_pretrained(tmp_path / "model", decision_tree=EUCLID.to_dict())
        if start == "fresh head":
            model.head[-1].reset_parameters()
        arguments = arguments_of(trainer_class, tmp_path / start, num_train_epochs=1, learning_rate=1e-3)
        trainer = trainer_of(trainer_class, model, arguments, galaxies_with_votes(EUCLID), processor)
        trainer.train()
        losses[start] = trainer.evaluate()["eval_loss"]
    assert losses["old answers"] < 0.97 * losses["fresh head"]


def test_the_grid_and_the_model_predict_the_same(galaxies_with_votes, processor, tmp_path):
    model, galaxies = model_of("layer_norm"), galaxies_with_votes(DECALS)
    arguments = arguments_of(FrozenStageTrainer, tmp_path, load_best_model_at_end=False)
    trainer = trainer_of(FrozenStageTrainer, model, arguments, galaxies, processor)
    trainer.train()
    logged = [record["eval_loss"] for record in trainer.state.log_history if "eval_loss" in record]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(logged[-1], rel=1e-4)
    predicted = trainer.predict(galaxies.select(range(24, 40)))
    with torch.inference_mode():
        expected = model.eval()(**processor(galaxies["image"][24:40])).concentrations
    assert torch.allclose(torch.from_numpy(predicted.predictions), expected, rtol=1e-4)
    assert np.array_equal(predicted.label_ids, read_votes(galaxies, DECALS)[24:40])


@pytest.mark.parametrize("trainer_class", STAGES)
def test_votes_reach_the_model_in_the_trees_order_whatever_the_datasets(
    trainer_class, galaxies_with_votes, processor, tmp_path
):
    losses = []
    for reverse in (False, True):
        galaxies = galaxies_with_votes(DECALS, reverse=reverse)
        arguments = arguments_of(trainer_class, tmp_path, seed=1)
        losses.append(
            trainer_of(trainer_class, model_of("layer_norm"), arguments, galaxies, processor).evaluate()["eval_loss"]
        )
    assert losses[0] == losses[1]


def test_the_collator_makes_missing_votes_nan(processor, galaxy_images):
    examples = [{"image": galaxy_images[0], "label": {"a_yes": None, "a_no": 2.0, "b_yes": 3.0}}]
    batch = GalaxyCollator(processor, vote_columns=["b_yes", "a_yes", "a_no"])(examples)
    assert batch["labels"].dtype == torch.float32
    assert torch.equal(batch["labels"].nan_to_num(-1), torch.tensor([[3.0, -1.0, 2.0]]))


def test_missing_and_unknown_vote_columns_are_all_named(galaxies_with_votes):
    votes = galaxies_with_votes(DECALS)
    kept = {
        name: kind for name, kind in votes.features["label"].items() if name not in ("bar-dr5_weak", "bar-dr5_strong")
    }
    features = Features({"label": {**kept, "bar-dr5_maybe": Value("float32"), "odd": Value("float32")}})
    other = Dataset.from_dict({"label": [dict.fromkeys(features["label"], 0.0)]}, features=features)
    message = r"misses the vote columns bar-dr5_strong, bar-dr5_weak, and has bar-dr5_maybe, odd that .*decision_tree="
    with pytest.raises(ValueError, match=message):
        check_labels(other, model_of("layer_norm"))


def test_votes_for_a_classifier_and_labels_for_a_tree_are_refused(galaxies_with_votes, layer_norm_model):
    votes = galaxies_with_votes(DECALS)
    with pytest.raises(ValueError, match="labels are votes, and the model is a ZoobotForImageClassification; load"):
        check_labels(votes, layer_norm_model)
    labels = votes.remove_columns("label").add_column("label", [0.0] * len(votes))
    with pytest.raises(ValueError, match="labels are no votes, and the model is a ZoobotForGalaxyZoo; load votes"):
        check_labels(labels, model_of("layer_norm"))


@pytest.mark.parametrize("trainer_class", STAGES)
@pytest.mark.parametrize("as_dictionary", [False, True])
def test_the_votes_of_the_validation_split_are_checked_too(
    trainer_class, as_dictionary, galaxies_with_votes, processor, tmp_path
):
    euclid = galaxies_with_votes(EUCLID)
    splits = {
        "train_dataset": galaxies_with_votes(DECALS),
        "eval_dataset": {"rings": euclid} if as_dictionary else euclid,
    }
    arguments = arguments_of(trainer_class, tmp_path)
    with pytest.raises(ValueError, match=r"misses the vote columns smooth-or-featured-dr5_smooth, .*-euclid_"):
        trainer_class(model_of("layer_norm"), arguments, processing_class=processor, **splits)


@pytest.mark.parametrize(("count", "shown"), [(-2.0, "-2"), (0.25, "0.25")])
def test_votes_that_are_no_counts_are_refused_with_their_columns(count, shown, galaxies_with_votes):
    def spoil(galaxy, row):
        wrong = {"bar-dr5_weak": count, "bar-dr5_no": count} if row == 2 else {}
        return {"label": galaxy["label"] | wrong}

    galaxies = galaxies_with_votes(DECALS).map(spoil, with_indices=True)
    message = f"votes hold {shown} in row 2; no counts are in the columns bar-dr5_weak, bar-dr5_no: give counts"
    with pytest.raises(ValueError, match=message):
        check_labels(galaxies, model_of("layer_norm"))


@pytest.mark.parametrize("nothing", [0.0, None])
def test_a_split_without_any_vote_is_refused(nothing, galaxies_with_votes):
    galaxies = galaxies_with_votes(DECALS).map(lambda galaxy: {"label": dict.fromkeys(galaxy["label"], nothing)})
    with pytest.raises(ValueError, match="none of the dataset's 40 galaxies has a vote in the columns smooth-or-feat"):
        check_labels(galaxies, model_of("layer_norm"))


def test_folds_of_galaxies_with_votes_are_refused(galaxies_with_votes, processor):
    with pytest.raises(ValueError, match="label is votes; folds need one class for each galaxy"):
        cross_validate(model_of("layer_norm"), processor, galaxies_with_votes(DECALS))


def test_a_stage_on_votes_is_saved_with_its_card(galaxies_with_votes, processor, tmp_path):
    model, arguments = model_of("layer_norm"), arguments_of(FrozenStageTrainer, tmp_path, num_train_epochs=1)
    trainer = trainer_of(FrozenStageTrainer, model, arguments, galaxies_with_votes(DECALS), processor)
    trainer.train()
    stage = StageFacts(name="frozen", hyperparameters=arguments.shown)
    save_stage(tmp_path / "out", model, processor, stage=stage, history=trainer.state.log_history)
    assert "each of the 10 questions of the decision tree decals_dr5" in (tmp_path / "out" / "README.md").read_text()
