import logging
import warnings

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import ENCODERS, with_decided_head
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForImageClassification,
    ConvNextConfig,
    IJepaConfig,
    MobileNetV2Config,
    PoolFormerConfig,
    ViTConfig,
    ViTMAEConfig,
    pipeline,
)
from transformers.models.timm_wrapper.configuration_timm_wrapper import TimmWrapperConfig

from zoobot_hf import ZoobotConfig, ZoobotForImageClassification, ZoobotModel
from zoobot_hf.models.heads import fold_calibration

MODELS = ["layer_norm_model", "batch_norm_model", "vit_model", "timm_model", "timm_convnext_model"]
WITH_CHECKPOINTING = ["vit_model", "timm_model"]
WITHOUT_CHECKPOINTING = ["layer_norm_model", "batch_norm_model"]


@pytest.fixture
def any_model(request):
    """Each of the tiny models in turn."""
    return request.getfixturevalue(request.param)


@pytest.fixture
def pixel_values(processor, galaxy_images):
    return processor(galaxy_images[:6])["pixel_values"]


@pytest.fixture
def labels(galaxy_labels):
    return torch.tensor(galaxy_labels[:6])


def each(names):
    return pytest.mark.parametrize("any_model", names, indirect=True)


def logits_of(model, pixel_values):
    with torch.no_grad():
        return model.eval()(pixel_values=pixel_values).logits


def state_of(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def moved(before, module):
    return {name for name, tensor in module.state_dict().items() if not torch.equal(before[name], tensor)}


def train_steps(model, pixel_values, labels, *, steps=3):
    """Steps as Trainer makes them: `train()` before each."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(steps):
        model.train()
        model(pixel_values=pixel_values, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def trained_names(module):
    return {name for name, parameter in module.named_parameters() if parameter.requires_grad}


# Forward --------------------------------------------------------------------------------------------------------


@each(MODELS)
def test_images_and_their_embeddings_give_the_same_logits(any_model, pixel_values, labels):
    with torch.no_grad():
        embeddings = any_model.zoobot(pixel_values).embeddings
        by_embeddings = any_model(embeddings=embeddings, labels=labels)
        by_images = any_model(pixel_values=pixel_values, labels=labels)
    assert embeddings.shape == (6, any_model.config.embedding_size)
    assert by_images.logits.shape == (6, 2)
    assert torch.equal(by_images.logits, by_embeddings.logits)
    assert torch.equal(by_images.loss, by_embeddings.loss)


@each(MODELS)
def test_different_galaxies_have_different_embeddings(any_model, pixel_values):
    with torch.no_grad():
        assert any_model.zoobot(pixel_values).embeddings.std(dim=0).max() > 1e-4


def test_without_labels_there_is_no_loss(layer_norm_model, pixel_values):
    assert layer_norm_model(pixel_values=pixel_values).loss is None


def test_neither_images_nor_embeddings_is_an_error(layer_norm_model):
    with pytest.raises(ValueError, match="give either pixel_values or embeddings"):
        layer_norm_model()


def test_both_images_and_embeddings_is_an_error(layer_norm_model, pixel_values):
    with pytest.raises(ValueError, match="give either pixel_values or embeddings"):
        layer_norm_model(pixel_values=pixel_values, embeddings=torch.zeros(6, 16))


def test_a_model_without_an_encoder_is_refused():
    with pytest.raises(ValueError, match="the configuration has no encoder_config; give the encoder's"):
        ZoobotForImageClassification(ZoobotConfig())


TOKENS = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 32,
    "patch_size": 8,
}
SMALL_POOLFORMER = PoolFormerConfig(depths=[1, 1, 1, 1], hidden_sizes=[8, 8, 8, 24], image_size=32)
# 8 x 8 pixels of 8 numbers each, the numbers last: a mean over the wrong axes has the same shape.
SWIN = TimmWrapperConfig(
    architecture="swin_tiny_patch4_window7_224",
    model_args={"img_size": 64, "embed_dim": 4, "depths": (1, 1), "num_heads": (1, 1), "window_size": 4},
)


@pytest.mark.parametrize(
    ("encoder_config", "pooling", "size"),
    [
        (IJepaConfig(**TOKENS), "mean", 16),
        (SMALL_POOLFORMER, "mean", 24),
        (MobileNetV2Config(depth_multiplier=0.1, image_size=32), "pooler", 1280),
        (TimmWrapperConfig(architecture="test_mambaout"), "pooler", 256),  # a hidden layer of 64 to 256 follows it
        (SWIN, "pooler", 8),
    ],
    ids=["ijepa", "poolformer", "mobilenet", "mambaout", "swin"],
)
def test_a_dry_run_says_how_an_embedding_is_read_and_how_long_it_is(encoder_config, pooling, size):
    config = ZoobotConfig(encoder_config)
    model = ZoobotModel(config)
    assert (config.pooling, config.embedding_size) == (pooling, size)
    pixels = 64 if encoder_config is SWIN else 32
    assert model(torch.rand(2, 3, pixels, pixels)).embeddings.shape == (2, size)


def test_a_dry_run_leaves_no_trace(batch_norm_model):
    torch.manual_seed(0)
    found = ZoobotModel(ZoobotConfig(batch_norm_model.config.encoder_config))
    torch.manual_seed(0)
    told = ZoobotModel(ZoobotConfig(batch_norm_model.config.encoder_config, pooling="pooler", embedding_size=16))
    assert moved(state_of(told), found) == set()
    assert all(module.training for module in found.modules())


@pytest.mark.parametrize(
    ("encoder_config", "pooling"),
    [
        (IJepaConfig(**TOKENS), "pooler"),
        (ENCODERS["batch_norm"], "first_token"),
        (ConvNextConfig(hidden_sizes=[8] * 4, depths=[1] * 4, image_size=8192), "pooler"),
    ],
)
def test_an_encoder_that_gives_no_embedding_says_what_to_give(encoder_config, pooling):
    message = f"the '{encoder_config.model_type}' encoder gave no embedding with pooling '{pooling}'; give another "
    with pytest.raises(ValueError, match=message + r".*, or both pooling and embedding_size"):
        ZoobotModel(ZoobotConfig(encoder_config, pooling=pooling))


def test_nothing_is_masked(tmp_path):
    model = ZoobotModel(ZoobotConfig(ViTMAEConfig(**TOKENS))).eval()
    images = torch.rand(2, 3, 32, 32)
    in_order = torch.linspace(0, 1, 16).expand(2, -1)
    model.encoder.save_pretrained(tmp_path / "encoder")
    model.save_pretrained(tmp_path / "saved")
    with torch.no_grad():
        expected = model.encoder(images, noise=in_order).last_hidden_state
        assert expected.shape == (2, 17, 16)
        for each_model in (model, *(ZoobotModel.from_pretrained(tmp_path / name) for name in ("encoder", "saved"))):
            assert torch.allclose(each_model(images).embeddings, expected.mean(1), atol=1e-5)


def test_logits_of_a_bounded_regression_lie_in_0_to_1(layer_norm_model, pixel_values):
    fields = {"problem_type": "regression", "id2label": {0: "a", 1: "b", 2: "c"}}
    model = ZoobotForImageClassification(ZoobotConfig(layer_norm_model.config.encoder_config, **fields)).eval()
    with_decided_head(model)
    bounded = ZoobotForImageClassification(
        ZoobotConfig(layer_norm_model.config.encoder_config, unit_interval=True, **fields)
    )
    bounded.load_state_dict(model.state_dict())
    logits = logits_of(model, pixel_values)
    assert torch.equal(logits_of(bounded, pixel_values), logits.sigmoid())


@pytest.mark.parametrize("pooling", ["first_token", "mean"])
def test_pooling_reads_the_tokens_as_it_says(pooling, vit_model, pixel_values):
    model = ZoobotModel(ZoobotConfig(vit_model.config.encoder_config, pooling=pooling)).eval()
    with torch.no_grad():
        tokens = model.encoder(pixel_values).last_hidden_state
        embeddings = model(pixel_values).embeddings
    expected = tokens[:, 0] if pooling == "first_token" else tokens.mean(dim=1)
    assert model.encoder.pooler is None
    assert torch.allclose(embeddings, expected, atol=1e-6)


def test_mean_pooling_of_a_convolutional_encoder_is_over_the_pixels(layer_norm_model, pixel_values):
    model = ZoobotModel(ZoobotConfig(layer_norm_model.config.encoder_config, pooling="mean")).eval()
    with torch.no_grad():
        expected = model.encoder(pixel_values).last_hidden_state.mean(dim=(2, 3))
        assert torch.allclose(model(pixel_values).embeddings, expected, atol=1e-6)


def test_mean_pooling_of_timms_swin_is_over_the_pixels_too():
    model = ZoobotModel(ZoobotConfig(SWIN, pooling="mean")).eval()
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        pixels = model.encoder(images).last_hidden_state
        assert pixels.shape == (2, 8, 8, 8)
        assert torch.allclose(model(images).embeddings, pixels.mean(dim=(1, 2)), atol=1e-6)


def test_an_mlp_head_and_its_dropout_come_from_the_configuration(layer_norm_model):
    encoder_config = layer_norm_model.config.encoder_config
    model = ZoobotForImageClassification(ZoobotConfig(encoder_config, head_type="mlp", head_hidden_size=5))
    assert model.head[1].weight.shape == (5, 16)
    assert model.head[0].p == 0.5


# Saving and loading ---------------------------------------------------------------------------------------------


@each(MODELS)
def test_a_saved_model_gives_the_same_logits(any_model, pixel_values, tmp_path):
    any_model.save_pretrained(tmp_path)
    loaded = ZoobotForImageClassification.from_pretrained(tmp_path)
    assert not loaded.training
    assert moved(state_of(any_model), loaded) == set()
    assert torch.allclose(logits_of(loaded, pixel_values), logits_of(any_model, pixel_values), rtol=0, atol=1e-7)


@each(MODELS)
def test_the_auto_classes_load_a_saved_model(any_model, pixel_values, tmp_path):
    any_model.save_pretrained(tmp_path)
    classifier = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert isinstance(classifier, ZoobotForImageClassification)
    assert torch.allclose(logits_of(classifier, pixel_values), logits_of(any_model, pixel_values), rtol=0, atol=1e-7)
    encoder = AutoModel.from_pretrained(tmp_path)
    assert isinstance(encoder, ZoobotModel)
    with torch.no_grad():
        expected = any_model.zoobot(pixel_values).embeddings
        assert torch.allclose(encoder(pixel_values).embeddings, expected, rtol=0, atol=1e-6)


def test_an_encoder_saved_alone_is_loaded_alone(layer_norm_model, pixel_values, tmp_path):
    layer_norm_model.zoobot.save_pretrained(tmp_path)
    loaded = ZoobotModel.from_pretrained(tmp_path)
    assert moved(state_of(layer_norm_model.zoobot), loaded) == set()


def test_the_pipeline_says_what_the_model_says(layer_norm_model, processor, galaxy_images, tmp_path):
    layer_norm_model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    galaxy_images[0].save(tmp_path / "galaxy.png")
    classify = pipeline("image-classification", model=str(tmp_path), device="cpu")
    expected = logits_of(layer_norm_model, processor(galaxy_images[0])["pixel_values"]).softmax(-1)[0]
    said = {entry["label"]: entry["score"] for entry in classify(str(tmp_path / "galaxy.png"))}
    assert said == pytest.approx({"not ring": expected[0].item(), "ring": expected[1].item()}, abs=1e-6)


CALIBRATION = {
    "predictions_for": "sky",
    "calibration_temperature": 2.0,
    "calibration_shift": [0.5, -0.5],
    "sky_prevalence": {"not ring": 0.95, "ring": 0.05},
    "training_prevalence": {"not ring": 0.5, "ring": 0.5},
}


def calibrate(model):
    for name, value in CALIBRATION.items():
        setattr(model.config, name, value)


def for_the_sky(logits):
    """By hand: the head's probabilities, calibrated, each multiplied by how much rarer or commoner its class is."""
    weighted = (logits / 2 + torch.tensor([0.5, -0.5])).softmax(-1) * torch.tensor([0.95 / 0.5, 0.05 / 0.5])
    return weighted / weighted.sum(-1, keepdim=True)


def test_a_calibrated_model_and_its_pipeline_say_what_the_sky_has(
    layer_norm_model, processor, galaxy_images, pixel_values, tmp_path
):
    expected = for_the_sky(logits_of(layer_norm_model, pixel_values))
    calibrate(layer_norm_model)
    assert torch.allclose(logits_of(layer_norm_model, pixel_values).softmax(-1), expected, atol=1e-6)
    layer_norm_model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded = ZoobotForImageClassification.from_pretrained(tmp_path)
    assert torch.allclose(logits_of(loaded, pixel_values).softmax(-1), expected, atol=1e-6)
    galaxy_images[0].save(tmp_path / "galaxy.png")
    classify = pipeline("image-classification", model=str(tmp_path), device="cpu")
    said = {entry["label"]: entry["score"] for entry in classify(str(tmp_path / "galaxy.png"))}
    assert said == pytest.approx({"not ring": expected[0, 0].item(), "ring": expected[0, 1].item()}, abs=1e-6)


def test_training_and_the_loss_see_the_heads_own_logits(layer_norm_model, pixel_values, labels):
    model = layer_norm_model
    model.freeze_encoder()
    model.head[0].p = 0.0
    with torch.no_grad():
        raw = model.eval()(pixel_values=pixel_values, labels=labels)
        calibrate(model)
        evaluated = model.eval()(pixel_values=pixel_values, labels=labels)
        trained = model.train()(pixel_values=pixel_values, labels=labels)
    assert torch.equal(trained.logits, raw.logits)
    assert not torch.allclose(evaluated.logits, raw.logits, atol=0.1)
    assert evaluated.loss == trained.loss == raw.loss


def test_a_head_with_the_calibration_folded_in_says_the_same(layer_norm_model, pixel_values):
    calibrate(layer_norm_model)
    expected = logits_of(layer_norm_model, pixel_values)
    layer = layer_norm_model.head[-1]
    weight, bias = fold_calibration(layer.weight, layer.bias, layer_norm_model.config)
    layer.weight.data, layer.bias.data = weight.detach(), bias.detach()
    layer_norm_model.config.forget_calibration()
    assert torch.allclose(logits_of(layer_norm_model, pixel_values), expected, atol=1e-5)


def test_a_new_head_has_no_calibration(layer_norm_model, pixel_values, tmp_path):
    calibrate(layer_norm_model)
    layer_norm_model.config.decision_threshold = {"ring": 0.5}
    layer_norm_model.config.decision_aim = "best F1"
    layer_norm_model.save_pretrained(tmp_path)
    for loaded in (
        ZoobotForImageClassification.from_pretrained(tmp_path, label_names=["a", "b", "c"]),
        AutoModelForImageClassification.from_pretrained(tmp_path, num_labels=3),
    ):
        fresh = ZoobotConfig()
        for name in [*CALIBRATION, "decision_threshold", "decision_aim"]:
            assert getattr(loaded.config, name) == getattr(fresh, name)
        assert logits_of(loaded, pixel_values).shape == (6, 3)


def test_a_model_is_loaded_in_the_type_that_is_asked_for(layer_norm_model, pixel_values, tmp_path):
    layer_norm_model.save_pretrained(tmp_path)
    for labels in (None, ["a", "b", "c"]):
        loaded = ZoobotForImageClassification.from_pretrained(tmp_path, label_names=labels, dtype=torch.bfloat16)
        assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
        for images in (pixel_values, pixel_values.bfloat16()):  # the processor gives float32
            assert logits_of(loaded, images).isfinite().all()
        stored = torch.zeros(6, loaded.config.embedding_size)  # float32 or float16, whatever the model is in
        assert loaded(embeddings=stored).logits.dtype == torch.bfloat16


@pytest.mark.parametrize("auto_class", [ZoobotForImageClassification, AutoModelForImageClassification])
def test_a_model_saved_in_half_precision_is_loaded_in_float32(auto_class, layer_norm_model, pixel_values, tmp_path):
    layer_norm_model.bfloat16().save_pretrained(tmp_path)
    loaded = auto_class.from_pretrained(tmp_path)
    for model in (loaded, auto_class.from_pretrained(tmp_path, num_labels=3), ZoobotModel.from_pretrained(tmp_path)):
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert torch.equal(logits_of(loaded, pixel_values), logits_of(layer_norm_model.float(), pixel_values))
    for asked_for in ({"dtype": "auto"}, {"dtype": torch.bfloat16}, {"torch_dtype": torch.bfloat16}):
        assert auto_class.from_pretrained(tmp_path, **asked_for).dtype == torch.bfloat16


def test_a_checkpoint_that_lacks_weights_is_an_error(layer_norm_model, tmp_path):
    layer_norm_model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["head.1.bias"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    message = rf"the checkpoint of {tmp_path.name} lacks 1 of the model's weights .* \(head\.1\.bias\); "
    with pytest.raises(ValueError, match=message):
        ZoobotForImageClassification.from_pretrained(tmp_path)


def test_weights_of_another_shape_are_an_error(layer_norm_model, tmp_path):
    layer_norm_model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["head.1.weight"] = torch.zeros(5, 16)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"or has them in another shape \(head\.1\.weight\); config\.json and weights"):
        ZoobotForImageClassification.from_pretrained(tmp_path)


def test_damaged_weights_are_an_error(layer_norm_model, tmp_path):
    layer_norm_model.save_pretrained(tmp_path)
    content = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(content[:-10])
    with pytest.raises(ValueError, match=r"the model's weights, model\.safetensors, are damaged \(.*\); copy or"):
        ZoobotForImageClassification.from_pretrained(tmp_path)


def test_our_weights_are_read_as_safetensors_only(layer_norm_model, tmp_path):
    layer_norm_model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(layer_norm_model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        ZoobotForImageClassification.from_pretrained(tmp_path)


# Heads that are kept and heads that are replaced ----------------------------------------------------------------


@pytest.fixture
def finetuned_folder(layer_norm_model, tmp_path):
    """A saved model for "not ring" and "ring"."""
    layer_norm_model.config.class_weights = [1.0, 2.0]
    layer_norm_model.config.sky_prevalence = {"not ring": 0.9, "ring": 0.1}
    layer_norm_model.config.training_prevalence = {"not ring": 0.5, "ring": 0.5}
    layer_norm_model.config.unit_interval, layer_norm_model.config.label_smoothing = True, 0.1
    layer_norm_model.save_pretrained(tmp_path / "finetuned")
    return tmp_path / "finetuned"


@pytest.mark.parametrize(
    "asked_for",
    [
        {},
        {"label_names": ["not ring", "ring"]},
        {"id2label": {0: "not ring", 1: "ring"}},
        {"id2label": {"0": "not ring", "1": "ring"}},
        {"label2id": {"ring": 1, "not ring": 0}},
        {"num_labels": 2},
        {"num_labels": 2, "label_names": ["not ring", "ring"]},
        {"label_names": np.array(["not ring", "ring"])},
        {"head_dropout": 0.1},
        {"head_hidden_size": 8},  # a linear head has none
        {"pooling": "pooler"},
    ],
)
def test_the_same_labels_keep_the_head(asked_for, finetuned_folder, layer_norm_model, caplog):
    with caplog.at_level(logging.INFO, "zoobot_hf"):
        loaded = ZoobotForImageClassification.from_pretrained(finetuned_folder, **asked_for)
    assert moved(state_of(layer_norm_model), loaded) == set()
    assert loaded.config.sky_prevalence == {"not ring": 0.9, "ring": 0.1}
    assert loaded.config.head_dropout == asked_for.get("head_dropout", 0.5)
    assert loaded.head[0].p == asked_for.get("head_dropout", 0.5)
    assert caplog.messages == ["Loaded finetuned with its head: not ring, ring."]


@pytest.mark.parametrize(
    ("asked_for", "message"),
    [
        ({"num_labels": 3, "label_names": ["bar", "no bar"]}, "num_labels is 3, and the labels are bar, no bar"),
        ({"label_names": ["bar", "no bar", "bar"]}, "the labels are bar, no bar, bar; give each of them once"),
        ({"label_names": "ring"}, r"label_names is 'ring'; give a list of names, for example \['not ring', 'ring'\]"),
        ({"label_names": []}, r"the labels are \[\]; give at least one, and each as text"),
        ({"num_labels": 0}, r"the labels are \[\]; give at least one, and each as text"),
        ({"label_names": [0, 1]}, r"the labels are \[0, 1\]; give at least one, and each as text"),
        ({"label_names": np.unique([1, 0])}, r"the labels are \[.*0.*1.*\]; give at least one, and each as text"),
        ({"id2label": {0: 0, 1: 1}}, r"the labels are \[0, 1\]; give at least one, and each as text"),
    ],
)
def test_labels_that_cannot_be_are_refused(asked_for, message, finetuned_folder):
    with pytest.raises(ValueError, match=message):
        ZoobotForImageClassification.from_pretrained(finetuned_folder, **asked_for)


@pytest.mark.parametrize(
    ("asked_for", "names"),
    [
        ({"label_names": ["bar", "no bar", "edge-on"]}, ["bar", "no bar", "edge-on"]),
        ({"label_names": ["no bar", "bar"]}, ["no bar", "bar"]),
        ({"label_names": ["ring", "not ring"]}, ["ring", "not ring"]),
        ({"label_names": np.unique(["no bar", "bar"])}, ["bar", "no bar"]),
        ({"id2label": {"0": "no bar", "1": "bar"}}, ["no bar", "bar"]),
        ({"num_labels": 4}, ["LABEL_0", "LABEL_1", "LABEL_2", "LABEL_3"]),
        ({"num_labels": 3, "id2label": {0: "bar", 1: "no bar", 2: "edge-on"}}, ["bar", "no bar", "edge-on"]),
        ({"label2id": {"no bar": 0, "bar": 1}}, ["no bar", "bar"]),
    ],
)
def test_other_labels_replace_the_head(asked_for, names, finetuned_folder, layer_norm_model, pixel_values, caplog):
    with caplog.at_level(logging.INFO, "zoobot_hf"):
        loaded = ZoobotForImageClassification.from_pretrained(finetuned_folder, **asked_for)
    assert moved(state_of(layer_norm_model.encoder), loaded.encoder) == set()
    assert not torch.equal(loaded.head[1].weight[:2], layer_norm_model.head[1].weight)
    assert loaded.config.label_names == names
    assert not any(part.training for part in loaded.modules())
    assert {type(name) for name in loaded.config.label_names} == {str}
    assert loaded.config.label2id == {name: index for index, name in enumerate(names)}
    assert logits_of(loaded, pixel_values).shape == (6, len(names))
    assert caplog.messages == [
        "Loaded the encoder of finetuned; its old head was left out.",
        f"The linear head is new, to be trained: {', '.join(names)}.",
    ]


def test_what_was_known_of_the_old_head_is_forgotten_with_it(finetuned_folder):
    config = ZoobotForImageClassification.from_pretrained(finetuned_folder, label_names=["a", "b", "c"]).config
    assert (config.class_weights, config.sky_prevalence, config.training_prevalence) == (None, None, None)
    assert (config.unit_interval, config.label_smoothing) == (False, 0)


def test_what_is_said_of_the_new_head_is_kept(finetuned_folder):
    fields = {
        "label_names": ["a", "b", "c"],
        "class_weights": [1, 2, 3],
        "sky_prevalence": {"a": 0, "b": 0.5, "c": 0.5},
        "unit_interval": True,
    }
    config = ZoobotForImageClassification.from_pretrained(finetuned_folder, **fields).config
    assert config.unit_interval is True
    assert config.class_weights == [1, 2, 3]
    assert config.sky_prevalence == {"a": 0, "b": 0.5, "c": 0.5}


@pytest.mark.parametrize(
    "asked_for", [{"problem_type": "multi_label_classification"}, {"head_type": "mlp"}, {"pooling": "mean"}]
)
def test_another_problem_head_type_or_pooling_replaces_the_head(asked_for, finetuned_folder, layer_norm_model):
    loaded = ZoobotForImageClassification.from_pretrained(finetuned_folder, **asked_for)
    assert moved(state_of(layer_norm_model.encoder), loaded.encoder) == set()
    assert not torch.equal(loaded.head[-1].weight[:, :1], layer_norm_model.head[-1].weight[:, :1])
    assert {getattr(loaded.config, name) for name in asked_for} == set(asked_for.values())
    assert loaded.config.label_names == ["not ring", "ring"]
    assert loaded.config.unit_interval is ("problem_type" not in asked_for)
    assert loaded.config.label_smoothing == (0 if "problem_type" in asked_for else 0.1)


def test_a_configuration_that_leaves_the_pooling_open_keeps_the_head(vit_model, tmp_path):
    encoder_config, labels = vit_model.config.encoder_config, {"id2label": {0: "a", 1: "b"}}
    model = ZoobotForImageClassification(ZoobotConfig(encoder_config, pooling="first_token", **labels))
    with_decided_head(model).save_pretrained(tmp_path)
    loaded = ZoobotForImageClassification.from_pretrained(tmp_path, config=ZoobotConfig(encoder_config, **labels))
    assert moved(state_of(model), loaded) == set()
    assert loaded.config.pooling == "first_token"


def test_another_width_replaces_a_head_with_a_hidden_layer(layer_norm_model, tmp_path):
    config = ZoobotConfig(layer_norm_model.config.encoder_config, head_type="mlp", head_hidden_size=5)
    ZoobotForImageClassification(config).save_pretrained(tmp_path)
    assert ZoobotForImageClassification.from_pretrained(tmp_path, head_hidden_size=8).head[1].weight.shape == (8, 16)


def test_another_pooling_has_a_length_of_its_own(tmp_path):
    model = ZoobotForImageClassification(ZoobotConfig(TimmWrapperConfig(architecture="test_mambaout")))
    model.save_pretrained(tmp_path)
    for loaded in (ZoobotForImageClassification, ZoobotModel):
        config = loaded.from_pretrained(tmp_path, pooling="mean").config
        assert (model.config.embedding_size, config.embedding_size) == (256, 64)


def test_a_new_head_stands_on_the_repository_that_it_was_loaded_from(finetuned_folder, layer_norm_model, tmp_path):
    layer_norm_model.config.encoder_name = "astronomer/first-encoder"
    layer_norm_model.save_pretrained(finetuned_folder)
    load = ZoobotForImageClassification.from_pretrained
    assert load(finetuned_folder).config.encoder_name == "astronomer/first-encoder"
    assert load(finetuned_folder, label_names=["a", "b"]).config.encoder_name == "finetuned"
    assert load(finetuned_folder, label_names=["a", "b"], encoder_name="mine").config.encoder_name == "mine"
    # An encoder alone was not trained since.
    ZoobotModel.from_pretrained(finetuned_folder).save_pretrained(tmp_path / "encoder")
    assert load(tmp_path / "encoder", label_names=["a", "b"]).config.encoder_name == "astronomer/first-encoder"


def test_what_is_none_is_as_it_was_saved(tmp_path, pixel_values):
    model = ZoobotForImageClassification(ZoobotConfig(TimmWrapperConfig(architecture="test_convnext"), pooling="mean"))
    torch.nn.init.normal_(model.head[-1].weight)
    model.eval().save_pretrained(tmp_path)
    nothing = {"pooling": None, "embedding_size": None, "subfolder": None}
    loaded = ZoobotForImageClassification.from_pretrained(tmp_path, **nothing)
    assert loaded.config.pooling == "mean"
    with torch.no_grad():
        assert torch.equal(loaded(pixel_values).logits, model(pixel_values).logits)


def test_on_meta_an_encoder_is_not_run_and_its_size_has_to_be_given():
    with torch.device("meta"), pytest.raises(ValueError, match="embedding_size is None and is found on a device"):
        ZoobotForImageClassification(ZoobotConfig(TimmWrapperConfig(architecture="test_convnext")))


def test_a_new_head_is_where_the_encoder_is(finetuned_folder):
    load, labels = ZoobotForImageClassification.from_pretrained, ["a", "b", "c"]
    for placed in ({"label_names": labels, "device_map": {"": "meta"}}, {"device_map": {"": "meta"}}):
        assert {parameter.device.type for parameter in load(finetuned_folder, **placed).parameters()} == {"meta"}


@pytest.mark.parametrize("labels", [{0: "no bar", 1: "bar"}, {0: "a", 1: "b", 2: "c"}])
def test_the_auto_class_replaces_the_head_as_well(labels, finetuned_folder, layer_norm_model):
    label2id = {name: index for index, name in labels.items()}
    loaded = AutoModelForImageClassification.from_pretrained(finetuned_folder, id2label=labels, label2id=label2id)
    assert loaded.config.id2label == labels
    assert moved(state_of(layer_norm_model.encoder), loaded.encoder) == set()
    assert loaded.head[1].weight.shape == (len(labels), 16)
    assert not torch.equal(loaded.head[1].weight[:2], layer_norm_model.head[1].weight)


def test_a_model_with_a_new_head_can_be_saved_and_loaded(finetuned_folder, pixel_values, tmp_path):
    model = ZoobotForImageClassification.from_pretrained(finetuned_folder, label_names=["a", "b", "c"])
    model.save_pretrained(tmp_path / "new")
    loaded = ZoobotForImageClassification.from_pretrained(tmp_path / "new")
    assert torch.equal(logits_of(loaded, pixel_values), logits_of(model, pixel_values))
    assert loaded.config.encoder_config.hidden_sizes == [8, 8, 16, 16]


# Frozen and unfrozen --------------------------------------------------------------------------------------------


@each(MODELS)
def test_nothing_of_a_frozen_encoder_moves_in_training(any_model, pixel_values, labels):
    any_model.freeze_encoder()
    encoder, head = state_of(any_model.encoder), state_of(any_model.head)
    train_steps(any_model, pixel_values, labels)
    assert any_model.encoder_is_frozen
    assert moved(encoder, any_model.encoder) == set()
    assert moved(head, any_model.head) == set(head)


def test_freezing_matters_to_batch_norm(batch_norm_model, pixel_values, labels):
    before = state_of(batch_norm_model.encoder)
    batch_norm_model.encoder.requires_grad_(False)  # as many a library freezes, and BatchNorm goes on
    batch_norm_model.encoder.train()
    batch_norm_model(pixel_values=pixel_values)
    assert any("running_mean" in name for name in moved(before, batch_norm_model.encoder))


@each(MODELS)
def test_a_frozen_encoder_stays_in_evaluation_mode_and_the_head_trains(any_model):
    any_model.train()
    any_model.freeze_encoder()
    assert not any(module.training for module in any_model.encoder.modules())
    assert all(module.training for module in any_model.head.modules())
    any_model.eval()
    assert not any(module.training for module in any_model.modules())


def test_a_frozen_encoder_says_the_same_in_training(layer_norm_model, pixel_values):
    expected = layer_norm_model.zoobot(pixel_values).embeddings
    layer_norm_model.freeze_encoder()
    layer_norm_model.train()  # half of its paths would be dropped
    assert torch.equal(layer_norm_model.zoobot(pixel_values).embeddings, expected)


def test_an_encoder_alone_can_be_frozen(layer_norm_model):
    encoder = layer_norm_model.zoobot
    encoder.freeze_encoder()
    assert encoder.encoder_is_frozen
    encoder.unfreeze_encoder(1)
    assert not encoder.encoder_is_frozen


@each(MODELS)
def test_every_parameter_is_in_one_block(any_model):
    blocks = any_model.encoder_blocks()
    names = [name for block in blocks for name in block]
    assert len(blocks) >= 3
    assert all(blocks)
    assert sorted(names) == sorted(name for name, _ in any_model.encoder.named_parameters())


@pytest.mark.parametrize(
    ("name", "first", "last"),
    [
        ("layer_norm_model", "embeddings.patch_embeddings.weight", "encoder.stages.3.layers.0.dwconv.weight"),
        ("batch_norm_model", "embedder.embedder.convolution.weight", "encoder.stages.1.layers.0.layer.0"),
        ("vit_model", "embeddings.cls_token", "layers.2."),
        ("timm_model", "timm_model.conv_stem.weight", "timm_model.blocks.4.0.conv_pw.weight"),
        ("timm_convnext_model", "timm_model.stem.0.weight", "timm_model.stages.3.blocks.0.conv_dw.weight"),
    ],
)
def test_blocks_run_from_the_input_upwards(name, first, last, request):
    blocks = request.getfixturevalue(name).encoder_blocks()
    assert first in blocks[0]
    assert any(name.startswith(last) for name in blocks[-1])


@pytest.mark.parametrize(
    ("name", "ending"),
    [
        ("layer_norm_model", "layernorm.weight"),
        ("vit_model", "pooler.dense.weight"),
        ("timm_model", "conv_head.weight"),
        ("timm_convnext_model", "head.norm.weight"),
    ],
)
def test_what_follows_the_last_block_belongs_to_it(name, ending, request):
    model = request.getfixturevalue(name)
    assert any(parameter.endswith(ending) for parameter in model.encoder_blocks()[-1])


@each(MODELS)
def test_all_of_the_encoder_is_unfrozen_by_default(any_model):
    any_model.freeze_encoder()
    any_model.unfreeze_encoder()
    assert trained_names(any_model) == {name for name, _ in any_model.named_parameters()}


@each(MODELS)
@pytest.mark.parametrize("last_blocks", [1, 2])
def test_only_the_last_blocks_and_the_head_move(any_model, last_blocks, pixel_values, labels):
    chosen = set().union(*any_model.encoder_blocks()[-last_blocks:])
    any_model.unfreeze_encoder(last_blocks)
    assert trained_names(any_model.encoder) == chosen
    encoder, head = state_of(any_model.encoder), state_of(any_model.head)
    train_steps(any_model, pixel_values, labels)
    assert moved(encoder, any_model.encoder) == chosen
    assert moved(head, any_model.head) == set(head)


def test_unfreezing_fewer_blocks_freezes_the_others_again(vit_model):
    vit_model.unfreeze_encoder()
    vit_model.unfreeze_encoder(1)
    assert trained_names(vit_model.encoder) == vit_model.encoder_blocks()[-1]


@pytest.mark.parametrize("last_blocks", [0, -1, 6])
def test_blocks_that_are_not_there_are_refused(last_blocks, layer_norm_model):
    with pytest.raises(ValueError, match=f"last_blocks is {last_blocks}; this encoder has 5 blocks: give 1 to that"):
        layer_norm_model.unfreeze_encoder(last_blocks)


def test_an_encoder_without_blocks_says_so(layer_norm_model):
    layer_norm_model.zoobot.encoder = nn.Linear(4, 4)
    layer_norm_model.encoder.config = layer_norm_model.config.encoder_config
    with pytest.raises(ValueError, match="Linear has no list of blocks; freeze all of it or unfreeze all of it"):
        layer_norm_model.unfreeze_encoder(1)


def test_frozen_blocks_stay_in_evaluation_mode_while_the_others_train(layer_norm_model):
    layer_norm_model.unfreeze_encoder(2)
    stages = layer_norm_model.train().encoder.encoder.stages
    for stage, trains in zip(stages, [False, False, True, True], strict=True):
        assert {module.training for module in stage.modules()} == {trains}
    assert not any(module.training for module in layer_norm_model.encoder.embeddings.modules())


def test_dropout_of_frozen_blocks_is_off(vit_model):
    config = ViTConfig.from_dict(vit_model.config.encoder_config.to_dict() | {"hidden_dropout_prob": 0.5})
    model = ZoobotForImageClassification(ZoobotConfig(config))
    model.unfreeze_encoder(1)
    model.train()
    modes = [module.training for module in model.encoder.modules() if isinstance(module, nn.Dropout)]
    assert True in modes
    assert not any(module.training for module in model.encoder.embeddings.modules())
    layers = [
        module
        for name, module in model.encoder.named_modules()
        if name.endswith(("layer.0", "layer.1", "layers.0", "layers.1"))
    ]
    assert len(layers) == 2
    assert not any(module.training for layer in layers for module in layer.modules())


@pytest.mark.parametrize("any_model", ["batch_norm_model", "timm_model"], indirect=True)
def test_an_unfrozen_encoder_keeps_its_batch_norm_statistics(any_model, pixel_values, labels):
    any_model.unfreeze_encoder()
    before = state_of(any_model.encoder)
    train_steps(any_model, pixel_values, labels)
    buffers = {name for name, _ in any_model.encoder.named_buffers()}
    assert moved(before, any_model.encoder) == set(before) - buffers


@pytest.mark.parametrize("any_model", ["batch_norm_model", "timm_model"], indirect=True)
def test_batch_norm_statistics_move_where_they_are_not_kept(any_model, pixel_values, labels):
    any_model.unfreeze_encoder(1, keep_batch_norm_statistics=False)
    last_block = {name.rpartition(".")[0] for name in any_model.encoder_blocks()[-1]}
    before = state_of(any_model.encoder)
    train_steps(any_model, pixel_values, labels)
    buffers = {name for name, _ in any_model.encoder.named_buffers()}
    moved_buffers = moved(before, any_model.encoder) & buffers
    assert moved_buffers == {name for name in buffers if name.rpartition(".")[0] in last_block}
    assert moved_buffers


# Gradient checkpointing -----------------------------------------------------------------------------------------


def gradients_of(model, pixel_values, labels):
    model.zero_grad()
    torch.manual_seed(0)  # dropout
    model(pixel_values=pixel_values, labels=labels).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def enable_checkpointing(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # newer versions of transformers have another name for it
        model.gradient_checkpointing_enable()


@each(WITH_CHECKPOINTING)
@pytest.mark.parametrize("last_blocks", [None, 1])
def test_checkpointing_changes_no_gradient(any_model, last_blocks, pixel_values, labels):
    any_model.unfreeze_encoder(last_blocks)
    any_model.train()
    expected = gradients_of(any_model, pixel_values, labels)
    enable_checkpointing(any_model)
    gradients = gradients_of(any_model, pixel_values, labels)
    assert gradients.keys() == expected.keys() == trained_names(any_model)
    assert all(torch.allclose(gradients[name], expected[name], atol=1e-7) for name in expected)


@each(WITH_CHECKPOINTING)
def test_checkpointing_computes_blocks_a_second_time(any_model, pixel_values, labels):
    calls = []
    inside = min(any_model.encoder_blocks()[-2]).rpartition(".")[0]
    any_model.encoder.get_submodule(inside).register_forward_hook(lambda *_: calls.append(1))
    any_model.unfreeze_encoder()
    any_model.train()
    gradients_of(any_model, pixel_values, labels)
    assert len(calls) == 1
    enable_checkpointing(any_model)
    gradients_of(any_model, pixel_values, labels)
    assert len(calls) == 3


@each(WITHOUT_CHECKPOINTING)
def test_an_encoder_that_cannot_checkpoint_says_so(any_model):
    with pytest.raises(ValueError, match="is not compatible with gradient checkpointing"):
        enable_checkpointing(any_model)
