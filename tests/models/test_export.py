import copy
import json
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
from processes import run_without
from safetensors.torch import save_file
from tiny_models import ENCODERS, with_decided_head
from transformers import AutoImageProcessor, AutoModelForImageClassification, Dinov2Config
from transformers.models.timm_wrapper.configuration_timm_wrapper import TimmWrapperConfig

from zoobot_hf import ZoobotConfig, ZoobotForImageClassification, ZoobotImageProcessor
from zoobot_hf.cli import main
from zoobot_hf.models import export
from zoobot_hf.models.export import ExportError, export_to_onnx, export_to_transformers, to_transformers

LABELS = {"id2label": {0: "not ring", 1: "ring"}, "label2id": {"not ring": 0, "ring": 1}}
DINO = Dinov2Config(
    hidden_size=16, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2, image_size=32, patch_size=8
)
TIMM_CONVNEXT = {
    "architecture": "convnext_atto",
    "num_classes": 0,
    "pretrained_cfg": {"input_size": [3, 32, 32], "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]},
    "model_args": {"depths": [1, 1, 2, 1], "dims": [8, 16, 16, 24]},
}


def make_model(name):
    """A model with new weights, none of them zero or one, for each encoder that has a plain class."""
    encoder, pooling = {
        "convnext": (ENCODERS["layer_norm"], "pooler"),
        "resnet": (ENCODERS["batch_norm"], "pooler"),
        "vit": (ENCODERS["vit"], "first_token"),
        "dinov2": (DINO, "pooler"),
        "timm": (ENCODERS["timm"], "pooler"),
        "timm convnext": (TimmWrapperConfig.from_dict(copy.deepcopy(TIMM_CONVNEXT)), "pooler"),
        "timm convnext, linear": (
            TimmWrapperConfig.from_dict(
                {**TIMM_CONVNEXT, "model_args": {**TIMM_CONVNEXT["model_args"], "conv_mlp": False}}
            ),
            "pooler",
        ),
    }[name]
    torch.manual_seed(0)
    model = ZoobotForImageClassification(ZoobotConfig(encoder, pooling=pooling, **LABELS)).eval()
    for value in (*model.parameters(), *model.buffers()):
        if value.dtype == torch.float32:
            value.data += 0.1 * torch.rand_like(value) - 0.05  # equal or zero weights would hide a wrong order
    return model


NAMES = ("convnext", "resnet", "vit", "dinov2", "timm", "timm convnext", "timm convnext, linear")


@pytest.fixture(scope="session")
def pixel_values():
    return torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def logits_of(model, pixel_values):
    with torch.no_grad():
        return model(pixel_values=pixel_values).logits


# Plain transformers


@pytest.mark.parametrize("name", NAMES)
def test_a_plain_checkpoint_gives_the_same_logits(name, pixel_values, processor, tmp_path):
    model = make_model(name)
    difference = export_to_transformers(model, processor, tmp_path / "plain", pixel_values=pixel_values)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "plain").eval()
    expected = logits_of(model, pixel_values)
    assert expected.std() > 1e-3
    torch.testing.assert_close(logits_of(loaded, pixel_values), expected, atol=1e-4, rtol=0)
    assert 0 <= difference <= 1e-4
    assert type(loaded).__module__.startswith("transformers.")
    assert loaded.config.id2label == LABELS["id2label"]


def calibrated_model(name):
    model = make_model(name)
    model.config.calibration_temperature, model.config.calibration_shift = 1.7, [0.2, -0.1]
    model.config.training_prevalence = {"not ring": 0.5, "ring": 0.5}
    model.config.sky_prevalence = {"not ring": 0.9, "ring": 0.1}
    model.config.predictions_for = "sky"
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", ["convnext", "timm"])
def test_a_plain_checkpoint_has_the_calibration_in_its_weights(name, dtype, pixel_values, processor, tmp_path):
    model = calibrated_model(name).to(dtype)
    export_to_transformers(model, processor, tmp_path / "plain", pixel_values=pixel_values)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "plain").eval()
    assert loaded.dtype == torch.float32
    raw = make_model(name).to(dtype).float()
    expected = logits_of(raw, pixel_values) / 1.7 + torch.tensor([0.2, -0.1]) + torch.tensor([1.8, 0.2]).log()
    torch.testing.assert_close(logits_of(loaded, pixel_values), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["timm convnext", "timm convnext, linear"])
def test_a_convnext_from_timm_becomes_transformers_own(name):
    plain = to_transformers(make_model(name))
    assert plain.config.model_type == "convnext"
    assert (plain.config.depths, plain.config.hidden_sizes) == ([1, 1, 2, 1], [8, 16, 16, 24])


@pytest.mark.parametrize(
    ("architecture", "arguments"),
    [
        ("convnext_atto_ols", {}),
        ("convnext_atto", {"kernel_sizes": 3}),
        ("convnext_atto", {"use_grn": True}),
        ("convnext_atto", {"head_norm_first": True}),
    ],
)
def test_a_convnext_that_transformers_lacks_stays_with_timm(architecture, arguments, pixel_values):
    sizes = {"depths": [1, 1, 1, 1], "dims": [8, 8, 8, 8], **arguments}
    encoder = TimmWrapperConfig.from_dict({**TIMM_CONVNEXT, "architecture": architecture, "model_args": sizes})
    model = with_decided_head(ZoobotForImageClassification(ZoobotConfig(encoder, **LABELS)).eval())
    plain = to_transformers(model)
    assert plain.config.model_type == "timm_wrapper"
    torch.testing.assert_close(logits_of(plain, pixel_values), logits_of(model, pixel_values))


@pytest.mark.parametrize("name", ["convnext", "timm"])
def test_the_image_processor_of_a_plain_checkpoint_does_nearly_the_same(name, pixel_values, galaxy_images, tmp_path):
    processor = ZoobotImageProcessor(32, zoom=1.5)
    export_to_transformers(make_model(name), processor, tmp_path / "plain", pixel_values=pixel_values)
    plain = AutoImageProcessor.from_pretrained(tmp_path / "plain")(galaxy_images, return_tensors="pt")["pixel_values"]
    expected = processor(galaxy_images)["pixel_values"]
    assert plain.shape == expected.shape
    assert (plain - expected).abs().mean() < 0.004  # one of 255


def test_timm_takes_the_same_crop_at_the_size_of_its_tests(pixel_values, tmp_path):
    processor = ZoobotImageProcessor(32, zoom=1.5)
    export_to_transformers(make_model("timm"), processor, tmp_path / "plain", pixel_values=pixel_values)
    settings = json.loads((tmp_path / "plain/config.json").read_text())["pretrained_cfg"]
    for is_for_tests in (False, True):
        found = timm.data.resolve_data_config(pretrained_cfg=settings, use_test_size=is_for_tests)
        assert (tuple(found["input_size"]), found["crop_pct"]) == ((3, 32, 32), pytest.approx(1 / 1.5))


@pytest.mark.slow
def test_a_plain_convnext_runs_without_zoobot_hf_and_timm(pixel_values, processor, galaxy_images, tmp_path):
    for name in ("convnext", "timm convnext"):
        model, folder = make_model(name), tmp_path / name
        export_to_transformers(model, processor, folder, pixel_values=pixel_values)
        save_file({"pixel_values": pixel_values, "logits": logits_of(model, pixel_values)}, folder / "expected.st")
    galaxy_images[0].save(tmp_path / "galaxy.png")
    script = """
        import sys
        import torch
        from safetensors.torch import load_file
        from transformers import AutoModelForImageClassification, pipeline
        for name in ("convnext", "timm convnext"):
            folder = sys.argv[1] + "/" + name
            expected = load_file(folder + "/expected.st")
            model = AutoModelForImageClassification.from_pretrained(folder).eval()
            with torch.no_grad():
                difference = (model(expected["pixel_values"]).logits - expected["logits"]).abs().max()
            assert difference < 1e-4, difference
            answers = pipeline("image-classification", model=folder, device="cpu")(sys.argv[1] + "/galaxy.png")
            print(sorted(answer["label"] for answer in answers))
    """
    output = run_without(("zoobot_hf", "timm"), script, tmp_path)
    assert output.splitlines() == ["['not ring', 'ring']"] * 2


# ONNX


@pytest.mark.parametrize(
    "name", ["resnet", *(pytest.param(name, marks=pytest.mark.slow) for name in ("convnext", "vit", "timm"))]
)
def test_onnx_gives_the_same_logits_for_any_batch(name, pixel_values, processor, tmp_path):
    model, folder = make_model(name), tmp_path / "onnx"
    difference = export_to_onnx(model, processor, folder, pixel_values=pixel_values)
    assert 0 <= difference <= 1e-4
    expected = logits_of(model, pixel_values).numpy()
    np.save(folder / "pixel_values.npy", pixel_values.numpy())
    script = """
        import sys, json
        import numpy as np
        import onnxruntime
        session = onnxruntime.InferenceSession(sys.argv[1] + "/model.onnx")
        images = np.load(sys.argv[1] + "/pixel_values.npy")
        logits = [session.run(["logits"], {"pixel_values": images[:count]})[0].tolist() for count in (1, 3, 6)]
        print(json.dumps([logits, json.loads(session.get_modelmeta().custom_metadata_map["labels"])]))
    """
    logits, labels = json.loads(run_without(("zoobot_hf", "timm", "torch", "transformers"), script, folder))
    for given in logits:
        np.testing.assert_allclose(given, expected[: len(given)], atol=1e-4, rtol=0)
    assert labels == ["not ring", "ring"]
    assert {path.name for path in folder.iterdir()} >= {"model.onnx", "config.json", "preprocessor_config.json"}
    onnx.checker.check_model(str(folder / "model.onnx"))


@pytest.mark.slow
def test_onnx_has_the_calibration_in_its_graph(pixel_values, processor, tmp_path):
    model = calibrated_model("resnet")
    export_to_onnx(model, processor, tmp_path / "onnx", pixel_values=pixel_values)
    session = onnxruntime.InferenceSession(str(tmp_path / "onnx" / "model.onnx"))
    logits = torch.from_numpy(session.run(["logits"], {"pixel_values": pixel_values.numpy()})[0])
    raw = logits_of(make_model("resnet"), pixel_values)
    expected = raw / 1.7 + torch.tensor([0.2, -0.1]) + torch.tensor([1.8, 0.2]).log()
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


def test_onnx_takes_what_transformers_has_no_class_for(vit_model, pixel_values, processor, tmp_path):
    vit_model.config.pooling = "mean"
    with pytest.raises(ExportError, match="no class for a 'vit' encoder read by 'mean'; choose format onnx"):
        to_transformers(vit_model)
    assert export_to_onnx(vit_model, processor, tmp_path / "onnx", pixel_values=pixel_values) < 1e-4


# What can't be


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head_type": "mlp"}, "no class for a head of type 'mlp'; choose format onnx, or push with the model's code"),
        ({"problem_type": "regression", "unit_interval": True}, "no class for a regression with unit_interval"),
    ],
)
def test_a_head_that_transformers_lacks_is_named(changes, message):
    model = ZoobotForImageClassification(ZoobotConfig(ENCODERS["batch_norm"], **LABELS, **changes))
    with pytest.raises(ExportError, match=message):
        to_transformers(model)


def test_grey_images_are_refused(layer_norm_model, pixel_values, tmp_path):
    with pytest.raises(ExportError, match="num_channels is 1, and transformers has no image processor for grey"):
        export_to_transformers(
            layer_norm_model, ZoobotImageProcessor(32, num_channels=1), tmp_path / "plain", pixel_values=pixel_values
        )
    assert list(tmp_path.iterdir()) == []


def test_an_export_that_differs_is_refused(layer_norm_model, pixel_values, processor, tmp_path, monkeypatch):
    def spoil(model):
        plain = to_transformers(model)
        plain.classifier.bias.data += 1e-3
        return plain

    monkeypatch.setattr(export, "to_transformers", spoil)
    with pytest.raises(ExportError, match=r"logits differ by 0\.001 from the original's, more than 0\.0001"):
        export_to_transformers(layer_norm_model, processor, tmp_path / "plain", pixel_values=pixel_values)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_files_is_left_alone(layer_norm_model, pixel_values, processor, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    for function in (export_to_transformers, export_to_onnx):
        with pytest.raises(FileExistsError, match="is there and not empty; choose a new folder"):
            function(layer_norm_model, processor, tmp_path, pixel_values=pixel_values)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_without_the_extra_the_error_says_what_to_install(
    layer_norm_model, pixel_values, processor, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ExportError, match=r"ONNX needs more packages \(onnxruntime\): pip install 'zoobot-hf\[onnx\]'"):
        export_to_onnx(layer_norm_model, processor, tmp_path / "onnx", pixel_values=pixel_values)


# The command


@pytest.mark.slow
def test_the_command_exports_and_says_how_well(tmp_path, capsys):
    make_model("timm convnext").save_pretrained(tmp_path / "out")
    ZoobotImageProcessor(32).save_pretrained(tmp_path / "out")
    assert main(["export", str(tmp_path / "out"), "--format", "transformers"]) == 0
    assert main(["export", str(tmp_path / "out"), "--format", "onnx", "--output_dir", str(tmp_path / "other")]) == 0
    output = capsys.readouterr().out
    assert f"transformers  {tmp_path / 'out' / 'transformers'}\nlogits of 14 drawn galaxies differ by at most" in output
    assert json.loads((tmp_path / "out/transformers/config.json").read_text())["model_type"] == "convnext"
    assert (tmp_path / "other/model.onnx").is_file()
    assert main(["export", str(tmp_path / "out"), "--format", "transformers"]) == 1
    assert "is there and not empty; choose a new folder" in capsys.readouterr().err
