import copy

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, Value
from torch.utils.data import DataLoader
from transformers import ResNetConfig, TrainerCallback, TrainingArguments
from transformers.models.convnext.modeling_convnext import ConvNextLayer

from zoobot_hf import (
    FrozenStageArguments,
    FrozenStageTrainer,
    UnfrozenStageArguments,
    UnfrozenStageTrainer,
    ZoobotConfig,
    ZoobotForImageClassification,
    ZoobotImageProcessor,
)
from zoobot_hf.data.images import UnreadableImageError
from zoobot_hf.evaluation.metrics import metrics_for_trainer
from zoobot_hf.models.heads import build_head, head_loss
from zoobot_hf.training.augmentation import augment_galaxies, margin_of_turns
from zoobot_hf.training.embedding_cache import compute_embeddings, list_cache
from zoobot_hf.training.head_grid import HeadGrid
from zoobot_hf.training.machine import InferenceRunner
from zoobot_hf.training.trainer import GalaxyCollator, layer_decay_groups

NAN = float("nan")


@pytest.fixture
def galaxies(galaxy_images, galaxy_labels):
    features = Features({"id_str": Value("string"), "image": Image(), "label": ClassLabel(names=["not ring", "ring"])})
    columns = {
        "id_str": [f"galaxy_{index:02d}" for index in range(len(galaxy_images))],
        "image": galaxy_images,
        "label": list(galaxy_labels),
    }
    return Dataset.from_dict(columns, features=features)


def state_of(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def moved(before, after):
    return {name for name in before if not torch.equal(before[name], after[name])}


def train(trainer_class, model, arguments, galaxies, processor, *, problem_type="single_label_classification"):
    trainer = trainer_class(
        model,
        arguments,
        processing_class=processor,
        train_dataset=galaxies.select(range(24)),
        eval_dataset=galaxies.select(range(24, 40)),
        compute_metrics=metrics_for_trainer(problem_type),
    )
    trainer.train()
    return trainer


def frozen_arguments(folder, **changes):
    settings = {
        "embedding_cache_dir": str(folder / "embeddings"),
        "num_train_epochs": 2,
        "per_device_train_batch_size": 8,
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return FrozenStageArguments(output_dir=str(folder), **{**settings, **changes})


def unfrozen_arguments(folder, **changes):
    settings = {"num_train_epochs": 2, "per_device_train_batch_size": 8, "use_cpu": True, "disable_tqdm": True}
    return UnfrozenStageArguments(output_dir=str(folder), **{**settings, **changes})


@pytest.mark.parametrize("is_cached", [True, False])
@pytest.mark.parametrize("name", ["layer_norm_model", "batch_norm_model", "timm_model", "timm_convnext_model"])
def test_the_frozen_stage_moves_the_head_and_not_a_bit_of_the_encoder(
    name, is_cached, request, galaxies, processor, tmp_path
):
    model = request.getfixturevalue(name)
    encoder, head = state_of(model.encoder), state_of(model.head)
    train(FrozenStageTrainer, model, frozen_arguments(tmp_path, embedding_cache=is_cached), galaxies, processor)
    assert moved(encoder, model.encoder.state_dict()) == set()
    assert moved(head, model.head.state_dict()) == set(head)


def test_the_encoder_computes_in_the_precision_that_the_frozen_stage_is_asked_for(
    layer_norm_model, galaxies, processor, tmp_path
):
    arguments = frozen_arguments(tmp_path, bf16=True)
    train(FrozenStageTrainer, layer_norm_model, arguments, galaxies, processor)
    held_out = galaxies.select(range(24, 40))
    folder = arguments.embedding_cache_dir
    made = len(list_cache(folder))
    rounded, exact = (
        compute_embeddings(layer_norm_model, held_out, processor, cache_dir=folder, bf16=bf16)["embeddings"][:]
        for bf16 in (True, False)
    )
    assert len(list_cache(folder)) == made + 1  # the stage has left the first of them
    assert rounded != exact


@pytest.mark.parametrize("name", ["layer_norm_model", "batch_norm_model", "timm_model", "timm_convnext_model"])
def test_the_unfrozen_stage_moves_every_weight_and_no_statistics(name, request, galaxies, processor, tmp_path):
    model = request.getfixturevalue(name)
    before = state_of(model)
    arguments = unfrozen_arguments(tmp_path, learning_rate=1e-2, load_best_model_at_end=False)
    train(UnfrozenStageTrainer, model, arguments, galaxies, processor)
    weights = {name for name, _ in model.named_parameters()}
    assert moved(before, model.state_dict()) == weights


def test_the_unfrozen_stage_takes_grey_images(galaxies, tmp_path):
    encoder = ResNetConfig(num_channels=1, embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    labels = {0: "not ring", 1: "ring"}
    config = ZoobotConfig(encoder, id2label=labels, label2id={name: index for index, name in labels.items()})
    model = ZoobotForImageClassification(config)
    before = state_of(model)
    arguments = unfrozen_arguments(tmp_path, learning_rate=1e-2, load_best_model_at_end=False)
    train(UnfrozenStageTrainer, model, arguments, galaxies, ZoobotImageProcessor(32, num_channels=1))
    assert moved(before, model.state_dict()) == {name for name, _ in model.named_parameters()}


def test_the_unfrozen_stage_has_no_gradient_of_a_narrow_strided_convolution(
    batch_norm_model, galaxies, processor, tmp_path
):
    seen = set()
    shortcuts = [part for part in batch_norm_model.modules() if getattr(part, "kernel_size", None) == (1, 1)]
    for convolution in shortcuts:
        convolution.register_forward_hook(
            lambda layer, inputs, output: seen.add(output.grad_fn and output.grad_fn._saved_stride)
        )
    assert {(convolution.in_channels, convolution.stride) for convolution in shortcuts} == {(8, (2, 2))}
    train(UnfrozenStageTrainer, batch_norm_model, unfrozen_arguments(tmp_path), galaxies, processor)
    assert seen == {None, (1, 1)}  # None of an evaluation


@pytest.mark.parametrize("name", ["layer_norm_model", "batch_norm_model", "timm_model", "timm_convnext_model"])
def test_with_last_blocks_only_the_head_and_these_blocks_move(name, request, galaxies, processor, tmp_path):
    model = request.getfixturevalue(name)
    before = state_of(model)
    arguments = unfrozen_arguments(tmp_path, learning_rate=1e-2, last_blocks=1, load_best_model_at_end=False)
    train(UnfrozenStageTrainer, model, arguments, galaxies, processor)
    last_block = {f"zoobot.encoder.{name}" for name in model.encoder_blocks()[-1]}
    head = {f"head.{name}" for name, _ in model.head.named_parameters()}
    assert moved(before, model.state_dict()) == last_block | head


EXACT, ROUNDED = {torch.float32}, {torch.bfloat16}


@pytest.mark.parametrize(
    ("settings", "in_training", "in_evaluation"),
    [
        ({"bf16_steps": True}, ROUNDED, EXACT),
        ({"bf16_steps": False}, EXACT, EXACT),
        ({"bf16": False}, EXACT, EXACT),
        ({"bf16": True}, ROUNDED, ROUNDED),
    ],
)
def test_training_steps_and_evaluations_have_the_precision_that_is_asked_for(
    settings, in_training, in_evaluation, layer_norm_model, galaxies, processor, tmp_path, monkeypatch, caplog
):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")  # as `accelerate config` has it, which isn't asked
    seen = {True: set(), False: set()}

    def note(layer, inputs, output):
        seen[layer.training].add(output.dtype)

    # Under mixed precision a linear layer's output is rounded.
    layer = next(part for part in layer_norm_model.encoder.modules() if isinstance(part, torch.nn.Linear))
    layer.register_forward_hook(note)
    arguments = unfrozen_arguments(tmp_path, num_train_epochs=1, **settings)
    train(UnfrozenStageTrainer, layer_norm_model, arguments, galaxies, processor)
    assert seen == {True: in_training, False: in_evaluation}
    is_said = "precision bf16 is passed over: the stage's own is no. Choose it with bf16 or fp16" in caplog.text
    assert is_said == (in_evaluation == EXACT)


@pytest.mark.parametrize(("asked", "own"), [("fp8", "no"), ("fp8", "bf16"), ("fp16", "bf16")])
def test_a_precision_of_the_launcher_that_is_passed_over_is_said(asked, own, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", asked)
    assert unfrozen_arguments(tmp_path, bf16=own == "bf16").mixed_precision == own
    assert f"mixed precision {asked} is passed over: the stage's own is {own}." in caplog.text


def test_a_model_that_was_trained_in_bfloat16_predicts_in_the_precision_that_is_asked_for(
    timm_convnext_model, galaxies, processor, tmp_path
):
    arguments = unfrozen_arguments(tmp_path, num_train_epochs=1, learning_rate=1e-2, bf16=True)
    train(UnfrozenStageTrainer, timm_convnext_model, arguments, galaxies, processor)
    images = torch.rand(4, 3, 32, 32)
    exact, rounded = (InferenceRunner(timm_convnext_model, batch_size=4, bf16=bf16)(images) for bf16 in (False, True))
    fresh = type(timm_convnext_model)(timm_convnext_model.config)
    fresh.load_state_dict(timm_convnext_model.state_dict())
    assert torch.equal(exact, InferenceRunner(fresh, batch_size=4, bf16=False)(images))
    assert torch.equal(rounded, InferenceRunner(fresh, batch_size=4, bf16=True)(images))
    assert not torch.equal(exact, rounded)


@pytest.mark.parametrize(("has_amx", "has_avx512_bf16"), [(True, True), (True, False), (False, True), (False, False)])
def test_steps_are_in_bfloat16_on_a_cpu_that_is_fast_in_it(has_amx, has_avx512_bf16, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: has_amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_avx512_bf16)
    assert unfrozen_arguments(tmp_path).bf16_steps is (has_amx or has_avx512_bf16)
    assert unfrozen_arguments(tmp_path).bf16 is False
    for settings in ({"bf16": False}, {"bf16": True}, {"bf16_steps": False}):
        assert unfrozen_arguments(tmp_path, **settings).bf16_steps is False
    assert unfrozen_arguments(tmp_path, bf16_steps=True).bf16_steps is True


def test_training_images_are_read_wide_enough_for_any_turn(layer_norm_model, galaxies, tmp_path):
    arguments, options = unfrozen_arguments(tmp_path), {"train_dataset": galaxies, "eval_dataset": galaxies}
    processor = ZoobotImageProcessor(32, zoom=2)
    trainer = UnfrozenStageTrainer(layer_norm_model, arguments, processing_class=processor, **options)
    width = round(32 * margin_of_turns(zoom_range=arguments.zoom_range, max_shift=arguments.max_shift))
    assert trainer.train_dataset[0]["wide_field"].shape == (3, width, width)


def test_wide_fields_are_augmented_in_float32(layer_norm_model, galaxies, processor, tmp_path, monkeypatch):
    seen = []

    def note(*args, **kwargs):
        seen.append(torch.is_autocast_enabled("cpu"))
        return augment_galaxies(*args, **kwargs)

    monkeypatch.setattr("zoobot_hf.training.trainer.augment_galaxies", note)
    arguments = unfrozen_arguments(tmp_path, num_train_epochs=1, bf16_steps=True)
    train(UnfrozenStageTrainer, layer_norm_model, arguments, galaxies, processor)
    assert seen == [False, False, False]


def test_batch_norm_statistics_move_when_they_are_not_kept(batch_norm_model, galaxies, processor, tmp_path):
    before = state_of(batch_norm_model)
    arguments = unfrozen_arguments(tmp_path, keep_batch_norm_statistics=False, load_best_model_at_end=False)
    train(UnfrozenStageTrainer, batch_norm_model, arguments, galaxies, processor)
    names = moved(before, batch_norm_model.state_dict())
    assert any(name.endswith("running_mean") for name in names)


def test_the_weights_of_lower_loss_are_logged_saved_and_kept(layer_norm_model, galaxies, processor, tmp_path, caplog):
    # A rate so high that the steps go past what they look for, and their mean does not.
    arguments = unfrozen_arguments(tmp_path, num_train_epochs=4, learning_rate=3e-2, save_total_limit=None)
    with caplog.at_level("INFO", logger="zoobot_hf.training.trainer"):
        trainer = train(UnfrozenStageTrainer, layer_norm_model, arguments, galaxies, processor)
    compared = [record.args for record in caplog.records if "with their mean" in record.message]
    logged = [record["eval_loss"] for record in trainer.state.log_history if "eval_loss" in record]
    assert [step for step, _, _ in compared] == [3, 6, 9, 12]
    assert logged == [min(losses) for _, *losses in compared]
    assert any(mean < last for _, last, mean in compared)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(logged), rel=1e-5)
    for (step, *_), loss in zip(compared, logged, strict=True):
        saved = ZoobotForImageClassification.from_pretrained(tmp_path / f"checkpoint-{step}")
        layer_norm_model.load_state_dict(saved.state_dict())
        assert trainer.evaluate()["eval_loss"] == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("batch", [3, 7, 40])
@pytest.mark.parametrize("trainer_class", [FrozenStageTrainer, UnfrozenStageTrainer])
@pytest.mark.parametrize(
    "changes",
    [
        {"problem_type": "multi_label_classification"},
        {"problem_type": "multi_label_classification", "class_weights": [1.0, 19.0]},
        {"problem_type": "regression"},
        {"class_weights": [1.0, 19.0]},
    ],
)
def test_the_validation_loss_is_that_of_all_galaxies_together(
    changes, trainer_class, batch, layer_norm_model, galaxies, processor, tmp_path
):
    model = layer_norm_model
    model.config.update(changes)
    model.head[-1].weight.data.normal_()
    if model.config.problem_type != "single_label_classification":
        labels = [[number % 2, NAN] for number in range(32)] + [[0.0, 1.0]] * 4 + [[NAN, NAN]] * 4
        galaxies = galaxies.remove_columns("label").add_column("label", labels)
    arguments = frozen_arguments if trainer_class is FrozenStageTrainer else unfrozen_arguments
    settings = arguments(tmp_path, per_device_eval_batch_size=batch)
    trainer = trainer_class(model, settings, processing_class=processor, eval_dataset=galaxies)
    logits = trainer.predict(galaxies).predictions
    together = head_loss(torch.tensor(logits), torch.tensor(galaxies["label"][:]), model.config, training=False)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(together.item(), rel=1e-5)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("trainer_class", [FrozenStageTrainer, UnfrozenStageTrainer])
def test_each_split_is_evaluated_by_its_own_galaxies(
    trainer_class, workers, layer_norm_model, galaxies, processor, tmp_path
):
    arguments = frozen_arguments if trainer_class is FrozenStageTrainer else unfrozen_arguments
    trainer = trainer_class(
        layer_norm_model,
        arguments(tmp_path, dataloader_num_workers=workers),
        processing_class=processor,
        eval_dataset={"validation": galaxies.select(range(12)), "test": galaxies.select(range(5))},
        compute_metrics=lambda predicted: {"count": len(predicted.label_ids)},
    )
    both = trainer.evaluate()
    assert (both["eval_validation_count"], both["eval_test_count"]) == (12, 5)
    assert [trainer.evaluate(galaxies.select(range(count)))["eval_count"] for count in (7, 9)] == [7, 9]


def test_the_head_of_lowest_loss_on_all_splits_wins(layer_norm_model, galaxies, processor, tmp_path, monkeypatch):
    seen, choose_winner = set(), HeadGrid.choose_winner

    def choose(grid, validation):
        seen.add(tuple(map(len, validation)))
        choose_winner(grid, validation)

    monkeypatch.setattr(HeadGrid, "choose_winner", choose)
    FrozenStageTrainer(
        layer_norm_model,
        frozen_arguments(tmp_path, metric_for_best_model="eval_first_loss"),
        processing_class=processor,
        train_dataset=galaxies.select(range(24)),
        eval_dataset={"first": galaxies.select(range(24, 34)), "second": galaxies.select(range(34, 40))},
    ).train()
    assert seen == {(10, 6)}


def test_after_the_frozen_stage_its_trainer_predicts_with_the_encoder_as_it_is(
    layer_norm_model, galaxies, processor, tmp_path
):
    trainer = train(FrozenStageTrainer, layer_norm_model, frozen_arguments(tmp_path), galaxies, processor)
    before = trainer.predict(trainer.eval_dataset).predictions
    torch.nn.init.normal_(next(layer_norm_model.encoder.parameters()))
    with torch.inference_mode():
        expected = layer_norm_model.eval()(**processor(galaxies["image"][24:])).logits.numpy()
    assert abs(expected - before).max() > 1e-3
    assert trainer.predict(trainer.eval_dataset).predictions == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("trainer_class", [FrozenStageTrainer, UnfrozenStageTrainer])
def test_training_takes_back_what_was_fitted_to_the_head_as_it_was(
    trainer_class, layer_norm_model, galaxies, processor, tmp_path
):
    arguments = frozen_arguments if trainer_class is FrozenStageTrainer else unfrozen_arguments
    config = layer_norm_model.config
    config.calibration_temperature, config.decision_threshold = 2.0, {"ring": 0.3}
    train(trainer_class, layer_norm_model, arguments(tmp_path, num_train_epochs=1), galaxies, processor)
    assert (config.calibration_temperature, config.decision_threshold) == (None, None)


def test_a_loss_of_the_users_own_is_averaged_as_trainer_does(layer_norm_model, galaxies, processor, tmp_path):
    layer_norm_model.config.class_weights = [1.0, 19.0]
    trainer = UnfrozenStageTrainer(
        layer_norm_model,
        unfrozen_arguments(tmp_path, per_device_eval_batch_size=3),
        processing_class=processor,
        eval_dataset=galaxies,
        compute_loss_func=lambda outputs, labels, **_: labels.float().mean(),
    )
    assert trainer.evaluate()["eval_loss"] == pytest.approx(sum(galaxies["label"]) / len(galaxies))


def test_validation_galaxies_without_a_known_label_have_no_loss(layer_norm_model, galaxies, processor, tmp_path):
    layer_norm_model.config.problem_type = "regression"
    unknown = galaxies.remove_columns("label").add_column("label", [[NAN, NAN]] * len(galaxies))
    trainer = UnfrozenStageTrainer(
        layer_norm_model, unfrozen_arguments(tmp_path), processing_class=processor, eval_dataset=unknown
    )
    assert trainer.evaluate()["eval_loss"] == 0


def test_without_validation_the_last_weights_are_kept(layer_norm_model, galaxies, processor, tmp_path):
    kept = []
    for is_averaged in (False, True):
        model = copy.deepcopy(layer_norm_model)
        changes = {"eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False}
        arguments = unfrozen_arguments(tmp_path, average_weights=is_averaged, **changes)
        UnfrozenStageTrainer(model, arguments, processing_class=processor, train_dataset=galaxies).train()
        kept.append(model.state_dict())
    assert not moved(*kept)
    assert moved(kept[0], layer_norm_model.state_dict())


def test_a_second_call_goes_on_from_what_the_first_kept(layer_norm_model, galaxies, processor, tmp_path):
    trainer = train(UnfrozenStageTrainer, layer_norm_model, unfrozen_arguments(tmp_path), galaxies, processor)
    kept = state_of(layer_norm_model)
    trainer.args.learning_rate = 0.0
    trainer.train()
    assert not moved(kept, layer_norm_model.state_dict())


@pytest.mark.parametrize(("changes", "is_averaged"), [({}, True), ({"keep_batch_norm_statistics": False}, False)])
def test_weights_are_averaged_where_statistics_are_kept(changes, is_averaged, tmp_path):
    assert unfrozen_arguments(tmp_path, **changes).average_weights == is_averaged


def test_the_frozen_stage_learns_to_tell_drawn_rings(batch_norm_model, galaxies, processor, tmp_path):
    arguments = frozen_arguments(tmp_path, num_train_epochs=30, learning_rate=0.3, early_stopping_patience=None)
    trainer = train(FrozenStageTrainer, batch_norm_model, arguments, galaxies, processor)
    losses = [record["eval_loss"] for record in trainer.state.log_history if "eval_loss" in record]
    assert min(losses) < 0.8 * losses[0]


@pytest.mark.parametrize("embedding_cache", [True, False])
def test_a_stage_too_short_to_learn_knows_how_common_a_label_is(
    embedding_cache, layer_norm_model, galaxies, processor, tmp_path
):
    problem_type = layer_norm_model.config.problem_type = "multi_label_classification"
    layer_norm_model.head = build_head(layer_norm_model.config)
    labels = [[float(row % 8 == 0), float(row % 3 == 0)] for row in range(40)]
    galaxies = galaxies.remove_columns("label").add_column("label", labels)
    arguments = frozen_arguments(tmp_path, embedding_cache=embedding_cache, learning_rate=1e-9)
    trainer = train(FrozenStageTrainer, layer_norm_model, arguments, galaxies, processor, problem_type=problem_type)
    probabilities = torch.tensor(trainer.predict(galaxies).predictions).sigmoid().mean(0)
    assert probabilities.tolist() == pytest.approx([3 / 24, 8 / 24], abs=1e-4)


def test_the_best_checkpoint_is_the_one_of_lowest_validation_loss(layer_norm_model, galaxies, processor, tmp_path):
    # A rate so high that later epochs are worse than earlier ones.
    arguments = frozen_arguments(tmp_path, num_train_epochs=5, learning_rate=5.0)
    trainer = train(FrozenStageTrainer, layer_norm_model, arguments, galaxies, processor)
    losses = [record["eval_loss"] for record in trainer.state.log_history if "eval_loss" in record]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(losses), rel=1e-5)


class SpoilLastEpoch(TrainerCallback):
    def on_epoch_begin(self, args, state, control, model=None, **kwargs):
        if state.epoch == args.num_train_epochs - 1:
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(torch.randn_like(parameter))


# transformers writes a ViT's weights under other names than the model's own.
@pytest.mark.parametrize("name", ["layer_norm_model", "vit_model"])
def test_the_unfrozen_stage_ends_with_the_weights_of_its_best_checkpoint(name, request, galaxies, processor, tmp_path):
    trainer = UnfrozenStageTrainer(
        request.getfixturevalue(name),
        unfrozen_arguments(tmp_path, average_weights=False),
        processing_class=processor,
        train_dataset=galaxies.select(range(24)),
        eval_dataset=galaxies.select(range(24, 40)),
        callbacks=[SpoilLastEpoch()],
    )
    trainer.train()
    best, last = [record["eval_loss"] for record in trainer.state.log_history if "eval_loss" in record]
    assert last > best + 0.01
    assert trainer.evaluate()["eval_loss"] == pytest.approx(best, rel=1e-5)


def test_without_evaluations_the_head_has_the_learning_rate_that_was_given(
    layer_norm_model, galaxies, processor, tmp_path
):
    changes = {"eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False}
    arguments = frozen_arguments(tmp_path, learning_rate=0.1, **changes)
    trainer = train(FrozenStageTrainer, layer_norm_model, arguments, galaxies, processor)
    assert trainer.grid_settings == ((1.0, 1.0),)


def test_early_stopping_ends_the_stage(layer_norm_model, galaxies, processor, tmp_path):
    arguments = frozen_arguments(tmp_path, num_train_epochs=50, learning_rate=5.0, early_stopping_patience=2)
    trainer = train(FrozenStageTrainer, layer_norm_model, arguments, galaxies, processor)
    assert trainer.state.epoch < 50


def test_many_embeddings_are_taken_in_larger_batches(layer_norm_model, galaxies, processor, tmp_path):
    arguments = frozen_arguments(tmp_path, embedding_steps=5)  # 24 galaxies, two views each
    trainer = train(FrozenStageTrainer, layer_norm_model, arguments, galaxies, processor)
    assert (trainer.state.max_steps, trainer.state.train_batch_size) == (2 * 5, 10)


def test_evaluation_sees_the_plain_centre_without_augmentation(layer_norm_model, galaxies, processor, tmp_path):
    trainer = FrozenStageTrainer(
        layer_norm_model, frozen_arguments(tmp_path), processing_class=processor, eval_dataset=galaxies
    )
    logits = trainer.predict(galaxies).predictions
    with torch.inference_mode():
        expected = layer_norm_model.eval()(**processor(galaxies["image"][:])).logits
    assert torch.allclose(torch.from_numpy(logits), expected, atol=1e-6)


def test_training_images_differ_from_epoch_to_epoch(layer_norm_model, galaxies, processor, tmp_path, monkeypatch):
    seen = []
    original = layer_norm_model.forward

    def remember(pixel_values=None, **inputs):
        if layer_norm_model.training:
            seen.append(pixel_values)
        return original(pixel_values=pixel_values, **inputs)

    monkeypatch.setattr(layer_norm_model, "forward", remember)
    settings = {"embedding_cache": False, "train_sampling_strategy": "sequential"}
    arguments = frozen_arguments(tmp_path, per_device_train_batch_size=24, **settings)
    train(FrozenStageTrainer, layer_norm_model, arguments, galaxies, processor)
    first, second = seen
    assert first.shape == second.shape == (24, 3, processor.pixels, processor.pixels)
    assert 0 <= first.min() < first.max() <= 1
    assert not torch.equal(first, second)


def test_without_augmentation_training_sees_what_evaluation_sees(layer_norm_model, galaxies, processor, tmp_path):
    arguments = frozen_arguments(tmp_path, augment=False, embedding_cache=False)
    trainer = FrozenStageTrainer(
        layer_norm_model, arguments, processing_class=processor, train_dataset=galaxies, eval_dataset=galaxies
    )
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["pixel_values"].dtype == torch.float32


def test_learning_rates_fall_from_block_to_block_and_the_head_has_weight_decay(layer_norm_model):
    groups = layer_decay_groups(layer_norm_model, learning_rate=1.0, layer_decay=0.5, weight_decay=0.1)
    rate = {id(p): group["lr"] for group in groups for p in group["params"]}
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    parameters = dict(layer_norm_model.named_parameters())
    assert set(rate) == {id(p) for p in parameters.values()}
    blocks = layer_norm_model.encoder_blocks()
    for index, names in enumerate(reversed(blocks)):
        assert {rate[id(parameters[f"zoobot.encoder.{name}"])] for name in names} == {0.5**index}
    for name, parameter in layer_norm_model.head.named_parameters():
        assert rate[id(parameter)] == 1.0
        assert decay[id(parameter)] == (0.1 if name.endswith("weight") else 0.0)


def test_frozen_parameters_are_in_no_group(layer_norm_model):
    layer_norm_model.unfreeze_encoder(1)
    groups = layer_decay_groups(layer_norm_model, learning_rate=1.0, layer_decay=0.5, weight_decay=0.1)
    assert all(parameter.requires_grad for group in groups for parameter in group["params"])


def test_stochastic_depth_is_off_in_frozen_blocks_and_on_in_trained_ones(layer_norm_model):
    layer_norm_model.unfreeze_encoder(1)
    layer_norm_model.train()
    modes = [module.training for module in layer_norm_model.modules() if isinstance(module, ConvNextLayer)]
    assert modes == [False] * (len(modes) - 1) + [True]


def test_other_labels_are_refused_by_name(layer_norm_model, galaxies, processor, tmp_path):
    other = galaxies.cast_column("label", ClassLabel(names=["smooth", "featured"]))
    with pytest.raises(ValueError, match=r"labels smooth, featured; the model .*label_names"):
        FrozenStageTrainer(
            layer_norm_model, frozen_arguments(tmp_path), processing_class=processor, train_dataset=other
        )


@pytest.mark.parametrize("embedding_cache", [True, False])
def test_labels_of_another_shape_are_refused_before_the_encoder_runs(
    embedding_cache, layer_norm_model, galaxies, processor, tmp_path
):
    layer_norm_model.config.problem_type = "multi_label_classification"
    flat = galaxies.remove_columns("label").add_column("label", [0.0, 1.0] * 20)
    arguments = frozen_arguments(tmp_path, embedding_cache=embedding_cache)
    with pytest.raises(ValueError, match=r"labels have the shape \(24,\) and the model's outputs \(24, 2\)"):
        train(FrozenStageTrainer, layer_norm_model, arguments, flat, processor)
    assert not list((tmp_path / "embeddings").glob("*"))


def test_classes_are_refused_by_a_model_for_another_problem(layer_norm_model, galaxies, processor, tmp_path):
    layer_norm_model.config.problem_type = "regression"
    with pytest.raises(ValueError, match=r"problem_type is 'regression'; load it with problem_type='single_label_"):
        FrozenStageTrainer(
            layer_norm_model, frozen_arguments(tmp_path), processing_class=processor, train_dataset=galaxies
        )


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["ring"] * 24, "they are text.*class_encode_column"),
        ([0.95] * 24, r"24 of 24 galaxies have no class.*row 0 has the label 0\.95"),
        ([0, 1, None] * 8, "8 of 24 galaxies have no class.*row 2 has the label nan"),
        ([[0, 1], [1]] * 12, "no numbers"),
        ([0, 1, -1] * 8, "8 of 24 galaxies have no class, .* from 0 to 1: row 2 has the label -1"),
        ([0, 2, 1] * 8, "8 of 24 galaxies have no class.*row 1 has the label 2"),
    ],
)
def test_labels_that_are_no_classes_are_refused(labels, message, layer_norm_model, galaxies, processor, tmp_path):
    wrong = galaxies.select(range(24)).remove_columns("label").add_column("label", labels)
    with pytest.raises(ValueError, match=message):
        FrozenStageTrainer(
            layer_norm_model, frozen_arguments(tmp_path), processing_class=processor, train_dataset=wrong
        )


@pytest.mark.parametrize("kind", ["bool", "float32"])
@pytest.mark.parametrize("trainer_class", [FrozenStageTrainer, UnfrozenStageTrainer])
def test_classes_may_be_booleans_or_whole_floats(kind, trainer_class, layer_norm_model, galaxies, processor, tmp_path):
    arguments = frozen_arguments if trainer_class is FrozenStageTrainer else unfrozen_arguments
    losses = []
    for dataset in (galaxies, galaxies.cast_column("label", Value("int64")).cast_column("label", Value(kind))):
        model = copy.deepcopy(layer_norm_model)
        losses.append(train(trainer_class, model, arguments(tmp_path), dataset, processor).evaluate()["eval_loss"])
    assert losses[0] == losses[1]


@pytest.mark.parametrize("trainer_class", [FrozenStageTrainer, UnfrozenStageTrainer])
def test_none_is_an_unknown_label(trainer_class, layer_norm_model, galaxies, processor, tmp_path):
    layer_norm_model.config.problem_type = "multi_label_classification"
    arguments = frozen_arguments if trainer_class is FrozenStageTrainer else unfrozen_arguments
    losses = []
    for unknown in (None, NAN):
        rows = galaxies.remove_columns("label").add_column("label", [[0.0, unknown], [1.0, 0.0]] * 20)
        trainer = trainer_class(
            layer_norm_model, arguments(tmp_path), processing_class=processor, train_dataset=rows, eval_dataset=rows
        )
        losses.append(trainer.evaluate()["eval_loss"])
    assert losses[0] == losses[1] > 0


@pytest.mark.parametrize(
    ("settings", "options", "name"),
    [
        ({"gradient_checkpointing": True}, {}, "gradient_checkpointing"),
        ({"include_for_metrics": ["inputs"]}, {}, "inputs in include_for_metrics"),
        ({}, {"compute_loss_func": lambda *given: 0}, "compute_loss_func"),
        ({}, {"optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 0.5})}, "optimizer_cls_and_kwargs"),
    ],
)
def test_what_a_grid_of_heads_can_not_use_is_refused(
    settings, options, name, layer_norm_model, galaxies, processor, tmp_path
):
    with pytest.raises(ValueError, match=f"{name} given, but the grid of heads.*embedding_cache=False"):
        FrozenStageTrainer(
            layer_norm_model,
            frozen_arguments(tmp_path, **settings),
            processing_class=processor,
            train_dataset=galaxies,
            eval_dataset=galaxies,
            **options,
        )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_frozen_stage_takes_a_model_in_half_precision(dtype, layer_norm_model, galaxies, processor, tmp_path):
    trainer = train(FrozenStageTrainer, layer_norm_model.to(dtype), frozen_arguments(tmp_path), galaxies, processor)
    assert layer_norm_model.head[-1].weight.dtype == dtype
    best = min(record["eval_loss"] for record in trainer.state.log_history if "eval_loss" in record)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(best, rel=0.02)


def test_the_unfrozen_stage_refuses_a_model_in_half_precision(layer_norm_model, galaxies, processor, tmp_path):
    with pytest.raises(ValueError, match=r"the model is in torch\.bfloat16.*dtype=torch\.float32"):
        train(UnfrozenStageTrainer, layer_norm_model.bfloat16(), unfrozen_arguments(tmp_path), galaxies, processor)


def test_the_unfrozen_stage_takes_an_optimizer_of_the_users_own(layer_norm_model, galaxies, processor, tmp_path):
    trainer = UnfrozenStageTrainer(
        layer_norm_model,
        unfrozen_arguments(tmp_path, layer_decay=0.5),
        processing_class=processor,
        eval_dataset=galaxies,
        optimizer_cls_and_kwargs=(torch.optim.SGD, {"lr": 0.5, "momentum": 0.9}),
    )
    groups = trainer.create_optimizer().param_groups
    assert isinstance(trainer.optimizer, torch.optim.SGD)
    assert {group["momentum"] for group in groups} == {0.9}
    assert sorted({group["lr"] for group in groups}, reverse=True)[:3] == [0.5, 0.25, 0.125]


@pytest.mark.parametrize("trainer_class", [FrozenStageTrainer, UnfrozenStageTrainer])
def test_the_last_batch_is_dropped_in_training_alone(trainer_class, layer_norm_model, galaxies, processor, tmp_path):
    arguments = frozen_arguments if trainer_class is FrozenStageTrainer else unfrozen_arguments
    changes = {"per_device_eval_batch_size": 3, "dataloader_drop_last": True, "num_train_epochs": 1}
    settings = arguments(tmp_path, **changes, per_device_train_batch_size=16, augment=False)
    trainer = train(trainer_class, layer_norm_model, settings, galaxies, processor)
    assert trainer.state.global_step == 1  # of 24 galaxies
    assert len(trainer.predict(galaxies).predictions) == len(galaxies)
    trainer.compute_metrics = lambda predicted: {"count": len(predicted.label_ids)}
    assert trainer.evaluate()["eval_count"] == 16


@pytest.mark.parametrize("split", ["train_dataset", "eval_dataset"])
@pytest.mark.parametrize("trainer_class", [FrozenStageTrainer, UnfrozenStageTrainer])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows.to_iterable_dataset(), r"of the type IterableDataset; .* without streaming=True"),
        (lambda rows: rows.with_transform(lambda columns: {"pixel_values": columns["image"]}), "has a transform"),
    ],
)
def test_streams_and_transforms_are_refused(
    change, message, trainer_class, split, layer_norm_model, galaxies, processor, tmp_path
):
    arguments = frozen_arguments if trainer_class is FrozenStageTrainer else unfrozen_arguments
    splits = {"train_dataset": galaxies, "eval_dataset": galaxies, split: change(galaxies)}
    with pytest.raises(ValueError, match=message):
        trainer_class(layer_norm_model, arguments(tmp_path), processing_class=processor, **splits)


@pytest.mark.parametrize(("column", "others"), [("label", "id_str, image"), ("image", "id_str, label")])
def test_a_dataset_without_labels_or_images_is_refused(column, others, layer_norm_model, galaxies, processor, tmp_path):
    with pytest.raises(ValueError, match=f"no column {column}; it has {others}"):
        UnfrozenStageTrainer(
            layer_norm_model,
            unfrozen_arguments(tmp_path),
            processing_class=processor,
            train_dataset=galaxies.remove_columns(column),
        )


@pytest.mark.parametrize("trainer_class", [FrozenStageTrainer, UnfrozenStageTrainer])
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model", "model is of the type {}; give a ZoobotForImageClassification or ZoobotForGalaxyZoo, whose"),
        ("processing_class", "processing_class is of the type {}; give a ZoobotImageProcessor, which image_proc"),
        ("args", "args is of the type {}; give (Frozen|Unfrozen)StageArguments, or leave it out"),
    ],
)
def test_what_is_of_another_class_is_refused(name, message, trainer_class, layer_norm_model, processor, tmp_path):
    given = {"model": layer_norm_model, "processing_class": processor}
    wrong = {"model": layer_norm_model.encoder, "args": TrainingArguments(str(tmp_path), use_cpu=True)}.get(name, "a/b")
    with pytest.raises(ValueError, match=message.format(type(wrong).__name__)):
        trainer_class(**given | {name: wrong})


@pytest.mark.parametrize("trainer_class", [FrozenStageTrainer, UnfrozenStageTrainer])
def test_a_stage_without_arguments_takes_the_usual_ones(
    trainer_class, layer_norm_model, galaxies, processor, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    arguments = trainer_class(layer_norm_model, processing_class=processor, eval_dataset=galaxies).args
    assert type(arguments) is trainer_class.arguments_class
    assert arguments.output_dir == "tmp_trainer"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"zoom_range": 1.0}, "zoom_range is 1.0"),
        ({"max_shift": -0.1}, "max_shift is -0.1"),
        ({"embedding_steps": 0}, "embedding_steps is 0"),
        (
            {"label_smoothing_factor": 0.1},
            r"label_smoothing_factor is 0\.1; .* configuration has label_smoothing: choose 0",
        ),
        ({"remove_unused_columns": True}, "remove_unused_columns is True; .*: choose False"),
        ({"save_only_model": True}, "save_only_model is True; .*: choose False"),
    ],
)
def test_arguments_out_of_range_are_refused(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        frozen_arguments(tmp_path, **changes)


def test_a_layer_decay_above_one_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"layer_decay is 1\.5"):
        unfrozen_arguments(tmp_path, layer_decay=1.5)


@pytest.mark.parametrize(
    ("metric", "is_greater_better"),
    [
        ("eval_loss", False),
        ("eval_validation_loss", False),
        ("log_loss", False),
        ("mean_absolute_error", False),
        ("eval_vote_root_mean_squared_error", False),
        ("accuracy", True),
        ("eval_vote_log_likelihood", True),
    ],
)
def test_the_name_of_a_metric_says_whether_more_of_it_is_better(metric, is_greater_better, tmp_path):
    assert frozen_arguments(tmp_path, metric_for_best_model=metric).greater_is_better is is_greater_better
    given = frozen_arguments(tmp_path, metric_for_best_model=metric, greater_is_better=not is_greater_better)
    assert given.greater_is_better is not is_greater_better


def test_the_collator_leaves_labels_out_where_there_are_none(galaxies, processor):
    batch = GalaxyCollator(processor)([galaxies.remove_columns("label")[0]])
    assert set(batch) == {"pixel_values"}


def test_what_is_logged_reaches_a_tracker(layer_norm_model, galaxies, processor, tmp_path):
    logged = []

    class Tracker(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            logged.append(logs)

    trainer = FrozenStageTrainer(
        layer_norm_model,
        frozen_arguments(tmp_path, num_train_epochs=1),
        processing_class=processor,
        train_dataset=galaxies,
        eval_dataset=galaxies,
        compute_metrics=metrics_for_trainer("single_label_classification"),
        callbacks=[Tracker()],
    )
    trainer.train()
    assert {"eval_loss", "eval_accuracy", "eval_roc_auc", "eval_completeness", "eval_purity"} <= set().union(*logged)


def test_an_image_that_cannot_be_read_in_training_is_named(
    layer_norm_model, galaxies, processor, galaxy_folder, tmp_path
):
    path = galaxy_folder / "images/galaxy_03.png"
    path.write_bytes(path.read_bytes()[:50])
    files = [str(galaxy_folder / f"images/galaxy_{index:02d}.png") for index in range(24)]
    damaged = Dataset.from_dict(
        {"image": files, "label": galaxies["label"][:24]},
        features=Features({"image": Image(), "label": galaxies.features["label"]}),
    )
    trainer = UnfrozenStageTrainer(
        layer_norm_model,
        unfrozen_arguments(tmp_path, eval_strategy="no", load_best_model_at_end=False),
        processing_class=processor,
        train_dataset=damaged,
    )
    with pytest.raises(UnreadableImageError, match=r"galaxy_03.png can't be read: it is damaged"):
        trainer.train()


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_prepare_what_the_main_process_does(workers, layer_norm_model, galaxies, processor, tmp_path):
    arguments = unfrozen_arguments(tmp_path, eval_strategy="no", load_best_model_at_end=False)
    trainer = UnfrozenStageTrainer(layer_norm_model, arguments, processing_class=processor, train_dataset=galaxies)
    batches = DataLoader(trainer.train_dataset, batch_size=8, num_workers=workers, collate_fn=trainer.data_collator)
    fields = torch.cat([batch["pixel_values"] for batch in batches])
    margin = trainer.train_dataset.format["format_kwargs"]["transform"].margin
    expected = [processor.crop_and_resize(image, margin=margin) for image in galaxies["image"]]
    assert torch.equal(fields, torch.stack(expected))
