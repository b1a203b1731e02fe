"""Finetuned models for those who don't have zoobot_hf: plain transformers checkpoints and ONNX."""

import copy
import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForImageClassification, BitImageProcessor, ConvNextConfig, PreTrainedModel

from .heads import fold_calibration
from .image_processing_zoobot import ZoobotImageProcessor
from .modeling_zoobot import ZoobotForImageClassification

FORMATS = ("transformers", "onnx")
LARGEST_DIFFERENCE = 1e-4
ONNX_FILE = "model.onnx"
# The encoders whose own class for classification has a linear layer on the embedding, by the way that it is read.
POOLINGS_OF_PLAIN_CLASSES = {
    "convnext": ("pooler",),
    "convnextv2": ("pooler",),
    "dinov2": ("pooler", "first_token"),
    "resnet": ("pooler",),
    "timm_wrapper": ("pooler",),
    "vit": ("first_token",),
}
RESAMPLING_NAMES = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}


class ExportError(ValueError):
    """A model that a format can't hold, in one line that says what to do."""


def export_to_transformers(
    model: ZoobotForImageClassification, processor: ZoobotImageProcessor, folder: str | Path, *, pixel_values: Tensor
) -> float:
    """The largest difference of logits between a model and the plain transformers checkpoint that is made of it.

    The calibration, and the shift to the sky's prevalence, are in the weights of its classifier. The checkpoint loads
    with `AutoModelForImageClassification` and `AutoImageProcessor` where zoobot_hf is not installed; a ConvNeXt from
    timm becomes transformers' own, which does without timm. Its image processor resizes the whole image and crops then,
    where zoobot_hf crops first, up to a pixel beside it: a noisy image of 424 pixels, at 224 with a zoom of 1.4,
    differs by 2.4/255 on average and by 16/255 at most. Logits are compared on the same pixels.

    Args:
        model: A finetuned model with a linear head.
        processor: Its image processor.
        folder: Is made here; it may exist if it is empty.
        pixel_values: Galaxies on which the two are compared: float, (batch, channels, height, width).

    Returns:
        At most `LARGEST_DIFFERENCE`, before softmax.

    Raises:
        ExportError: Transformers has no class for this model, or the logits differ by more than that.
        FileExistsError: The folder holds files.
    """
    plain = to_transformers(model)
    with _new_folder(Path(folder)) as unfinished:
        if plain.config.model_type == "timm_wrapper":
            # What TimmWrapperImageProcessor reads; the encoder's own would be ImageNet's left over.
            plain.config.pretrained_cfg = {**(plain.config.pretrained_cfg or {}), **_timm_processing(processor)}
        plain.save_pretrained(unfinished)
        _plain_processor(processor).save_pretrained(unfinished)
        loaded = AutoModelForImageClassification.from_pretrained(str(unfinished), trust_remote_code=False).eval()
        return _compare(model, lambda images: loaded(images).logits, pixel_values)


def export_to_onnx(
    model: ZoobotForImageClassification, processor: ZoobotImageProcessor, folder: str | Path, *, pixel_values: Tensor
) -> float:
    """The largest difference of logits between a model and the ONNX file that is made of it.

    The file takes `pixel_values` in batches of any size and gives `logits`; its metadata hold the labels. The model's
    config.json and preprocessor_config.json lie beside it.

    Args:
        model: A finetuned model.
        processor: Its image processor.
        folder: Is made here; it may exist if it is empty.
        pixel_values: At least two galaxies on which the two are compared: float, (batch, channels, height, width).

    Returns:
        At most `LARGEST_DIFFERENCE`, before softmax; a regression's values as they are.

    Raises:
        ExportError: The extra zoobot_hf[onnx] is not installed, or the logits differ by more than that.
        FileExistsError: The folder holds files.
    """
    try:
        import onnxruntime  # noqa: PLC0415  an optional extra
        import onnxscript  # noqa: F401, PLC0415  torch's exporter needs it
    except ImportError as error:
        raise ExportError(f"ONNX needs more packages ({error.name}): pip install 'zoobot-hf[onnx]'.") from error
    with _new_folder(Path(folder)) as unfinished:
        program = torch.onnx.export(
            _LogitsAlone(model).eval(),
            (pixel_values[:2],),
            input_names=["pixel_values"],
            output_names=["logits"],
            dynamic_shapes={"pixel_values": {0: torch.export.Dim.DYNAMIC}},
            dynamo=True,
            verbose=False,
        )
        assert program is not None
        program.model.metadata_props.update(
            {"labels": json.dumps(model.config.label_names), "problem_type": model.config.problem_type}
        )
        program.save(str(unfinished / ONNX_FILE), external_data=False)
        model.config.save_pretrained(unfinished)
        processor.save_pretrained(unfinished)
        session = onnxruntime.InferenceSession(str(unfinished / ONNX_FILE), providers=["CPUExecutionProvider"])

        def run(images: Tensor) -> Tensor:
            return torch.from_numpy(session.run(["logits"], {"pixel_values": images.numpy()})[0])

        # The exporter saw a batch of two; of one, and of all, the logits must be the same.
        return max(_compare(model, run, batch) for batch in (pixel_values, pixel_values[:1]))


def to_transformers(model: ZoobotForImageClassification) -> PreTrainedModel:
    """The model as transformers' own class for the encoder, in evaluation mode.

    Args:
        model: A finetuned model with a linear head.

    Raises:
        ExportError: Transformers has no class for it; the message says what is in the way.
    """
    linear = _folded_linear_head(model)
    encoder = _timm_convnext_to_transformers(model.encoder) or model.encoder
    config = copy.deepcopy(encoder.config)
    config.id2label, config.label2id = dict(model.config.id2label), dict(model.config.label2id)
    config.problem_type = model.config.problem_type
    config.dtype = torch.float32  # whatever the encoder was loaded as
    if config.model_type == "timm_wrapper":
        config.label_names = model.config.label_names  # what such a config.json has for id2label
    plain = AutoModelForImageClassification.from_config(config).eval()
    if config.model_type == "timm_wrapper":
        plain.timm_model.load_state_dict(encoder.timm_model.state_dict(), strict=False)
        classifier = plain.timm_model.get_classifier()
    else:
        plain.base_model.load_state_dict(encoder.state_dict(), strict=False)
        classifier = plain.classifier[-1] if isinstance(plain.classifier, nn.Sequential) else plain.classifier
    if not isinstance(classifier, nn.Linear):
        raise ExportError(f"the classifier of {config.architecture!r} is no linear layer; choose format onnx.")
    with torch.no_grad():
        # DINOv2's class puts the patches' mean behind the first token; the head doesn't look at it.
        classifier.weight.zero_()
        classifier.weight[:, : linear.in_features] = linear.weight
        classifier.bias.copy_(linear.bias)
    return plain


class _LogitsAlone(nn.Module):
    """Pixel values to calibrated logits, without the dictionary around them."""

    def __init__(self, model: ZoobotForImageClassification) -> None:
        super().__init__()
        self.model = copy.deepcopy(model).cpu().float().eval()

    def forward(self, pixel_values: Tensor) -> Tensor:
        logits: Tensor = self.model(pixel_values=pixel_values).logits
        return logits


def _folded_linear_head(model: ZoobotForImageClassification) -> nn.Linear:
    config, kind = model.config, model.config.encoder_config.model_type
    instead = "choose format onnx, or push with the model's code (include_code=True, --include_code)"
    if config.pooling not in POOLINGS_OF_PLAIN_CLASSES.get(kind, ()):
        raise ExportError(f"transformers has no class for a {kind!r} encoder read by {config.pooling!r}; {instead}.")
    if config.head_type != "linear":
        raise ExportError(f"transformers has no class for a head of type {config.head_type!r}; {instead}.")
    if config.problem_type == "regression" and config.unit_interval:
        raise ExportError(f"transformers has no class for a regression with unit_interval; {instead}.")
    linear = copy.deepcopy(model.head[-1]).float()  # as the export is, also where the model is in half precision
    assert isinstance(linear, nn.Linear)
    linear.weight.data, linear.bias.data = fold_calibration(linear.weight.data, linear.bias.data, config)
    return linear


def _plain_processor(processor: ZoobotImageProcessor) -> BitImageProcessor:
    _check_rgb(processor)
    return BitImageProcessor(
        do_resize=True,
        size={"shortest_edge": round(processor.pixels * processor.zoom)},
        resample=processor.resample,
        do_center_crop=True,
        crop_size={"height": processor.pixels, "width": processor.pixels},
        do_rescale=True,
        rescale_factor=processor.rescale_factor,
        do_normalize=processor.do_normalize,
        image_mean=processor.image_mean,
        image_std=processor.image_std,
        do_convert_rgb=True,
    )


def _timm_processing(processor: ZoobotImageProcessor) -> dict[str, Any]:
    _check_rgb(processor)
    size = (processor.num_channels, processor.pixels, processor.pixels)
    normalizes = processor.do_normalize
    return {
        "input_size": size,
        "test_input_size": size,
        "interpolation": RESAMPLING_NAMES[processor.resample],
        "crop_pct": 1 / processor.zoom,
        "test_crop_pct": 1 / processor.zoom,
        "crop_mode": "center",
        "mean": processor.image_mean if normalizes else [0.0, 0.0, 0.0],
        "std": processor.image_std if normalizes else [1.0, 1.0, 1.0],
    }


def _check_rgb(processor: ZoobotImageProcessor) -> None:
    if processor.num_channels != 3:
        raise ExportError(
            f"num_channels is {processor.num_channels}, and transformers has no image processor for grey images; "
            "choose format onnx."
        )


def _timm_convnext_to_transformers(encoder: PreTrainedModel) -> PreTrainedModel | None:
    """A ConvNeXt from timm as transformers' own; None for any other encoder, or a variant that its class lacks."""
    if encoder.config.model_type != "timm_wrapper" or not encoder.config.architecture.startswith("convnext_"):
        return None
    weights = {_transformers_name(name): tensor for name, tensor in encoder.timm_model.state_dict().items()}
    stem, last = weights["embeddings.patch_embeddings.weight"], weights.get("layernorm.weight")
    stages = [
        [name for name in weights if name.startswith(f"encoder.stages.{stage}.") and name.endswith(".dwconv.bias")]
        for stage in range(4)
    ]
    scale = "encoder.stages.0.layers.0.layer_scale_parameter"
    config = ConvNextConfig(
        num_channels=stem.shape[1],
        patch_size=stem.shape[2],
        hidden_sizes=[weights[names[0]].shape[0] for names in stages],
        depths=[len(names) for names in stages],
        layer_norm_eps=1e-6,  # timm's, transformers' default is 1e-12
        layer_scale_init_value=1e-6 if scale in weights else 0.0,
        image_size=(encoder.config.pretrained_cfg or {}).get("input_size", [3, 224, 224])[-1],
    )
    with torch.device("meta"):
        empty = AutoModelForImageClassification.from_config(config).base_model
    shapes = {name: tensor.shape for name, tensor in empty.state_dict().items()}
    # A 1 x 1 convolution is a linear layer: (out, in, 1, 1) and (out, in).
    weights = {name: tensor.flatten(1) if tensor.shape[2:] == (1, 1) else tensor for name, tensor in weights.items()}
    if last is None or {name: tensor.shape for name, tensor in weights.items()} != shapes:
        return None
    empty.load_state_dict(weights, assign=True)
    return empty.eval()


def _transformers_name(name: str) -> str:
    """The name in transformers of a parameter of timm's ConvNeXt."""
    for timm_part, part in (
        ("stem.0.", "embeddings.patch_embeddings."),
        ("stem.1.", "embeddings.layernorm."),
        ("head.norm.", "layernorm."),
        ("stages.", "encoder.stages."),
        (".downsample.", ".downsampling_layer."),
        (".blocks.", ".layers."),
        (".conv_dw.", ".dwconv."),
        (".norm.", ".layernorm."),
        (".mlp.fc1.", ".pwconv1."),
        (".mlp.fc2.", ".pwconv2."),
        (".gamma", ".layer_scale_parameter"),
    ):
        name = name.replace(timm_part, part)
    return name


@contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """A folder beside the wanted one, which takes its place when all went well."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} is there and not empty; choose a new folder.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as temporary:
        unfinished = Path(temporary) / folder.name
        unfinished.mkdir()
        yield unfinished
        unfinished.replace(folder)


@torch.no_grad()
def _compare(model: ZoobotForImageClassification, other: Callable[[Tensor], Tensor], pixel_values: Tensor) -> float:
    expected = _LogitsAlone(model)(pixel_values)
    difference = float((expected - other(pixel_values)).abs().max())
    if not difference <= LARGEST_DIFFERENCE:
        raise ExportError(
            f"the exported model's logits differ by {difference:.2g} from the original's, more than "
            f"{LARGEST_DIFFERENCE}; choose another format."
        )
    return difference
