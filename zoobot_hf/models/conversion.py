"""Pretrained encoders from anywhere: transformers repositories, and timm's layout, which all of Zoobot's have."""

import inspect
import json
import logging
import math
import pickle
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_MAPPING
from transformers.models.timm_wrapper.configuration_timm_wrapper import TimmWrapperConfig

from .configuration_zoobot import ZoobotConfig
from .image_processing_zoobot import ZoobotImageProcessor
from .lightning_checkpoint import ZoobotCheckpoint, find_zoobot_file, read_zoobot_file

logger = logging.getLogger(__name__)

HUB_ARGUMENTS = ("subfolder", "revision", "token", "cache_dir", "local_files_only", "force_download")
NORMALIZATIONS = ("auto", "none", "encoder")
DEFAULT_PIXELS = 224
# What a preprocessor_config.json of transformers can say and ZoobotImageProcessor does in one way only.
OUR_SCALING = {"do_rescale": True, "rescale_factor": 1 / 255, "rescale_offset": False, "do_flip_channel_order": False}
# A small ResNet, trained from scratch on drawn galaxies; its card: model_cards/drawn-galaxies.
EMBEDDED_ENCODER = str(Path(__file__).parent / "drawn-galaxies")
# Zoobot 2.9.0 trains at zooms of 1.2 to 1.4. On 470 real rings, logistic regression on an ImageNet encoder's embeddings
# had a ROC AUC of 0.73 to 0.75 at every zoom from 1 to 2.4.
DEFAULT_ZOOM = 1.4
# What Zoobot 2.9.0's finetuned models are tested and predict at (galaxy-datasets 0.0.25, minimal_view_config).
ZOOBOT_ZOOM = 1.2
SAFE_PATTERNS = ("*.json", "*.safetensors")

Shape = tuple[int, ...]


class LoadedEncoder(NamedTuple):
    """An encoder and how its embedding is read.

    Attributes:
        model: The encoder with its weights.
        pooling: "first_token" where the checkpoint lacks its pooler's weights, else None.
        left_out: Names of the checkpoint's tensors that the encoder doesn't have, an old classifier's for example.
    """

    model: PreTrainedModel
    pooling: str | None
    left_out: list[str]


def local_copy(name_or_path: str | Path, *, subfolder: str | None = None, **hub_arguments: Any) -> Path:
    """The folder with a repository's configuration and weights, downloaded where it isn't local; or a local file.

    The weights are fetched before transformers sees the repository. Given the name of one without safetensors,
    transformers starts a thread that posts the name and the user's token to an outside conversion service.

    Args:
        name_or_path: A local folder, a `.ckpt` file of Zoobot's, or a Hub id.
        subfolder: Of the folder or repository, where the model lies in one.
        **hub_arguments: `revision`, `token`, `cache_dir`, `local_files_only`, `force_download`.

    Raises:
        OSError: No such folder and no such repository, revision or network.
    """
    if Path(name_or_path).is_dir() or (Path(name_or_path).is_file() and Path(name_or_path).suffix == ".ckpt"):
        return Path(name_or_path, subfolder or "")
    name, inside = str(name_or_path), PurePosixPath(subfolder or "")
    # A pattern's star stands for slashes too.
    hub_arguments["ignore_patterns"] = str(inside / "*/*")
    try:
        patterns = [str(inside / pattern) for pattern in SAFE_PATTERNS]
        folder = Path(snapshot_download(name, allow_patterns=patterns, **hub_arguments), inside)
        if not any(folder.glob("*.safetensors")):
            # Zoobot's finetuned models are a Lightning checkpoint and nothing else.
            pattern = "pytorch_model*.bin" if (folder / "config.json").is_file() else "*.ckpt"
            snapshot_download(name, allow_patterns=[str(inside / pattern)], **hub_arguments)
    except HFValidationError as error:
        raise OSError(f"{name!r} is neither a folder here nor a Hub id of the form user/name.") from error
    except RevisionNotFoundError as error:
        raise OSError(
            f"{name!r} has no revision {hub_arguments.get('revision')!r}; see its branches and tags."
        ) from error
    except GatedRepoError as error:
        raise OSError(f"{name!r} is gated; ask for access on its page, and log in with `hf auth login`.") from error
    except RepositoryNotFoundError as error:
        raise OSError(
            f"{name!r} is neither a folder here nor a repository on the Hub; check the spelling, and log in with "
            "`hf auth login` if it is private."
        ) from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError) as error:
        raise OSError(f"{name!r} is no folder here, is not in the cache, and {_what_kept_it(error)}.") from error
    return folder


def _what_kept_it(error: Exception) -> str:
    """Why nothing came from the Hub, and what to do."""
    # Where it looks into the cache after a refusal, huggingface_hub raises the cache's error from the Hub's.
    refusal = error if isinstance(error, HfHubHTTPError) else error.__cause__
    if not isinstance(refusal, HfHubHTTPError):
        return "the Hub could not be reached; check the network or download it first"
    if refusal.response.status_code == 401:
        return "the Hub refused the token; log in again with `hf auth login`"
    return f"the Hub refused it ({str(refusal).splitlines()[0]}); try again in a while or download it first"


def read_configuration(folder: Path) -> dict[str, Any]:
    """The content of a repository's config.json.

    Args:
        folder: A local copy of the repository.

    Raises:
        OSError: There is no config.json, or it isn't a JSON object.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise OSError(f"{folder} holds no config.json; give a folder or a repository with a saved model.")
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise OSError(f"{path} is not JSON: {error}.") from error
    if not isinstance(settings, dict):
        raise OSError(f"{path} is no JSON object.")
    return settings


def load_encoder(folder: Path, *, dtype: torch.dtype | str | None = None) -> LoadedEncoder:
    """A pretrained encoder from a local copy of a repository.

    Args:
        folder: A repository in timm's layout, or of any vision model that `AutoModel` loads; safetensors or .bin.
        dtype: Type of the weights, its name, or "auto" for the checkpoint's; float32 when absent.

    Raises:
        OSError: The folder holds no model.
        ValueError: The checkpoint lacks weights of the encoder or holds other objects, or the encoder's code isn't in
            transformers.
    """
    settings = read_configuration(folder)
    shapes = read_weight_shapes(folder)
    config = _timm_configuration(settings, shapes) if _has_timm_layout(settings) else _own_configuration(folder)
    keywords: dict[str, Any] = {"config": config, "output_loading_info": True, "dtype": dtype or torch.float32}
    keywords["ignore_mismatched_sizes"] = True  # they are in the report, and refused below
    model, report = AutoModel.from_pretrained(str(folder), **keywords)
    missing = sorted(report["missing_keys"])
    pooling = None
    if missing and all("pooler" in name for name in missing) and takes_pooling_argument(config):
        # A pooler that the checkpoint lacks would be random: read the first token instead, as ViT's classifiers do.
        model, report = AutoModel.from_pretrained(str(folder), add_pooling_layer=False, **keywords)
        pooling = "first_token"
    check_that_weights_fit(report, folder.name)
    return LoadedEncoder(model, pooling, sorted(report["unexpected_keys"]))


def load_zoobot_encoder(
    checkpoint: ZoobotCheckpoint, encoder_config: PreTrainedConfig | None, *, dtype: torch.dtype | str | None = None
) -> LoadedEncoder:
    """The encoder of a finetuned Zoobot model.

    Args:
        checkpoint: What the model's file holds.
        encoder_config: The encoder's own configuration; read off the file when absent.
        dtype: As in `load_encoder`.

    Raises:
        ValueError: The file doesn't say which encoder it is, or its weights are another encoder's.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in checkpoint.encoder.items()}
    if encoder_config is None:
        if checkpoint.architecture is None:
            raise ValueError(
                f"{checkpoint.name} doesn't say which encoder it has (name is {checkpoint.settings.get('name')!r}); "
                "give encoder_config, for example TimmWrapperConfig(architecture='convnext_nano')."
            )
        facts = {"input_size": [3, DEFAULT_PIXELS, DEFAULT_PIXELS]}
        settings = {"architecture": checkpoint.architecture, "num_classes": 0, "pretrained_cfg": facts}
        model_arguments = {"model_args": checkpoint.settings.get("timm_kwargs")}
        encoder_config = _timm_configuration({**settings, **model_arguments}, shapes)
    if isinstance(dtype, str):
        dtype = checkpoint.head_weight.dtype if dtype == "auto" else getattr(torch, dtype)
    model = build_encoder(encoder_config, None).to(dtype or torch.float32)
    prefix = "timm_model." if encoder_config.model_type == "timm_wrapper" else ""
    found = {f"{prefix}{name}": tensor for name, tensor in checkpoint.encoder.items()}
    wanted = {name: tensor.shape for name, tensor in model.state_dict().items()}
    mismatched = [(name,) for name in wanted if name in found and found[name].shape != wanted[name]]
    report = {"missing_keys": wanted.keys() - found.keys(), "mismatched_keys": mismatched}
    check_that_weights_fit(report, checkpoint.name)
    model.load_state_dict({name: found[name] for name in wanted})
    return LoadedEncoder(model.eval(), None, sorted(found.keys() - wanted.keys()))


def check_that_weights_fit(report: dict[str, Any], name: str) -> None:
    """Checks that transformers found all of a model's weights in its checkpoint.

    Args:
        report: What transformers returns with `output_loading_info`.
        name: What the checkpoint is called.

    Raises:
        ValueError: Some are missing, or of another shape.
    """
    _refuse_unfit([*sorted(report["missing_keys"]), *sorted(entry[0] for entry in report["mismatched_keys"])], name)


def check_that_shapes_fit(there: dict[str, Shape] | None, expected: dict[str, Shape], name: str) -> None:
    """Checks that the weights in a checkpoint are as large as the model's, before memory is taken for them.

    Args:
        there: The checkpoint's, from `read_weight_shapes`; None leaves the check out.
        expected: The model's, which may be without memory so far.
        name: What the checkpoint is called.

    Raises:
        ValueError: Some have another shape.
    """
    _refuse_unfit([key for key, shape in (there or {}).items() if expected.get(key, shape) != shape], name)


def _refuse_unfit(unfit: list[str], name: str) -> None:
    if unfit:
        more = ", ..." if len(unfit) > 5 else ""
        raise ValueError(
            f"the checkpoint of {name} lacks {len(unfit)} of the model's weights or has them in another shape "
            f"({', '.join(unfit[:5])}{more}); config.json and weights do not belong together."
        )


def build_encoder(config: PreTrainedConfig, pooling: str | None) -> PreTrainedModel:
    """An encoder with new weights.

    Args:
        config: The encoder's own configuration.
        pooling: As in `ZoobotConfig`.
    """
    reads_tokens = pooling not in (None, "pooler")
    arguments = {"add_pooling_layer": False} if reads_tokens and takes_pooling_argument(config) else {}
    return AutoModel.from_config(_without_masking(config), **arguments)


def takes_pooling_argument(config: PreTrainedConfig) -> bool:
    """Whether the encoder's class can be built without its pooling layer.

    Args:
        config: The encoder's own configuration.
    """
    return "add_pooling_layer" in inspect.signature(MODEL_MAPPING[type(config)].__init__).parameters


def _has_timm_layout(settings: dict[str, Any]) -> bool:
    return "architecture" in settings and settings.get("model_type", "timm_wrapper") == "timm_wrapper"


def _own_configuration(folder: Path) -> PreTrainedConfig:
    config = AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
    if type(config) not in MODEL_MAPPING:
        raise ValueError(f"{folder} holds a {config.model_type!r} model, which `AutoModel` can't load as an encoder.")
    return _without_masking(config)


def _without_masking(config: PreTrainedConfig) -> PreTrainedConfig:
    if config.model_type == "vit_mae":
        config.mask_ratio = 0.0  # else three quarters of the patches, chosen at random, are left out in each forward
    return config


def _timm_configuration(settings: dict[str, Any], shapes: dict[str, Shape] | None) -> TimmWrapperConfig:
    arguments = dict(settings.get("model_args") or {})
    # timm's own `save_for_hf` repeats num_classes here, and TimmWrapperModel passes it a second time.
    arguments.pop("num_classes", None)
    input_size = (settings.get("pretrained_cfg") or {}).get("input_size") or [3]
    channels = _input_channels(shapes)
    if channels not in (None, input_size[0]):
        # Zoobot's greyscale encoders: one channel in the weights, three in the configuration.
        arguments["in_chans"] = channels
    return TimmWrapperConfig.from_dict({**settings, "model_args": arguments or None})


def _input_channels(shapes: dict[str, Shape] | None) -> int | None:
    """Channels that the first convolution takes, read off the weights; None where that can't be told."""
    channels = {shape[1] for shape in (shapes or {}).values() if len(shape) == 4} & {1, 3}
    # Depthwise convolutions have one input channel as well, so 3 wins where both are there.
    return max(channels, default=None)


def read_weight_shapes(folder: Path) -> dict[str, Shape] | None:
    """The shape of each tensor in a checkpoint, of one file or several, by its name; None where there are no weights.

    Args:
        folder: A local copy of a repository.

    Raises:
        ValueError: The weights are damaged, some are missing, or there are other objects among them.
    """
    for stem, ending, read in (
        ("model", ".safetensors", _read_safetensors_shapes),
        ("pytorch_model", ".bin", _read_bin_shapes),
    ):
        single, index = folder / f"{stem}{ending}", folder / f"{stem}{ending}.index.json"
        if single.is_file():
            return read(single)
        if index.is_file():
            paths = [folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
            missing = [path.name for path in paths if not path.is_file()]
            if missing:
                raise ValueError(
                    f"the model's weights, {', '.join(missing)}, are missing; copy or download them again."
                )
            return {name: shape for path in paths for name, shape in read(path).items()}
    return None


def _read_safetensors_shapes(path: Path) -> dict[str, Shape]:
    try:
        with safe_open(str(path), framework="pt") as weights:
            return {name: tuple(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(
            f"the model's weights, {path.name}, are damaged ({error}); copy or download them again."
        ) from error


def _read_bin_shapes(path: Path) -> dict[str, Shape]:
    try:
        content = torch.load(path, weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(
            f"the model's weights, {path.name}, are damaged or hold other objects, whose code is never run; ask for "
            "them as safetensors."
        ) from error
    if not isinstance(content, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in content.values()):
        raise ValueError(f"{path.name} does not hold tensors by name and nothing else; ask for them as safetensors.")
    return {name: tuple(tensor.shape) for name, tensor in content.items()}


def image_processor_for(
    name_or_path: str | Path,
    *,
    normalization: str = "auto",
    zoom: float | None = None,
    fits_bands: Sequence[str] | None = None,
    **hub_arguments: Any,
) -> ZoobotImageProcessor:
    """The image processor for an encoder or a finetuned model.

    A zoobot_hf repository's own processor is taken as it is. For any other encoder the size comes from its
    preprocessor_config.json, or else its configuration, and the normalisation only from a statement that can be
    trusted: the mean and standard deviation in timm's layout are left over from ImageNet in all of Zoobot's encoders,
    which take RGB in 0-1. In timm's layout the number of channels comes from the weights.

    Args:
        name_or_path: A local folder, a `.ckpt` file of Zoobot's, or a Hub id.
        normalization: "none" gives RGB in 0-1; "encoder" applies the mean and standard deviation that the repository
            states; "auto" applies them where a preprocessor_config.json states them, and not in timm's layout.
        zoom: Factor by which the centre is magnified. When absent, the repository's own; for a `.ckpt` file that of
            Zoobot's predictions, `ZOOBOT_ZOOM`; or else `DEFAULT_ZOOM`.
        fits_bands: As in `ZoobotImageProcessor`; the repository's own when absent.
        **hub_arguments: As in `local_copy`.

    Raises:
        OSError: No such folder or repository, no network, or a zoobot_hf repository without an image processor.
        ValueError: Another normalization, one that the repository doesn't state, or pixel values that aren't RGB in 0-1
            before it.
    """
    if normalization not in NORMALIZATIONS:
        raise ValueError(f"normalization is {normalization!r}; choose one of {', '.join(NORMALIZATIONS)}.")
    folder = local_copy(name_or_path, **hub_arguments)
    name = PurePosixPath(name_or_path, hub_arguments.get("subfolder") or "")
    wanted = {"zoom": zoom, "fits_bands": fits_bands}
    changes: dict[str, Any] = {setting: value for setting, value in wanted.items() if value is not None}
    zoobot_file = find_zoobot_file(folder)
    if zoobot_file is not None:
        shapes = {name: tuple(tensor.shape) for name, tensor in read_zoobot_file(zoobot_file).encoder.items()}
        channels = _input_channels(shapes) or 3
        return ZoobotImageProcessor(DEFAULT_PIXELS, num_channels=channels, **{"zoom": ZOOBOT_ZOOM, **changes})
    settings = read_configuration(folder)
    if settings.get("model_type") == ZoobotConfig.model_type:
        if not (folder / "preprocessor_config.json").is_file():
            raise OSError(
                f"{name} holds a model without its image processor; save that beside it with "
                "image_processor_for(source).save_pretrained(folder), where source is what the model was loaded from."
            )
        own = ZoobotImageProcessor.from_pretrained(str(folder)).to_dict()
        return ZoobotImageProcessor.from_dict({**own, **changes})
    stated = _stated_processing(folder, settings)
    if normalization != "none" and stated.unlike_ours:
        raise ValueError(
            f"the preprocessor_config.json of {name} has {', '.join(stated.unlike_ours)}, and ZoobotImageProcessor "
            "gives RGB in 0-1; choose normalization none for an encoder that takes that."
        )
    if normalization == "encoder" and not stated.normalization:
        raise ValueError(f"{name} states no mean and standard deviation; choose normalization none.")
    in_timm_layout = _has_timm_layout(settings)
    is_trusted = normalization == "encoder" or (normalization == "auto" and not in_timm_layout)
    applied = stated.normalization if is_trusted else {}
    if normalization == "auto" and in_timm_layout and stated.normalization:
        logger.warning(
            "%s states %s, which is not applied: Galaxy Zoo's encoders take RGB in 0-1 and carry ImageNet's numbers "
            "all the same. For an encoder that was trained elsewhere, choose normalization encoder.",
            name,
            stated.normalization,
        )
    return ZoobotImageProcessor(
        stated.pixels,
        num_channels=stated.channels,
        do_normalize=bool(applied),
        image_mean=applied.get("image_mean"),
        image_std=applied.get("image_std"),
        **{"zoom": DEFAULT_ZOOM, **changes},
    )


class _StatedProcessing(NamedTuple):
    pixels: int
    channels: int
    normalization: dict[str, list[float]]
    unlike_ours: list[str]


def _stated_processing(folder: Path, settings: dict[str, Any]) -> _StatedProcessing:
    """Size, channels and normalisation as the repository has them."""
    path = folder / "preprocessor_config.json"
    if _has_timm_layout(settings):
        facts = settings.get("pretrained_cfg") or {}
        input_size = facts.get("input_size") or [3, DEFAULT_PIXELS, DEFAULT_PIXELS]
        channels, sizes = _input_channels(read_weight_shapes(folder)) or input_size[0], [input_size[1:]]
        mean, std, unlike_ours = facts.get("mean"), facts.get("std"), []
    else:
        facts = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        cropped = facts.get("crop_size") if facts.get("do_center_crop") else None
        channels, sizes = settings.get("num_channels", 3), [cropped, facts.get("size"), settings.get("image_size")]
        mean, std = facts.get("image_mean"), facts.get("image_std")
        if not facts.get("do_normalize", True):
            mean = std = None
        unlike_ours = _other_scaling(facts)
    normalization = {"image_mean": list(mean), "image_std": list(std)} if mean and std else {}
    pixels = next(filter(None, map(_side, sizes)), DEFAULT_PIXELS)
    return _StatedProcessing(pixels, channels, normalization, unlike_ours)


def _other_scaling(facts: dict[str, Any]) -> list[str]:
    stated = {name: facts[name] for name in OUR_SCALING if facts.get(name) is not None}
    equal = {name: math.isclose(fact, OUR_SCALING[name], rel_tol=1e-6) for name, fact in stated.items()}
    return [f"{name} {fact}" for name, fact in stated.items() if not equal[name]]


def _side(size: Any) -> int | None:
    """Height and width that a size in any of transformers' spellings stands for; None where it isn't square."""
    if isinstance(size, dict):
        size = [size[name] for name in ("height", "width", "shortest_edge") if name in size]
    sides = set(size) if isinstance(size, (list, tuple)) else {size}
    side = sides.pop() if len(sides) == 1 else None
    return side if isinstance(side, int) else None
