import json
import logging
import threading

import pytest
import timm
import torch
import transformers.modeling_utils
from huggingface_hub import HfApi
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForImageClassification,
    BeitConfig,
    BeitModel,
    BitImageProcessor,
    ConvNextForImageClassification,
    ConvNextModel,
    PoolFormerConfig,
    PoolFormerModel,
    ResNetForImageClassification,
    ViTForImageClassification,
    ViTModel,
    pipeline,
)

from zoobot_hf import ZoobotForImageClassification, ZoobotImageProcessor, ZoobotModel, image_processor_for
from zoobot_hf.models.conversion import DEFAULT_ZOOM

IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
LABELS = ["not ring", "ring"]


def write_timm_layout(folder, encoder, *, architecture, weights="model.safetensors", **settings):
    """A repository as Galaxy Zoo's encoders have it, with ImageNet's mean and standard deviation left over."""
    folder.mkdir()
    facts = {
        "tag": "in12k_ft_in1k",
        "custom_load": False,
        "input_size": [3, 32, 32],
        "test_input_size": [3, 288, 288],
        "fixed_input_size": False,
        "interpolation": "bicubic",
        "crop_pct": 0.95,
        **IMAGENET,
        "num_classes": 1000,
    }
    config = {
        "architecture": architecture,
        "num_classes": 0,
        "num_features": encoder.num_features,
        "pretrained_cfg": facts,
        **settings,
    }
    (folder / "config.json").write_text(json.dumps(config))
    if weights == "model.safetensors":
        save_file(encoder.state_dict(), folder / weights, metadata={"format": "pt"})
    else:
        torch.save(encoder.state_dict(), folder / weights)
    return folder


def tiny_timm(architecture, **settings):
    torch.manual_seed(0)
    return timm.create_model(architecture, num_classes=0, **settings).eval()


@pytest.fixture(scope="session")
def resnet():
    return tiny_timm("test_resnet")


@pytest.fixture(scope="session")
def timm_folder(resnet, tmp_path_factory):
    return write_timm_layout(tmp_path_factory.mktemp("timm") / "encoder", resnet, architecture="test_resnet")


@pytest.fixture(scope="session")
def bin_folder(resnet, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bin") / "encoder"
    return write_timm_layout(folder, resnet, architecture="test_resnet", weights="pytorch_model.bin")


@pytest.fixture
def pixel_values(processor, galaxy_images):
    return processor(galaxy_images[:4])["pixel_values"]


@pytest.fixture
def upload(hub, hub_token):
    def create(repo_id, folder, **settings):
        api = HfApi(endpoint=hub.url, token=hub_token)
        api.create_repo(repo_id, **settings)
        api.upload_folder(repo_id=repo_id, folder_path=folder)
        hub.forget()
        return repo_id

    return create


def embeddings_of(model, pixel_values):
    with torch.no_grad():
        return model.base_model(pixel_values).embeddings


def assert_equal_to_timm(model, encoder, pixel_values):
    with torch.no_grad():
        expected = encoder(pixel_values)
    assert torch.allclose(embeddings_of(model, pixel_values), expected, rtol=1e-5, atol=1e-6)


def assert_same_weights(module, other):
    weights = other.state_dict()
    assert module.state_dict().keys() == weights.keys()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in module.state_dict().items())


# timm's layout --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("architecture", ["test_convnext", "test_efficientnet", "test_resnet"])
def test_timms_layout_gives_timms_own_embeddings(architecture, weights, pixel_values, tmp_path):
    encoder = tiny_timm(architecture)
    folder = write_timm_layout(tmp_path / "encoder", encoder, architecture=architecture, weights=weights)
    model = ZoobotForImageClassification.from_pretrained(folder, label_names=LABELS)
    assert_same_weights(model.encoder.timm_model, encoder)
    assert_equal_to_timm(model, encoder, pixel_values)
    assert model.config.embedding_size == encoder.num_features
    assert model.config.encoder_name == "encoder"
    assert_equal_to_timm(ZoobotModel.from_pretrained(folder), encoder, pixel_values)


def test_a_vision_transformer_of_timm_too(tmp_path):
    encoder = tiny_timm("test_vit")  # 160 px, for its position embeddings
    folder = write_timm_layout(tmp_path / "encoder", encoder, architecture="test_vit")
    assert_equal_to_timm(ZoobotModel.from_pretrained(folder), encoder, torch.rand(2, 3, 160, 160))


def test_what_timm_itself_saves_is_loaded(pixel_values, tmp_path):
    encoder = tiny_timm("test_resnet")
    timm.models.save_for_hf(encoder, tmp_path, model_args={"num_classes": 0}, safe_serialization=True)
    assert json.loads((tmp_path / "config.json").read_text())["model_args"]["num_classes"] == 0
    assert_equal_to_timm(ZoobotModel.from_pretrained(tmp_path), encoder, pixel_values)


def test_a_classifier_in_the_checkpoint_is_left_out_and_the_log_says_so(pixel_values, tmp_path, caplog):
    encoder = timm.create_model("test_resnet", num_classes=7).eval()
    folder = write_timm_layout(tmp_path / "encoder", encoder, architecture="test_resnet", num_classes=7)
    with caplog.at_level(logging.INFO, "zoobot_hf"):
        model = ZoobotForImageClassification.from_pretrained(folder, label_names=LABELS)
    encoder.reset_classifier(0)
    assert_equal_to_timm(model, encoder, pixel_values)
    assert "left out of its checkpoint: " in caplog.text
    assert "fc.bias" in caplog.text


def test_the_log_says_what_was_loaded_and_what_is_new(timm_folder, caplog):
    with caplog.at_level(logging.INFO, "zoobot_hf"):
        ZoobotForImageClassification.from_pretrained(timm_folder, label_names=["smooth", "disk", "ring"])
    assert caplog.messages == [
        "Loaded the encoder encoder (timm_wrapper, 0.4 million parameters); left out of its checkpoint: nothing.",
        "The linear head is new, to be trained: smooth, disk, ring.",
    ]


@pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin"])
def test_one_channel_in_the_weights_overrules_three_in_the_configuration(weights, galaxy_images, tmp_path):
    encoder = tiny_timm("test_convnext", in_chans=1)
    folder = write_timm_layout(tmp_path / "encoder", encoder, architecture="test_convnext", weights=weights)
    model = ZoobotForImageClassification.from_pretrained(folder, label_names=LABELS)
    grey = ZoobotImageProcessor(32, num_channels=1)(galaxy_images[:2])["pixel_values"]
    assert_equal_to_timm(model, encoder, grey)
    model.save_pretrained(tmp_path / "saved")
    saved = ZoobotForImageClassification.from_pretrained(tmp_path / "saved")
    assert_equal_to_timm(saved, encoder, grey)


def test_the_processor_of_a_one_channel_encoder_gives_one_channel(galaxy_images, tmp_path):
    encoder = tiny_timm("test_convnext", in_chans=1)
    folder = write_timm_layout(tmp_path / "encoder", encoder, architecture="test_convnext")
    pixel_values = image_processor_for(folder)(galaxy_images[:2])["pixel_values"]
    assert pixel_values.shape == (2, 1, 32, 32)
    assert ZoobotModel.from_pretrained(folder)(pixel_values).embeddings.shape == (2, 64)


def test_an_encoder_with_its_new_head_can_be_saved_and_loaded(timm_folder, resnet, pixel_values, tmp_path):
    model = ZoobotForImageClassification.from_pretrained(timm_folder, label_names=LABELS, head_dropout=0.2)
    model.save_pretrained(tmp_path)
    loaded = ZoobotForImageClassification.from_pretrained(tmp_path)
    assert_same_weights(loaded, model)
    assert_equal_to_timm(loaded, resnet, pixel_values)
    assert (loaded.config.head_dropout, loaded.config.encoder_name) == (0.2, "encoder")


def test_the_type_of_the_weights_can_be_chosen(timm_folder, pixel_values):
    model = ZoobotForImageClassification.from_pretrained(timm_folder, label_names=LABELS, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model(pixel_values=pixel_values.bfloat16()).logits.isfinite().all()


def test_a_real_encoder_in_timms_layout_is_loaded(mobilenet_folder):
    model = ZoobotForImageClassification.from_pretrained(mobilenet_folder, label_names=LABELS)
    encoder = timm.create_model("mobilenetv2_100", num_classes=0, pad_type="same").eval()
    encoder.load_state_dict(load_file(mobilenet_folder / "model.safetensors"), strict=False)
    assert_same_weights(model.encoder.timm_model, encoder)
    assert_equal_to_timm(model, encoder, torch.rand(1, 3, 96, 96))
    assert model.config.embedding_size == 1280


# Encoders of transformers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "encoder_class"),
    [("layer_norm", ConvNextForImageClassification), ("batch_norm", ResNetForImageClassification)],
)
def test_the_encoder_of_a_classifier_is_loaded_without_its_head(
    name, encoder_class, tiny_models, pixel_values, tmp_path, caplog
):
    classifier = encoder_class(tiny_models[name].config.encoder_config).eval()
    classifier.save_pretrained(tmp_path / "classifier")
    with caplog.at_level(logging.INFO, "zoobot_hf"):
        model = ZoobotForImageClassification.from_pretrained(tmp_path / "classifier", label_names=LABELS)
    assert_same_weights(model.encoder, classifier.base_model)
    with torch.no_grad():
        expected = classifier.base_model(pixel_values).pooler_output.flatten(1)
    assert torch.allclose(embeddings_of(model, pixel_values), expected, atol=1e-6)
    assert model.config.pooling == "pooler"
    left_out = ", ".join(sorted(name for name in classifier.state_dict() if name.startswith("classifier.")))
    assert f"left out of its checkpoint: {left_out}." in caplog.text


def test_a_vision_transformer_without_a_pooler_is_read_at_its_first_token(vit_model, pixel_values, tmp_path, caplog):
    classifier = ViTForImageClassification(vit_model.config.encoder_config).eval()
    classifier.save_pretrained(tmp_path / "classifier")
    with caplog.at_level(logging.INFO, "zoobot_hf"):
        model = ZoobotForImageClassification.from_pretrained(tmp_path / "classifier", label_names=LABELS)
    with torch.no_grad():
        expected = classifier.vit(pixel_values).last_hidden_state[:, 0]
    assert torch.allclose(embeddings_of(model, pixel_values), expected, atol=1e-6)
    assert model.config.pooling == "first_token"
    assert "left out of its checkpoint: classifier.bias, classifier.weight." in caplog.text
    model.save_pretrained(tmp_path / "saved")
    loaded = ZoobotForImageClassification.from_pretrained(tmp_path / "saved")
    assert torch.allclose(embeddings_of(loaded, pixel_values), expected, atol=1e-6)


def test_a_vision_transformers_own_pooler_is_used(vit_model, pixel_values, tmp_path):
    encoder = ViTModel(vit_model.config.encoder_config).eval()
    encoder.save_pretrained(tmp_path / "encoder")
    model = ZoobotForImageClassification.from_pretrained(tmp_path / "encoder", label_names=LABELS)
    with torch.no_grad():
        expected = encoder(pixel_values).pooler_output
    assert torch.allclose(embeddings_of(model, pixel_values), expected, atol=1e-6)
    assert model.config.pooling == "pooler"


def test_the_pooling_can_be_chosen(vit_model, pixel_values, tmp_path):
    encoder = ViTModel(vit_model.config.encoder_config).eval()
    encoder.save_pretrained(tmp_path / "encoder")
    model = ZoobotModel.from_pretrained(tmp_path / "encoder", pooling="mean")
    with torch.no_grad():
        expected = encoder(pixel_values).last_hidden_state.mean(dim=1)
    assert torch.allclose(embeddings_of(model, pixel_values), expected, atol=1e-6)
    model.save_pretrained(tmp_path / "saved")
    loaded = ZoobotModel.from_pretrained(tmp_path / "saved")
    assert torch.allclose(embeddings_of(loaded, pixel_values), expected, atol=1e-6)


def test_an_encoder_without_a_pooled_output_is_read_by_its_mean_and_the_log_says_so(pixel_values, tmp_path, caplog):
    encoder = PoolFormerModel(PoolFormerConfig(depths=[1, 1, 1, 1], hidden_sizes=[8, 8, 8, 24])).eval()
    encoder.save_pretrained(tmp_path / "encoder")
    with caplog.at_level(logging.INFO, "zoobot_hf"):
        model = ZoobotForImageClassification.from_pretrained(tmp_path / "encoder", label_names=LABELS)
    assert caplog.messages[1:] == [
        "The encoder has no pooled output: its embedding is the mean of its tokens or pixels.",
        "The linear head is new, to be trained: not ring, ring.",
    ]
    with torch.no_grad():
        expected = encoder(pixel_values).last_hidden_state.mean(dim=(2, 3))
    model.save_pretrained(tmp_path / "saved")
    for each in (model, ZoobotForImageClassification.from_pretrained(tmp_path / "saved")):
        assert (each.config.pooling, each.config.embedding_size) == ("mean", 24)
        assert torch.allclose(embeddings_of(each, pixel_values), expected, atol=1e-6)


def test_positions_that_an_encoder_keeps_for_the_whole_process_are_no_dry_runs(pixel_values, tmp_path):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = BeitConfig(**sizes, image_size=32, patch_size=8, use_relative_position_bias=True)
    encoder = BeitModel(config).eval()
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter)
    encoder.save_pretrained(tmp_path)
    loaded = embeddings_of(ZoobotModel.from_pretrained(tmp_path), pixel_values)
    with torch.no_grad():
        assert torch.equal(loaded, encoder(pixel_values).pooler_output)


def test_what_no_dry_run_can_find_is_taken_as_given(vit_model, monkeypatch, tmp_path):
    vit_model.encoder.save_pretrained(tmp_path)
    monkeypatch.setattr(ViTModel, "forward", lambda *_: pytest.fail("the encoder was run"))
    model = ZoobotModel.from_pretrained(tmp_path, pooling="first_token", embedding_size=16)
    assert (model.config.pooling, model.config.embedding_size) == ("first_token", 16)


def test_fields_of_the_configuration_can_be_given(timm_folder):
    fields = {"head_type": "mlp", "head_hidden_size": 9, "problem_type": "regression", "unit_interval": True}
    model = ZoobotForImageClassification.from_pretrained(timm_folder, num_labels=3, **fields)
    assert {name: getattr(model.config, name) for name in fields} == fields
    assert model.head[-1].weight.shape == (3, 9)


# Errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("argument", ["head_dropuot", "ignore_mismatched_sizes"])
def test_an_argument_that_nothing_takes_is_named(argument, timm_folder):
    with pytest.raises(ValueError, match=f"from_pretrained got {argument}; for an encoder it takes dtype, label_names"):
        ZoobotForImageClassification.from_pretrained(timm_folder, **{argument: 1})


def test_a_configuration_of_ours_does_not_fit_a_foreign_encoder(timm_folder, layer_norm_model):
    with pytest.raises(ValueError, match="from_pretrained got config; for an encoder it takes"):
        ZoobotForImageClassification.from_pretrained(timm_folder, config=layer_norm_model.config)


class Callout:
    def __reduce__(self):
        return print, ("code from a checkpoint was run",)


def test_a_bin_file_with_an_object_in_it_is_refused_and_its_code_not_run(bin_folder, resnet, tmp_path, capsys):
    folder = write_timm_layout(tmp_path / "encoder", resnet, architecture="test_resnet", weights="pytorch_model.bin")
    torch.save({**resnet.state_dict(), "surprise": Callout()}, folder / "pytorch_model.bin")
    with pytest.raises(
        ValueError, match=r"pytorch_model\.bin, are damaged or hold other objects, whose code is never run"
    ):
        ZoobotModel.from_pretrained(folder)
    assert "code from a checkpoint" not in capsys.readouterr().out


def test_an_object_in_the_bin_file_of_a_transformers_repository_is_refused_too(layer_norm_model, tmp_path, capsys):
    encoder = ConvNextModel(layer_norm_model.config.encoder_config)
    encoder.config.save_pretrained(tmp_path)
    torch.save({**encoder.state_dict(), "surprise": Callout()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(
        ValueError, match=r"pytorch_model\.bin, are damaged or hold other objects, whose code is never run"
    ):
        ZoobotModel.from_pretrained(tmp_path)
    assert "code from a checkpoint" not in capsys.readouterr().out


@pytest.mark.parametrize("ending", ["bin", "safetensors"])
def test_a_damaged_file_of_several_is_refused(ending, layer_norm_model, tmp_path, capsys):
    encoder = ConvNextModel(layer_norm_model.config.encoder_config)
    encoder.save_pretrained(tmp_path, max_shard_size="10KB")
    paths = sorted(tmp_path.glob("model-*.safetensors"))
    if ending == "bin":
        for path in paths:
            torch.save(load_file(path), path.with_name(f"pytorch_{path.stem}.bin"))
            path.unlink()
        index = (tmp_path / "model.safetensors.index.json").read_text().replace("model-", "pytorch_model-")
        (tmp_path / "pytorch_model.bin.index.json").write_text(index.replace(".safetensors", ".bin"))
        (tmp_path / "model.safetensors.index.json").unlink()
    assert_same_weights(ZoobotModel.from_pretrained(tmp_path).encoder, encoder)
    damaged = sorted(tmp_path.glob(f"*model-*.{ending}"))[1]
    torch.save({"surprise": Callout()}, damaged)
    with pytest.raises(ValueError, match=rf"the model's weights, {damaged.name}, are damaged"):
        ZoobotModel.from_pretrained(tmp_path)
    assert "code from a checkpoint" not in capsys.readouterr().out
    damaged.unlink()
    with pytest.raises(ValueError, match=rf"the model's weights, {damaged.name}, are missing; copy or download them"):
        ZoobotModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("content", [b"", b"not weights", b"PK\x03\x04" + b"\0" * 40])
def test_a_damaged_bin_file_is_refused(content, resnet, tmp_path):
    folder = write_timm_layout(tmp_path / "encoder", resnet, architecture="test_resnet", weights="pytorch_model.bin")
    (folder / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(ValueError, match=r"pytorch_model\.bin, are damaged or hold other objects"):
        ZoobotModel.from_pretrained(folder)


def test_weights_inside_another_object_are_refused(resnet, tmp_path):
    folder = write_timm_layout(tmp_path / "encoder", resnet, architecture="test_resnet", weights="pytorch_model.bin")
    torch.save({"state_dict": resnet.state_dict(), "epoch": 3}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin does not hold tensors by name and nothing else"):
        ZoobotModel.from_pretrained(folder)


@pytest.mark.parametrize("share", [0, 0.001, 0.5])
def test_a_damaged_safetensors_file_is_refused(share, resnet, tmp_path):
    folder = write_timm_layout(tmp_path / "encoder", resnet, architecture="test_resnet")
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=r"weights, model\.safetensors, are damaged \(.*\); copy or download them"):
        ZoobotModel.from_pretrained(folder)


@pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin"])
def test_a_checkpoint_that_lacks_weights_is_refused(weights, resnet, tmp_path):
    incomplete = tiny_timm("test_resnet")
    incomplete.layer4 = nn.Identity()
    folder = write_timm_layout(tmp_path / "encoder", incomplete, architecture="test_resnet", weights=weights)
    with pytest.raises(ValueError, match=r"the checkpoint of encoder lacks \d+ of the model's weights .*layer4"):
        ZoobotModel.from_pretrained(folder)


def test_weights_of_another_shape_are_refused(resnet, tmp_path):
    folder = write_timm_layout(tmp_path / "encoder", resnet, architecture="test_resnet")
    weights = load_file(folder / "model.safetensors")
    weights["layer4.0.conv1.weight"] = torch.zeros(5, 4, 3, 3)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ValueError,
        match=r"lacks 1 of the model's weights .* \(timm_model\.layer4\.0\.conv1\.weight\); config\.json and",
    ):
        ZoobotModel.from_pretrained(folder)


def test_a_folder_without_weights_says_so(timm_folder, tmp_path):
    (tmp_path / "config.json").write_text((timm_folder / "config.json").read_text())
    with pytest.raises(OSError, match=r"no file named model\.safetensors, or pytorch_model\.bin"):
        ZoobotModel.from_pretrained(tmp_path)


def test_a_folder_without_a_configuration_says_so(tmp_path):
    with pytest.raises(OSError, match=r"holds no config\.json; give a folder or a repository with a saved model"):
        ZoobotModel.from_pretrained(tmp_path)


@pytest.mark.parametrize(("content", "message"), [("{", "is not JSON: "), ("[1]", "is no JSON object")])
def test_a_configuration_that_is_none_says_so(content, message, tmp_path):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(OSError, match=message):
        ZoobotModel.from_pretrained(tmp_path)


def test_a_model_without_images_is_no_encoder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vision-encoder-decoder"}))
    with pytest.raises(ValueError, match="'vision-encoder-decoder'"):
        ZoobotModel.from_pretrained(tmp_path)


def test_code_of_a_repository_is_not_run(timm_folder, tmp_path):
    auto_map = {"AutoConfig": "mine.MyConfig", "AutoModel": "mine.MyModel"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mine", "auto_map": auto_map}))
    (tmp_path / "mine.py").write_text("raise SystemExit('code from a repository was run')")
    with pytest.raises(ValueError, match=r"trust_remote_code|custom code|does not recognize"):
        ZoobotModel.from_pretrained(tmp_path)


# The Hub --------------------------------------------------------------------------------------------------------


@pytest.fixture
def conversions(monkeypatch):
    """The names that were sent to the conversion service, which is allowed here as it is for users."""
    sent = []
    monkeypatch.delenv("DISABLE_SAFETENSORS_CONVERSION")
    monkeypatch.setattr(transformers.modeling_utils, "auto_conversion", lambda name, **keywords: sent.append(name))
    return sent


def test_transformers_alone_would_send_a_bin_repository_to_the_conversion_service(
    conversions, layer_norm_model, upload, repo_id, tmp_path
):
    encoder = ConvNextModel(layer_norm_model.config.encoder_config)
    encoder.config.save_pretrained(tmp_path)
    torch.save(encoder.state_dict(), tmp_path / "pytorch_model.bin")
    ConvNextModel.from_pretrained(upload(repo_id, tmp_path))
    for thread in threading.enumerate():
        if thread.name == "Thread-auto_conversion":
            thread.join()
    assert conversions == [repo_id]


@pytest.mark.parametrize("revision", [None, "main"])
def test_a_bin_repository_is_loaded_without_the_conversion_service(
    revision, conversions, bin_folder, resnet, pixel_values, hub, hub_token, upload, repo_id, tmp_path
):
    upload(repo_id, bin_folder)
    before = set(threading.enumerate())
    arguments = {"revision": revision, "token": hub_token, "cache_dir": tmp_path}
    model = ZoobotForImageClassification.from_pretrained(repo_id, label_names=LABELS, **arguments)
    assert_equal_to_timm(model, resnet, pixel_values)
    assert model.config.encoder_name == repo_id
    assert conversions == []
    assert not [t for t in set(threading.enumerate()) - before if "conversion" in t.name]
    assert {request.method for request in hub.requests} <= {"GET", "HEAD"}
    assert hub.count("GET", "discussions|commits|pytorch_model.*safetensors") == 0
    assert hub.count("HEAD", r"pytorch_model\.bin") == 1


def test_only_safetensors_are_downloaded_where_there_are_any(timm_folder, bin_folder, hub, upload, repo_id, tmp_path):
    folder = tmp_path / "both"
    folder.mkdir()
    for file in (*timm_folder.iterdir(), bin_folder / "pytorch_model.bin"):
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "notes.txt").write_text("not needed")
    ZoobotModel.from_pretrained(upload(repo_id, folder))
    assert hub.count("GET", r"\.bin|notes\.txt") == 0


def test_a_cached_encoder_is_loaded_without_the_network(timm_folder, resnet, pixel_values, hub, upload, repo_id):
    ZoobotModel.from_pretrained(upload(repo_id, timm_folder))
    hub.forget()
    assert_equal_to_timm(ZoobotModel.from_pretrained(repo_id, local_files_only=True), resnet, pixel_values)
    assert hub.requests == []


def test_a_revision_is_the_one_that_is_loaded(timm_folder, hub, hub_token, upload, repo_id, tmp_path):
    upload(repo_id, timm_folder)
    first = hub.commits(repo_id)[0].oid
    other = write_timm_layout(tmp_path / "other", tiny_timm("test_convnext"), architecture="test_convnext")
    HfApi(endpoint=hub.url, token=hub_token).upload_folder(repo_id=repo_id, folder_path=other)
    assert ZoobotModel.from_pretrained(repo_id).config.encoder_config.architecture == "test_convnext"
    assert ZoobotModel.from_pretrained(repo_id, revision=first).config.encoder_config.architecture == "test_resnet"


def test_an_unknown_repository_is_one_clear_line(hub):
    with pytest.raises(OSError, match="'astronomer/nothing' is neither a folder here nor a repository on the Hub") as e:
        ZoobotModel.from_pretrained("astronomer/nothing")
    assert "\n" not in str(e.value)


def test_an_unknown_revision_is_one_clear_line(timm_folder, upload, repo_id):
    upload(repo_id, timm_folder)
    with pytest.raises(OSError, match=f"'{repo_id}' has no revision 'v9'; see its branches and tags") as e:
        ZoobotModel.from_pretrained(repo_id, revision="v9")
    assert "\n" not in str(e.value)


def test_no_network_and_nothing_cached_is_one_clear_line(tmp_path):
    message = "'astronomer/encoder' is no folder here, is not in the cache, and the Hub could not be reached"
    with pytest.raises(OSError, match=message) as e:
        ZoobotModel.from_pretrained("astronomer/encoder", local_files_only=True, cache_dir=tmp_path)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (401, r"the Hub refused the token; log in again with `hf auth login`\.$"),
        (403, r"the Hub refused it \(.*Failed as the test wanted.*\); try again in a while or download it first\.$"),
        (429, r"the Hub refused it \(.*\b429\b.*\); try again in a while or download it first\.$"),
        (500, r"the Hub refused it \(.*\b500\b.*\); try again in a while or download it first\.$"),
    ],
)
def test_a_hub_that_fails_is_one_clear_line(status, message, hub, tmp_path):
    hub.fail_next("GET|HEAD", status=status, times=50)
    with pytest.raises(OSError, match=message) as e:
        ZoobotModel.from_pretrained("astronomer/encoder", cache_dir=tmp_path)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("name", ["a folder/that is/not there", "/nowhere/encoder", "../encoder", "a/b/c", "-"])
def test_a_name_that_cannot_be_is_one_clear_line(name):
    with pytest.raises(OSError, match="is neither a folder here nor a Hub id of the form user/name") as e:
        ZoobotModel.from_pretrained(name)
    assert "\n" not in str(e.value)


def test_a_private_encoder_needs_a_token(timm_folder, resnet, pixel_values, hub_token, upload, repo_id):
    upload(repo_id, timm_folder, private=True)
    with pytest.raises(OSError, match="log in with `hf auth login` if it is private"):
        ZoobotForImageClassification.from_pretrained(repo_id, label_names=LABELS)
    model = ZoobotForImageClassification.from_pretrained(repo_id, label_names=LABELS, token=hub_token)
    assert_equal_to_timm(model, resnet, pixel_values)


def test_a_gated_encoder_says_where_to_ask_for_it(timm_folder, hub, hub_token, upload, repo_id, tmp_path):
    upload(repo_id, timm_folder)
    HfApi(endpoint=hub.url, token=hub_token).update_repo_settings(repo_id, gated="manual")
    for token in (False, hub.tokens["visitor"]):
        with pytest.raises(OSError, match=f"'{repo_id}' is gated; ask for access on its page, and log in with"):
            ZoobotModel.from_pretrained(repo_id, token=token, cache_dir=tmp_path)


@pytest.fixture
def finetuned(layer_norm_model, processor, tmp_path):
    layer_norm_model.save_pretrained(tmp_path / "finetuned")
    processor.save_pretrained(tmp_path / "finetuned")
    return tmp_path / "finetuned"


@pytest.mark.parametrize("private", [False, True])
def test_a_finetuned_model_is_loaded_by_its_id(
    private, finetuned, layer_norm_model, processor, galaxy_images, hub_token, upload, repo_id
):
    upload(repo_id, finetuned, private=private)
    token = hub_token if private else None
    for auto_class in (AutoModelForImageClassification, ZoobotForImageClassification):
        assert_same_weights(auto_class.from_pretrained(repo_id, token=token), layer_norm_model)
    classify = pipeline("image-classification", model=repo_id, token=token, device="cpu")
    said = {entry["label"]: entry["score"] for entry in classify(galaxy_images[0])}
    logits = layer_norm_model(pixel_values=processor(galaxy_images[0])["pixel_values"]).logits
    assert said == pytest.approx(dict(zip(LABELS, logits.softmax(-1)[0].tolist(), strict=True)), abs=1e-6)


def test_a_finetuned_model_of_the_hub_gets_another_head(finetuned, layer_norm_model, upload, repo_id):
    upload(repo_id, finetuned)
    model = ZoobotForImageClassification.from_pretrained(repo_id, label_names=["a", "b", "c"])
    assert_same_weights(model.encoder, layer_norm_model.encoder)
    assert model.config.label_names == ["a", "b", "c"]
    assert model.config.encoder_name == repo_id


@pytest.mark.parametrize("is_on_the_hub", [False, True])
@pytest.mark.parametrize("has_another_model_above", [False, True])
def test_a_subfolder_has_configuration_weights_and_processor(
    has_another_model_above, is_on_the_hub, finetuned, batch_norm_model, hub, upload, repo_id, tmp_path
):
    folder = finetuned if has_another_model_above else tmp_path / "empty"
    batch_norm_model.config.calibration_temperature = 0.5
    batch_norm_model.save_pretrained(folder / "stages/frozen")
    batch_norm_model.save_pretrained(folder / "stages/frozen/best")
    ZoobotImageProcessor(40).save_pretrained(folder / "stages/frozen")
    place = {"pretrained_model_name_or_path": upload(repo_id, folder) if is_on_the_hub else folder}
    place["subfolder"] = "stages/frozen"
    for auto_class in (ZoobotForImageClassification, AutoModelForImageClassification):
        model = auto_class.from_pretrained(**place)
        assert_same_weights(model, batch_norm_model)
        assert model.config.calibration_temperature == 0.5
    assert ZoobotImageProcessor.from_pretrained(**place).pixels == 40
    assert image_processor_for(place["pretrained_model_name_or_path"], subfolder="stages/frozen").pixels == 40
    assert all("stages/frozen/model" in request.target for request in hub.requests if "safetensors" in request.target)
    if is_on_the_hub and has_another_model_above:
        hub.forget()
        assert (
            ZoobotModel.from_pretrained(place["pretrained_model_name_or_path"]).config.calibration_temperature is None
        )
        assert hub.count("GET", "/resolve/.*safetensors") + hub.count("HEAD", "/resolve/.*safetensors") > 0
        assert not [request for request in hub.requests if "stages" in request.target]


@pytest.mark.parametrize("is_on_the_hub", [False, True])
def test_messages_name_the_subfolder_and_the_encoder_is_the_repositorys(
    is_on_the_hub, finetuned, layer_norm_model, upload, repo_id, caplog
):
    layer_norm_model.save_pretrained(finetuned / "frozen")
    place = upload(repo_id, finetuned) if is_on_the_hub else finetuned
    repository = repo_id if is_on_the_hub else "finetuned"
    with caplog.at_level(logging.INFO, "zoobot_hf"):
        model = ZoobotForImageClassification.from_pretrained(place, subfolder="frozen", label_names=["a", "b", "c"])
    assert caplog.messages[0] == f"Loaded the encoder of {repository}/frozen; its old head was left out."
    assert model.config.encoder_name == repository
    with pytest.raises(OSError, match=r"unfrozen holds no config\.json"):
        ZoobotModel.from_pretrained(place, subfolder="unfrozen")


# Image processors -----------------------------------------------------------------------------------------------


def test_a_finetuned_models_own_processor_is_taken(finetuned, caplog):
    ZoobotImageProcessor(40, zoom=1.7, rescale_factor=1 / 255**2).save_pretrained(finetuned)
    processor = image_processor_for(finetuned)
    assert (processor.pixels, processor.zoom, processor.rescale_factor) == (40, 1.7, 1 / 255**2)
    assert processor.fits_bands is None
    changed = image_processor_for(finetuned, zoom=2.5, fits_bands=["0:2"])
    assert (changed.pixels, changed.zoom, changed.fits_bands) == (40, 2.5, ["0:2"])
    assert not caplog.text
    (finetuned / "preprocessor_config.json").unlink()
    with pytest.raises(OSError, match=r"finetuned holds a model without its image processor; save that beside it with"):
        image_processor_for(finetuned)


def test_a_finetuned_models_processor_is_taken_from_the_hub(finetuned, hub_token, upload, repo_id):
    upload(repo_id, finetuned, private=True)
    assert image_processor_for(repo_id, token=hub_token).pixels == 32


def test_what_timms_layout_states_is_not_applied_and_a_warning_says_so(timm_folder, caplog):
    processor = image_processor_for(timm_folder)
    assert (processor.pixels, processor.zoom, processor.do_normalize) == (32, DEFAULT_ZOOM, False)
    assert processor.rescale_factor == 1 / 255
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "which is not applied: Galaxy Zoo's encoders take RGB in 0-1" in caplog.text
    assert "[0.485, 0.456, 0.406]" in caplog.text


def test_no_normalisation_is_no_warning(timm_folder, caplog):
    assert not image_processor_for(timm_folder, normalization="none").do_normalize
    assert caplog.records == []


def test_what_the_encoder_states_is_applied_when_asked(timm_folder, caplog):
    processor = image_processor_for(timm_folder, normalization="encoder", zoom=1)
    assert processor.do_normalize
    assert (processor.image_mean, processor.image_std) == (IMAGENET["mean"], IMAGENET["std"])
    assert processor.zoom == 1
    assert caplog.records == []


@pytest.fixture
def transformers_folder(layer_norm_model, tmp_path):
    ConvNextModel(layer_norm_model.config.encoder_config).save_pretrained(tmp_path / "convnext")
    settings = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    sizes = {"size": {"shortest_edge": 48}, "crop_size": {"height": 40, "width": 40}}  # and 32 in its configuration
    BitImageProcessor(**settings, **sizes).save_pretrained(tmp_path / "convnext")
    return tmp_path / "convnext"


def change(path, **settings):
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


@pytest.mark.parametrize("normalization", ["auto", "encoder"])
def test_what_a_transformers_repository_states_is_applied(normalization, transformers_folder, caplog):
    processor = image_processor_for(transformers_folder, normalization=normalization)
    assert processor.pixels == 40
    assert (processor.image_mean, processor.image_std) == ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
    assert processor.do_normalize
    assert caplog.records == []


@pytest.mark.parametrize(
    ("stated", "image_size", "pixels"),
    [
        ({}, 32, 40),
        ({"crop_size": 36}, 32, 36),
        ({"do_center_crop": False}, 32, 48),
        ({"crop_size": None, "size": {"height": 44, "width": 44}}, 32, 44),
        ({"crop_size": None, "size": 44}, 32, 44),
        ({"crop_size": None, "size": None}, 32, 32),
        ({"crop_size": None, "size": None}, [28, 28], 28),
        ({"crop_size": None, "size": {"height": 44, "width": 40}}, [28, 24], 224),
    ],
)
def test_the_size_is_what_the_repositorys_own_processor_gives(stated, image_size, pixels, transformers_folder):
    change(transformers_folder / "preprocessor_config.json", **stated)
    change(transformers_folder / "config.json", image_size=image_size)
    assert image_processor_for(transformers_folder).pixels == pixels


@pytest.mark.parametrize(
    ("stated", "named"),
    [
        ({"rescale_factor": 1 / 127.5, "rescale_offset": True}, "rescale_factor 0.00784.*, rescale_offset True"),
        ({"do_rescale": False}, "do_rescale False"),
        ({"do_flip_channel_order": True}, "do_flip_channel_order True"),
    ],
)
def test_values_that_our_processor_does_not_give_are_refused(stated, named, transformers_folder):
    change(transformers_folder / "preprocessor_config.json", **stated)
    for normalization in ("auto", "encoder"):
        with pytest.raises(ValueError, match=rf"of .*convnext has {named}, and ZoobotImageProcessor gives RGB in 0-1"):
            image_processor_for(transformers_folder, normalization=normalization)
    assert image_processor_for(transformers_folder, normalization="none").rescale_factor == 1 / 255


@pytest.mark.parametrize("factor", [1 / 255, 0.003921568859368563, None])
def test_a_factor_of_1_over_255_is_ours_in_any_precision(factor, transformers_folder):
    change(transformers_folder / "preprocessor_config.json", rescale_factor=factor, rescale_offset=False)
    assert image_processor_for(transformers_folder).rescale_factor == 1 / 255


def test_a_transformers_repositorys_normalisation_can_be_left_out(transformers_folder):
    assert not image_processor_for(transformers_folder, normalization="none").do_normalize


def test_a_repository_that_does_not_normalise_is_taken_at_its_word(transformers_folder):
    change(transformers_folder / "preprocessor_config.json", do_normalize=False)
    assert not image_processor_for(transformers_folder).do_normalize


def test_a_normalisation_that_is_not_stated_cannot_be_applied(transformers_folder):
    (transformers_folder / "preprocessor_config.json").unlink()
    assert not image_processor_for(transformers_folder).do_normalize
    assert image_processor_for(transformers_folder).pixels == 32
    with pytest.raises(ValueError, match="states no mean and standard deviation; choose normalization none"):
        image_processor_for(transformers_folder, normalization="encoder")


def test_another_normalisation_is_refused(timm_folder):
    with pytest.raises(ValueError, match="normalization is 'imagenet'; choose one of auto, none, encoder"):
        image_processor_for(timm_folder, normalization="imagenet")


# The real Hub ---------------------------------------------------------------------------------------------------


@pytest.mark.network
def test_which_input_scale_of_the_published_encoder_separates_rings_better(rings_folder):
    """Its training may have divided by 255 twice; the better of the two scales is the processor's default."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import cross_val_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    from zoobot_hf import read_galaxies
    from zoobot_hf.data.images import open_image

    name = "mwalmsley/zoobot-encoder-convnext_nano"
    catalog = read_galaxies(rings_folder)
    model = ZoobotModel.from_pretrained(name)
    processor = image_processor_for(name, normalization="none")
    crops = [processor.crop_and_resize(open_image(path)) for path in catalog["file_loc"]]
    separator = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=1000))
    scores = {}
    for scale_name, scale in {"1/255": 1 / 255, "1/255**2": 1 / 255**2}.items():
        processor.rescale_factor = scale
        batches = [processor.rescale_and_normalize(torch.stack(crops[i : i + 32])) for i in range(0, len(crops), 32)]
        embeddings = torch.cat([embeddings_of(model, batch) for batch in batches]).numpy()
        scores[scale_name] = cross_val_score(separator, embeddings, catalog["ring"], cv=5, scoring="roc_auc").mean()
    print("ROC AUC of rings by input scale:", {name: round(float(score), 3) for name, score in scores.items()})
    assert max(scores, key=scores.get) == "1/255"
