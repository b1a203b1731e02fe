import logging
import os
import subprocess
from pathlib import Path

import pytest
import timm
import torch
from huggingface_hub import HfApi
from torch import nn
from transformers import ResNetConfig

from zoobot_hf import (
    ZoobotForGalaxyZoo,
    ZoobotForImageClassification,
    ZoobotModel,
    image_processor_for,
    load_survey,
)
from zoobot_hf.models.lightning_checkpoint import read_zoobot_file

DECALS = load_survey("decals_dr5").to_dict()
ZOOBOT_PYTHON = os.environ.get("ZOOBOT_PYTHON")


class Schema:
    """Stands for Zoobot's own, which its decision trees' files hold pickled."""


class FinetunedByZoobot(nn.Module):
    """The layout of a finetuned Zoobot model: an encoder and a linear head, followed in trees by a sigmoid."""

    def __init__(self, outputs, *, is_tree, architecture="test_convnext", embedding_size=64, **arguments):
        super().__init__()
        self.encoder = timm.create_model(architecture, num_classes=0, **arguments)
        linear = nn.Linear(embedding_size, outputs)
        self.head = nn.Sequential(nn.Dropout(), nn.Sequential(linear)) if is_tree else nn.ModuleDict({"linear": linear})
        self.eval()

    def forward(self, images):
        embeddings = self.encoder(images)
        if isinstance(self.head, nn.ModuleDict):
            return self.head["linear"](embeddings)
        return 1 + 100 * self.head(embeddings).sigmoid()


@pytest.fixture(scope="module")
def images():
    return torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def save(model, path, **settings):
    settings = {"name": "hf_hub:mwalmsley/zoobot-encoder-test_convnext", "head_dropout_prob": 0.3, **settings}
    torch.save({"epoch": 3, "state_dict": model.state_dict(), "hyper_parameters": settings}, path)
    return path


@pytest.fixture
def tree_file(tmp_path):
    torch.manual_seed(0)
    model = FinetunedByZoobot(34, is_tree=True)
    return model, save(model, tmp_path / "FinetuneableZoobotTree.ckpt")


@pytest.fixture
def classifier_file(tmp_path):
    torch.manual_seed(0)
    model = FinetunedByZoobot(3, is_tree=False)
    return model, save(model, tmp_path / "FinetuneableZoobotClassifier.ckpt", num_classes=3)


# Predictions ----------------------------------------------------------------------------------------------------


def test_a_finetuned_tree_predicts_as_it_did(tree_file, images, caplog):
    original, path = tree_file
    with caplog.at_level(logging.INFO):
        model = ZoobotForGalaxyZoo.from_pretrained(path, decision_tree=DECALS)
    assert torch.allclose(model(images).concentrations, original(images), atol=1e-5)
    assert model.config.head_dropout == 0.3
    assert model.config.encoder_name == "FinetuneableZoobotTree.ckpt"
    assert "Took the head of FinetuneableZoobotTree.ckpt: output 0 for smooth-or-featured-dr5_smooth, o" in caplog.text
    assert "is new" not in caplog.text


def test_a_finetuned_classifier_predicts_as_it_did(classifier_file, images):
    original, path = classifier_file
    model = ZoobotForImageClassification.from_pretrained(path, label_names=["ring", "bar", "neither"])
    assert torch.allclose(model(images).logits, original(images), atol=1e-6)
    assert model.config.label_names == ["ring", "bar", "neither"]
    assert ZoobotForImageClassification.from_pretrained(path).config.label_names == ["LABEL_0", "LABEL_1", "LABEL_2"]


def test_a_finetuned_regressor_predicts_as_it_did(tmp_path, images):
    original = FinetunedByZoobot(1, is_tree=False)
    path = save(original, tmp_path / "FinetuneableZoobotRegressor.ckpt", unit_interval=True)
    model = ZoobotForImageClassification.from_pretrained(path, label_names=["ring_fraction"])
    assert model.config.problem_type == "regression"
    assert torch.allclose(model(images).logits, original(images).sigmoid(), atol=1e-6)


@pytest.mark.parametrize(
    ("outputs", "asked", "labels", "problem"),
    [
        (34, {"decision_tree": load_survey("euclid").to_dict()}, 46, "votes"),
        (34, {"label_names": ["not ring", "ring"]}, 2, "single_label_classification"),
        (34, {"label_names": [str(number) for number in range(34)]}, 34, "single_label_classification"),
        (2, {"decision_tree": load_survey("rings").to_dict()}, 2, "votes"),
        (3, {"decision_tree": DECALS}, 34, "votes"),
        (3, {"label_names": ["not ring", "ring"]}, 2, "single_label_classification"),
        (3, {"problem_type": "multi_label_classification"}, 3, "multi_label_classification"),
        (3, {"head_type": "mlp"}, 3, "single_label_classification"),
        (3, {"pooling": "mean"}, 3, "single_label_classification"),
        (1, {"label_names": ["not ring", "ring"]}, 2, "single_label_classification"),
        (1, {"label_names": ["ring"], "problem_type": "multi_label_classification"}, 1, "multi_label_classification"),
        (1, {"head_type": "mlp"}, 1, "regression"),
    ],
)
def test_another_head_is_new_on_the_files_encoder(outputs, asked, labels, problem, tmp_path, images, caplog):
    original = FinetunedByZoobot(outputs, is_tree=outputs == 34)
    path = save(original, tmp_path / "old.ckpt", **({"unit_interval": True} if outputs == 1 else {}))
    kind = ZoobotForGalaxyZoo if "decision_tree" in asked else ZoobotForImageClassification
    with caplog.at_level(logging.INFO):
        model = kind.from_pretrained(path, **asked)
    before = original.encoder.state_dict()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.encoder.timm_model.state_dict().items())
    assert (model.config.num_labels, model.config.problem_type) == (labels, problem)
    assert model.config.unit_interval is (problem == "regression")
    assert "The old head of old.ckpt was left out." in caplog.text
    assert "is new, to be trained" in caplog.text


def test_a_model_that_was_loaded_from_zoobot_is_saved_as_ours(tree_file, images, tmp_path):
    _, path = tree_file
    model = ZoobotForGalaxyZoo.from_pretrained(path, decision_tree=DECALS)
    model.save_pretrained(tmp_path / "ours")
    again = ZoobotForGalaxyZoo.from_pretrained(tmp_path / "ours")
    assert torch.equal(again(images).concentrations, model(images).concentrations)


def test_the_encoder_alone_is_loaded(tree_file, images):
    original, path = tree_file
    assert torch.allclose(ZoobotModel.from_pretrained(path)(images).embeddings, original.encoder(images), atol=1e-6)


def test_a_repository_with_nothing_else_is_loaded_from_the_hub(tree_file, images, hub, hub_token, repo_id):
    original, path = tree_file
    api = HfApi(endpoint=hub.url, token=hub_token)
    api.create_repo(repo_id)
    api.upload_file(path_or_fileobj=path, path_in_repo=path.name, repo_id=repo_id)
    model = ZoobotForGalaxyZoo.from_pretrained(repo_id, decision_tree=DECALS)
    assert torch.allclose(model(images).concentrations, original(images), atol=1e-5)
    processor = image_processor_for(repo_id)
    assert (processor.pixels, processor.zoom) == (224, 1.2)


def test_a_greyscale_encoder_takes_one_channel(tmp_path, images):
    original = FinetunedByZoobot(34, is_tree=True, in_chans=1)
    path = save(original, tmp_path / "grey.ckpt", greyscale=True)
    model = ZoobotForGalaxyZoo.from_pretrained(path, decision_tree=DECALS)
    assert torch.allclose(model(images[:, :1]).concentrations, original(images[:, :1]), atol=1e-5)
    processor = image_processor_for(path)
    assert (processor.num_channels, processor.pixels, processor.zoom) == (1, 224, 1.2)
    assert (image_processor_for(path, zoom=1.4).zoom, processor.do_normalize) == (1.4, False)


def test_an_encoder_that_ends_in_a_hidden_layer_is_loaded(tmp_path):
    original = FinetunedByZoobot(3, is_tree=False, architecture="test_mambaout", embedding_size=256)
    path = save(original, tmp_path / "mambaout.ckpt", name="test_mambaout")
    model, images = ZoobotForImageClassification.from_pretrained(path), torch.rand(2, 3, 64, 64)
    assert model.encoder.timm_model.num_features == 64
    assert torch.allclose(model(images).logits, original(images), atol=1e-6)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(None, torch.float32), ("float16", torch.float16), (torch.bfloat16, torch.bfloat16), ("auto", torch.float32)],
)
def test_the_type_of_the_weights_can_be_named(dtype, expected, classifier_file):
    model = ZoobotForImageClassification.from_pretrained(classifier_file[1], dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {expected}


def test_an_encoder_that_the_file_does_not_name_is_given(tmp_path, images):
    original = FinetunedByZoobot(34, is_tree=True)
    path = save(original, tmp_path / "tree.ckpt", name=None)
    with pytest.raises(
        ValueError, match=r"tree\.ckpt doesn't say which encoder it has \(name is None\); give encoder_con"
    ):
        ZoobotForGalaxyZoo.from_pretrained(path, decision_tree=DECALS)
    config = ZoobotModel.from_pretrained(save(original, tmp_path / "named.ckpt")).config.encoder_config
    model = ZoobotForGalaxyZoo.from_pretrained(path, decision_tree=DECALS, encoder_config=config)
    assert torch.allclose(model(images).concentrations, original(images), atol=1e-5)


# Refusals -------------------------------------------------------------------------------------------------------


def test_a_pickled_object_is_refused_with_its_class(tmp_path):
    path = save(FinetunedByZoobot(34, is_tree=True), tmp_path / "tree.ckpt", schema=Schema())
    message = (
        r"tree\.ckpt holds a pickled [\w.]+\.Schema, whose code is never run. Where Zoobot is installed and the file"
    )
    with pytest.raises(ValueError, match=message) as error:
        ZoobotForGalaxyZoo.from_pretrained(path, decision_tree=DECALS)
    assert "\n" not in str(error.value)


def test_code_in_a_file_is_not_run(tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "sprung"),)

    path = save(FinetunedByZoobot(34, is_tree=True), tmp_path / "tree.ckpt", schema=Trap())
    with pytest.raises(ValueError, match=r"tree\.ckpt holds a pickled posix.mkdir, whose code is never run"):
        ZoobotForGalaxyZoo.from_pretrained(path, decision_tree=DECALS)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("share", [0, 0.1, 0.9])
def test_a_damaged_file_is_refused(share, tree_file):
    _, path = tree_file
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=r"Tree\.ckpt is damaged or not a checkpoint; copy or download it again"):
        ZoobotForGalaxyZoo.from_pretrained(path, decision_tree=DECALS)


def test_text_is_refused(tmp_path):
    (tmp_path / "notes.ckpt").write_text("no model at all\n" * 50)
    with pytest.raises(ValueError, match=r"notes.ckpt is damaged or not a checkpoint"):
        ZoobotModel.from_pretrained(tmp_path / "notes.ckpt")


@pytest.mark.parametrize("content", [[1, 2], {"epoch": 3}, {"state_dict": {"encoder.a": 3}}])
def test_a_file_without_weights_is_refused(content, tmp_path):
    torch.save(content, tmp_path / "odd.ckpt")
    with pytest.raises(ValueError, match=r"odd.ckpt has no state_dict of tensors; give a checkpoint that Zoobot's"):
        read_zoobot_file(tmp_path / "odd.ckpt")


@pytest.mark.parametrize("names", [["model.weight"], ["encoder.a"], ["head.1.weight", "head.1.bias"]])
def test_another_lightning_model_is_refused(names, tmp_path):
    torch.save({"state_dict": {name: torch.zeros(2, 2) for name in names}}, tmp_path / "odd.ckpt")
    with pytest.raises(ValueError, match=rf"odd.ckpt is no finetuned Zoobot model: .*, but {names[0].split('.')[0]}\."):
        read_zoobot_file(tmp_path / "odd.ckpt")


def test_a_trees_file_needs_labels_for_a_classifier(tree_file):
    with pytest.raises(ValueError, match=r"Tree\.ckpt answers a decision tree; load it with ZoobotForGalaxyZoo, or gi"):
        ZoobotForImageClassification.from_pretrained(tree_file[1])


def test_a_tree_is_needed(tree_file):
    with pytest.raises(ValueError, match="the configuration has no decision_tree; give a survey's"):
        ZoobotForGalaxyZoo.from_pretrained(tree_file[1])


def test_weights_of_another_encoder_are_refused(tree_file):
    with pytest.raises(
        ValueError, match=r"the checkpoint of FinetuneableZoobotTree.ckpt lacks \d+ of the model's weights"
    ):
        ZoobotForGalaxyZoo.from_pretrained(tree_file[1], decision_tree=DECALS, encoder_config=ResNetConfig(depths=[1]))


def test_weights_of_another_shape_are_refused(tree_file):
    model, path = tree_file
    model.encoder.stem[0].weight = nn.Parameter(model.encoder.stem[0].weight[:, :, :2])
    save(model, path)
    with pytest.raises(ValueError, match=r"lacks 1 of the model's weights or has them in another shape \(.*stem"):
        ZoobotForGalaxyZoo.from_pretrained(path, decision_tree=DECALS)


def test_a_folder_with_several_files_is_refused(tree_file, classifier_file):
    message = r"holds FinetuneableZoobotClassifier.ckpt, FinetuneableZoobotTree.ckpt; give the path of one of them"
    with pytest.raises(OSError, match=message):
        ZoobotModel.from_pretrained(tree_file[1].parent)


def test_another_file_is_no_model(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(OSError, match="is neither a folder here nor a Hub id of the form user/name"):
        ZoobotModel.from_pretrained(tmp_path / "model.safetensors")


# Zoobot itself --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made_by_zoobot(tmp_path_factory):
    """Three models that Zoobot 2.9.0 finetuned, and what it says they predict."""
    folder = tmp_path_factory.mktemp("zoobot")
    script = Path(__file__).with_name("make_zoobot_checkpoints.py")
    subprocess.run([ZOOBOT_PYTHON, str(script), str(folder)], check=True, cwd=folder)
    return folder, torch.load(folder / "predictions.pt", weights_only=True)


@pytest.mark.slow
@pytest.mark.skipif(ZOOBOT_PYTHON is None, reason="needs ZOOBOT_PYTHON, a Python with Zoobot 2.9.0")
def test_files_of_zoobot_itself_predict_as_it_does(made_by_zoobot):
    folder, predictions = made_by_zoobot
    images = predictions["images"]
    tree = ZoobotForGalaxyZoo.from_pretrained(folder / "tree_plain.ckpt", decision_tree=DECALS)
    classifier = ZoobotForImageClassification.from_pretrained(folder / "classifier.ckpt")
    regressor = ZoobotForImageClassification.from_pretrained(folder / "regressor.ckpt", label_names=["fraction"])
    assert torch.allclose(tree(images).concentrations, predictions["tree"], atol=1e-5, rtol=0)
    assert torch.allclose(classifier(images).logits, predictions["classifier"], atol=1e-5, rtol=0)
    assert torch.allclose(regressor(images).logits[:, 0], predictions["regressor"], atol=1e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.skipif(ZOOBOT_PYTHON is None, reason="needs ZOOBOT_PYTHON, a Python with Zoobot 2.9.0")
def test_the_file_of_a_tree_with_zoobots_schema_is_refused(made_by_zoobot):
    folder, _ = made_by_zoobot
    with pytest.raises(ValueError, match=r"tree\.ckpt holds a pickled zoobot.shared.schemas.Schema, whose code"):
        ZoobotForGalaxyZoo.from_pretrained(folder / "tree.ckpt", decision_tree=DECALS)
