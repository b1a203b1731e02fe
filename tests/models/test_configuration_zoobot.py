import json

import pytest
from transformers import AutoConfig, ConvNextConfig

from zoobot_hf import ZoobotConfig, ZoobotForImageClassification

LABELS = {0: "not ring", 1: "ring", 2: "cannot tell"}


def config_of(**fields):
    encoder = ConvNextConfig(hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 2, 1], image_size=32, layer_norm_eps=1e-5)
    labels = {"id2label": LABELS, "label2id": {name: index for index, name in LABELS.items()}}
    return ZoobotConfig(encoder, **{**labels, **fields})


def test_every_field_survives_saving_and_loading(tmp_path):
    fields = {
        "embedding_size": 16,
        "pooling": "mean",
        "head_type": "mlp",
        "head_hidden_size": 12,
        "head_dropout": 0.25,
        "label_smoothing": 0.1,
        "class_weights": [1.0, 2.0, 0.5],
        "unit_interval": True,
        "sky_prevalence": {"not ring": 0.9, "ring": 0.08, "cannot tell": 0.02},
        "training_prevalence": {"not ring": 0.4, "ring": 0.4, "cannot tell": 0.2},
        "predictions_for": "sky",
        "calibration_temperature": [1.5, 1.25, 0.5],
        "calibration_shift": [0.5, 0.0, -0.5],
        "decision_threshold": {"ring": 0.75},
        "decision_aim": "purity of at least 0.9",
        "encoder_name": "astronomer/encoder",
        "problem_type": "multi_label_classification",
    }
    config_of(**fields).save_pretrained(tmp_path)
    loaded = ZoobotConfig.from_pretrained(tmp_path)
    assert {name: getattr(loaded, name) for name in fields} == fields
    assert loaded.id2label == LABELS
    assert loaded.label_names == ["not ring", "ring", "cannot tell"]


def test_the_encoders_own_configuration_survives_whole(tmp_path):
    config = config_of()
    config.save_pretrained(tmp_path)
    loaded = ZoobotConfig.from_pretrained(tmp_path).encoder_config
    assert isinstance(loaded, ConvNextConfig)
    assert loaded.to_dict() == config.encoder_config.to_dict()
    assert loaded.layer_norm_eps == 1e-5


def test_saving_twice_gives_the_same_file(tmp_path):
    config_of().save_pretrained(tmp_path / "once")
    ZoobotConfig.from_pretrained(tmp_path / "once").save_pretrained(tmp_path / "twice")
    assert (tmp_path / "once/config.json").read_text() == (tmp_path / "twice/config.json").read_text()


def test_no_path_of_this_machine_is_saved(tmp_path, layer_norm_model):
    layer_norm_model.save_pretrained(tmp_path / "once")
    model = ZoobotForImageClassification.from_pretrained(tmp_path / "once")
    model.config.encoder_config._name_or_path = str(tmp_path)
    model.save_pretrained(tmp_path / "twice")
    text = (tmp_path / "twice/config.json").read_text()
    assert "_name_or_path" not in text
    assert str(tmp_path) not in text


def test_auto_config_knows_the_model_type(tmp_path):
    config_of().save_pretrained(tmp_path)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), ZoobotConfig)


def test_a_configuration_can_be_made_without_an_encoder():
    assert ZoobotConfig().encoder_config is None


@pytest.mark.parametrize("choice", ["head_type", "pooling", "problem_type", "predictions_for"])
def test_a_choice_that_does_not_exist_is_named_with_those_that_do(choice):
    with pytest.raises(ValueError, match=rf"{choice} is 'forest'; choose one of \w+, \w+"):
        config_of(**{choice: "forest"})


@pytest.mark.parametrize("name", ["head_dropout", "label_smoothing"])
@pytest.mark.parametrize("share", [-0.1, 1, 50, float("nan"), "0.5", None])
def test_a_share_outside_0_to_1_is_refused(name, share):
    with pytest.raises(ValueError, match=rf"{name} is {share!r}; give a share of at least 0 and below 1"):
        config_of(**{name: share})


@pytest.mark.parametrize("name", ["head_hidden_size", "embedding_size"])
@pytest.mark.parametrize("width", [-1, 2.5, "wide", 10**12])
def test_a_width_that_no_head_has_is_refused(name, width):
    with pytest.raises(ValueError, match=f"{name} is {width!r}; give a whole number from 1 to 65536"):
        config_of(**{name: width})


def test_class_weights_are_one_for_each_label():
    with pytest.raises(ValueError, match=r"class_weights has 2 values for 3 labels \(not ring, ring, cannot tell\)"):
        config_of(class_weights=[1.0, 2.0])


@pytest.mark.parametrize("weights", [3, "abc", [1, 2, -1], [1, 2, "three"], [1, 2, float("nan")]])
def test_class_weights_are_numbers(weights):
    with pytest.raises(ValueError, match=r"class_weights is .*; give a list of numbers of at least 0"):
        config_of(class_weights=weights)


def test_labels_are_numbered_from_0():
    with pytest.raises(ValueError, match=r"id2label has the numbers \[1, 2\]; number the labels from 0"):
        config_of(id2label={1: "not ring", 2: "ring"})


@pytest.mark.parametrize("labels", [["not ring", "ring"], 3, "ring"])
def test_labels_of_another_type_are_refused(labels):
    with pytest.raises(ValueError, match=r"id2label is .*; give a dictionary from numbers to names"):
        config_of(id2label=labels)


@pytest.mark.parametrize("name", ["sky_prevalence", "training_prevalence"])
@pytest.mark.parametrize("shares", [0.5, [0.5, 0.5], {"ring": 1.5}, {"ring": "rare"}, {"ring": float("nan")}])
def test_a_prevalence_is_a_share_for_each_label(name, shares):
    with pytest.raises(ValueError, match=rf"{name} is .*; give each label's share, from 0 to 1, by its name"):
        config_of(**{name: shares})


@pytest.mark.parametrize("threshold", [0.5, {"ring": 1.5}, {"ring": "high"}])
def test_a_threshold_is_a_probability_for_each_label(threshold):
    with pytest.raises(ValueError, match=r"decision_threshold is .*; give each label's probability, from 0 to 1"):
        config_of(decision_threshold=threshold)


@pytest.mark.parametrize("temperature", [0, -1.5, "warm", float("nan"), [1.0, 0.0, 1.0], {"ring": 1.0}])
def test_a_temperature_is_above_0(temperature):
    with pytest.raises(ValueError, match=r"calibration_temperature is .*; give a number above 0, or a list of one"):
        config_of(calibration_temperature=temperature)


@pytest.mark.parametrize("shift", [0.5, "high", [0.5, None, 0.5]])
def test_a_calibration_shift_is_a_list_of_numbers(shift):
    with pytest.raises(ValueError, match=r"calibration_shift is .*; give a list of one number for each label"):
        config_of(calibration_shift=shift)


def test_forgetting_the_calibration_keeps_what_was_measured():
    shares = {"not ring": 0.9, "ring": 0.08, "cannot tell": 0.02}
    fitted = {"calibration_temperature": 2.0, "calibration_shift": [0.0, 0.0, 1.0], "predictions_for": "sky"}
    fitted |= {"decision_threshold": {"ring": 0.5}, "decision_aim": "best F1"}
    config = config_of(sky_prevalence=shares, training_prevalence=shares, **fitted)
    config.forget_calibration()
    assert config.to_dict() == config_of(sky_prevalence=shares, training_prevalence=shares).to_dict()


@pytest.mark.parametrize("fields", [{"hidden_sizes": "wide"}, {"depths": {"a": 1}}, {"num_channels": "three"}])
def test_fields_of_the_encoder_of_another_type_are_refused(fields):
    with pytest.raises(ValueError, match=rf"encoder_config is no convnext configuration: .*{next(iter(fields))}"):
        ZoobotConfig({"model_type": "convnext", **fields})


def test_an_encoder_of_absurd_size_is_refused_before_it_is_built():
    encoder = ConvNextConfig().to_dict()
    with pytest.raises(ValueError, match=r"hidden_sizes of encoder_config is or holds 1000000; no encoder has more"):
        ZoobotConfig({**encoder, "hidden_sizes": [8, 8, 16, 10**6]})
    with pytest.raises(ValueError, match=r"depths of encoder_config is or holds 2000; no encoder has more than 1024"):
        ZoobotConfig({**encoder, "depths": [1, 1, 2000, 1]})
    with pytest.raises(ValueError, match=r"num_labels of the configuration is or holds 1000000000000"):
        ZoobotConfig(encoder, num_labels=10**12)


@pytest.mark.parametrize("model_type", ["galaxy-net", None, ["convnext"], "zoobot"])
def test_an_encoder_that_transformers_lacks_is_refused(model_type):
    with pytest.raises(ValueError, match=r"encoder_config has model_type .* no such encoder"):
        ZoobotConfig({"model_type": model_type, "hidden_size": 8})


@pytest.mark.parametrize("encoder_config", ["convnext", 3, ["convnext"]])
def test_an_encoder_configuration_of_another_type_is_refused(encoder_config):
    with pytest.raises(ValueError, match=r"encoder_config is .*; give a transformers configuration or its dictionary"):
        ZoobotConfig(encoder_config)


def test_code_that_a_repository_brings_is_not_run(tmp_path):
    config_of().save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    settings["encoder_config"] |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.MyConfig"}}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    (tmp_path / "mine.py").write_text("raise SystemExit('code from a repository was run')")
    with pytest.raises(ValueError, match="model_type 'mine'"):
        ZoobotConfig.from_pretrained(tmp_path)
