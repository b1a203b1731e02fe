"""Run the encoder once and keep what it said: embeddings on disk, under a key of everything that they depend on.

Each set of embeddings is one safetensors file, `<key>.safetensors`, in `zoobot_hf/embeddings` below the Hugging Face
home (`HF_HOME`, `~/.cache/huggingface` unless set); on several machines that folder has to be one that all of them see.
A file takes images x views x embedding size x 4 bytes in float32: 100,000 galaxies of 640 dimensions 256 MB a view.
`zoobot-hf cache` lists the files and clears them.
"""

import errno
import functools
import hashlib
import json
import logging
import math
import os
import shutil
import struct
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow as pa
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from huggingface_hub.constants import HF_HOME
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from tqdm.auto import tqdm

from zoobot_hf.data.images import UnreadableImageError
from zoobot_hf.models.image_processing_zoobot import ZoobotImageProcessor
from zoobot_hf.models.modeling_zoobot import ZoobotPreTrainedModel

from .augmentation import NUMBERS_OF_A_TURN, margin_of_turns, turn_galaxies
from .machine import InferenceRunner, default_batch_size, prepare_processes, uses_bf16
from .reading import read_wide_field, undecoded

logger = logging.getLogger(__name__)

FORMAT = "1"
TENSOR = "embeddings"
# For each type its name in the header of a safetensors file.
DTYPES = {"float32": "F32", "float16": "F16"}
# Other versions of these may give other embeddings for the same image.
LIBRARIES = ("zoobot-hf", "torch", "transformers", "timm", "pillow")


@dataclass(frozen=True)
class Views:
    """Which augmented views of each galaxy the encoder sees.

    Attributes:
        count: How many.
        seed: Decides the views.
        zoom_range: Largest zoom in and out; 0.15 draws factors from 0.85 to 1.15.
        max_shift: Largest shift in each direction, as a share of the width.
    """

    count: int
    seed: int = 42
    zoom_range: float = 0.15
    max_shift: float = 0.05

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"count is {self.count}; give at least 1 view.")


class Stored(NamedTuple):
    """A file of embeddings, each image once.

    Attributes:
        values: (images, views, embedding_size), memory-mapped.
        rows: For each row of the dataset the number of its image.
        key: What the embeddings depend on, as a hash.
    """

    values: Tensor
    rows: Tensor
    key: str


class CachedFile(NamedTuple):
    """What a file in the cache holds.

    Attributes:
        path: The file.
        encoder: Name of the encoder.
        images: How many images.
        views: How many views of each.
        size: Bytes on disk.
    """

    path: Path
    encoder: str
    images: int
    views: int
    size: int


def compute_embeddings(
    model: ZoobotPreTrainedModel,
    dataset: datasets.Dataset,
    processor: ZoobotImageProcessor,
    *,
    views: Views | None = None,
    dtype: str = "float32",
    cache_dir: str | Path | None = None,
    batch_size: int | None = None,
    torch_compile: bool = False,
    bf16: bool | None = None,
) -> datasets.Dataset:
    """The embeddings of a dataset's images: from the cache where they are there, else from one pass of the encoder.

    Under `accelerate launch` the processes share the work. The cache's key is made of the encoder's weights and
    configuration, the processor, the views, the images, the kind of device, its precision and the versions of the
    libraries. Labels and the head are not part of it.

    Args:
        model: Any of the package's models; only its encoder is used, where it is, and it is left in evaluation mode.
        dataset: With `image`.
        processor: The image processor that belongs to the encoder.
        views: Augmented views for training; the plain centre alone when absent, as evaluation sees it.
        dtype: How they are stored, "float32" or "float16".
        cache_dir: Where the files lie; see the module's first lines when absent.
        batch_size: Images that the encoder sees at once; what suits the device when absent.
        torch_compile: Whether to compile the encoder, which pays from some thousand images on.
        bf16: Whether the encoder computes in bfloat16; when absent, on a GPU that has it in hardware.

    Returns:
        A row for each galaxy and view, galaxy by galaxy in the order of `dataset`: `embeddings` (memory-mapped),
        `view`, and the dataset's columns but `image`.

    Raises:
        ValueError: No `image`, a type that isn't known, an image that can't be read, or a value beyond float16's.
        OSError: No space left, or no right to write; nothing half-written is kept then.
    """
    stored = store_embeddings(
        model,
        dataset,
        processor,
        views=views,
        dtype=dtype,
        cache_dir=cache_dir,
        batch_size=batch_size,
        torch_compile=torch_compile,
        bf16=bf16,
    )
    _, per_galaxy, size = stored.values.shape
    flat = pa.array(stored.values.numpy().reshape(-1))  # no copy: still the file's own memory
    table = pa.table({TENSOR: pa.FixedSizeListArray.from_arrays(flat, size)})
    places = (stored.rows[:, None] * per_galaxy + torch.arange(per_galaxy)).flatten().numpy()
    embeddings = datasets.Dataset(table, fingerprint=stored.key).select(places)
    embeddings = embeddings.add_column("view", np.tile(np.arange(per_galaxy), len(dataset)))
    others = dataset.remove_columns("image")
    if not others.column_names:
        return embeddings
    repeated = others.select(np.repeat(np.arange(len(dataset)), per_galaxy))
    return datasets.concatenate_datasets([repeated, embeddings], axis=1)


def store_embeddings(
    model: ZoobotPreTrainedModel,
    dataset: datasets.Dataset,
    processor: ZoobotImageProcessor,
    *,
    views: Views | None = None,
    dtype: str = "float32",
    cache_dir: str | Path | None = None,
    batch_size: int | None = None,
    torch_compile: bool = False,
    bf16: bool | None = None,
) -> Stored:
    """The cache's file for a dataset, computed where it isn't there; arguments and errors as `compute_embeddings`."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; choose {' or '.join(DTYPES)}.")
    prepare_processes()
    as_in_files = undecoded(dataset).select_columns("image")
    identities = [_identify(image) for image in _each_image(as_in_files)]
    first_rows: dict[str, int] = {}
    for row, identity in enumerate(identities):
        first_rows.setdefault(identity, row)
    numbers = {identity: number for number, identity in enumerate(first_rows)}
    rows = torch.tensor([numbers[identity] for identity in identities], dtype=torch.long)
    images = _hash_text(*first_rows)
    key = _hash_facts(model, processor, views=views, dtype=dtype, bf16=uses_bf16(model.device, bf16), images=images)
    path = Path(cache_dir or cache_folder()) / f"{key}.safetensors"
    shape = (len(first_rows), views.count if views else 1, _embedding_size(model))
    values = _open_on_all_processes(path)
    if values is None:
        encoder = model.base_model
        size = batch_size or default_batch_size(model.device)
        image_rows = as_in_files.select(list(first_rows.values()))
        name = model.config.encoder_name or model.config.encoder_config.model_type
        with (
            InferenceRunner(encoder, batch_size=size, torch_compile=torch_compile, bf16=bf16) as runner,
            _EmbeddingFile(path, shape, dtype=dtype, encoder_name=name) as file,
        ):
            _run_encoder(runner, processor, image_rows, file, views=views)
        encoder.to(memory_format=torch.contiguous_format)  # safetensors saves no other
        values = _open_on_all_processes(path)
        if values is None:
            raise OSError(f"{path} was written and can't be read back; check the disk, or choose another cache_dir.")
    else:
        logger.info("Embeddings of %d images are in the cache: %s.", len(first_rows), path)
    return Stored(values, rows, key)


def cache_folder() -> Path:
    """Where embeddings are kept unless another folder is asked for."""
    return Path(HF_HOME) / "zoobot_hf" / "embeddings"


def list_cache(folder: str | Path | None = None) -> list[CachedFile]:
    """What the cache holds; files that are damaged or half-written come as images and views of 0.

    Args:
        folder: The cache's folder; the usual one when absent.
    """
    return [_describe(path) for path in sorted(Path(folder or cache_folder()).glob("*.safetensors*"))]


def clear_cache(folder: str | Path | None = None) -> int:
    """How many bytes became free by deleting every file of the cache.

    Args:
        folder: The cache's folder; the usual one when absent.
    """
    files = list_cache(folder)
    for file in files:
        file.path.unlink(missing_ok=True)
    return sum(file.size for file in files)


def hash_images(dataset: datasets.Dataset) -> list[str]:
    """A hash of each image's content, wherever it lies: every file is read.

    Args:
        dataset: With `image`, which can be read.
    """
    return [
        hashlib.sha256(Path(image["path"]).read_bytes() if image["bytes"] is None else image["bytes"]).hexdigest()
        for image in _each_image(undecoded(dataset.select_columns("image")))
    ]


def hash_weights(module: nn.Module) -> str:
    """A hash of every parameter and buffer: names, types, shapes and values, to the last bit.

    Args:
        module: A model or a part of one, on any device.
    """
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


class StoredEmbeddings(torch.utils.data.Dataset[dict[str, Any]]):
    """Embeddings and labels to train a head on: an example for each galaxy and view, galaxy by galaxy.

    Args:
        stored: The embeddings.
        labels: A label for each row of the dataset, or None.
    """

    def __init__(self, stored: Stored, labels: Tensor | None) -> None:
        self.values, self.rows, _ = stored
        self.labels = labels

    def __len__(self) -> int:
        return len(self.rows) * self.values.shape[1]

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The example at one place.

        Args:
            index: Row times views plus view.
        """
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        """The examples at several places, as a data loader asks for them.

        Args:
            indices: Row times views plus view, each.
        """
        rows, views = np.divmod(np.asarray(indices), self.values.shape[1])
        embeddings = self.values[self.rows[rows], torch.from_numpy(views)].float()
        if self.labels is None:
            return [{TENSOR: embedding} for embedding in embeddings]
        return [{TENSOR: e, "label": label} for e, label in zip(embeddings, self.labels[rows], strict=True)]

    def batches(self, size: int) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Embeddings (batch x views, embedding_size), float32, and their labels, in order.

        Args:
            size: Rows of the dataset in a batch.
        """
        views = self.values.shape[1]
        for start in range(0, len(self.rows), size):
            rows = slice(start, start + size)
            labels = None if self.labels is None else self.labels[rows].repeat_interleave(views, dim=0)
            yield self.values[self.rows[rows]].float().flatten(0, 1), labels


# What the embeddings depend on ----------------------------------------------------------------------------------


def _each_image(as_in_files: datasets.Dataset) -> Iterator[Any]:
    return (image for batch in as_in_files.iter(1000) for image in batch["image"])


def _identify(image: dict[str, Any] | None) -> str:
    """A name for an image that changes with it: a hash of its bytes, or its file's path, size and time of change."""
    if image is None:
        raise UnreadableImageError("a row of the dataset has no image; leave it out.")
    if image["bytes"] is not None:
        return hashlib.sha256(image["bytes"]).hexdigest()
    try:
        state = os.stat(image["path"])
    except OSError as error:
        raise UnreadableImageError(f"{image['path']} can't be read: {error.strerror}. Mend or remove it.") from error
    return f"{os.path.abspath(image['path'])} {state.st_size} {state.st_mtime_ns}"


def _hash_facts(
    model: ZoobotPreTrainedModel,
    processor: ZoobotImageProcessor,
    *,
    views: Views | None,
    dtype: str,
    bf16: bool,
    images: str,
) -> str:
    config = model.config
    facts = {
        "format": FORMAT,
        "encoder": config.encoder_config.to_dict(),
        "pooling": config.pooling,
        "weights": hash_weights(model.base_model.encoder),
        "processor": processor.to_dict(),
        "views": repr(views),
        "images": images,
        "dtype": dtype,
        "device": model.device.type,
        "bf16": bf16,
        "versions": {library: version(library) for library in LIBRARIES},
    }
    return _hash_text(json.dumps(facts, sort_keys=True, default=str))


def _hash_text(*texts: str) -> str:
    digest = hashlib.sha256()
    for text in texts:
        digest.update(f"{len(text)} {text}".encode())
    return digest.hexdigest()[:32]


def _embedding_size(model: ZoobotPreTrainedModel) -> int:
    assert model.config.embedding_size is not None
    return int(model.config.embedding_size)


# One pass of the encoder ----------------------------------------------------------------------------------------


def _run_encoder(
    runner: InferenceRunner,
    processor: ZoobotImageProcessor,
    images: datasets.Dataset,
    file: "_EmbeddingFile",
    *,
    views: Views | None,
) -> None:
    """Writes this process's share of the embeddings: whole batches, the same whatever the number of processes."""
    margin = 1.0 if views is None else margin_of_turns(zoom_range=views.zoom_range, max_shift=views.max_shift)
    state = PartialState()
    share = math.ceil(math.ceil(len(images) / runner.batch_size) / state.num_processes) * runner.batch_size
    start, stop = (min(len(images), rank * share) for rank in (state.process_index, state.process_index + 1))
    read = functools.partial(_read_numbered, processor=processor, margin=margin)
    numbered = ((row, images[row]["image"]) for row in range(start, stop))
    draws = None if views is None else _draw_views(views, len(images))
    total = (stop - start) * file.views
    with tqdm(total=total, desc="embedding", unit="image", disable=not state.is_main_process) as progress:
        for read_images in runner.read(read, numbered, collate=torch.stack):
            batch = read_images.to(runner.device)
            following = start + len(batch)
            outputs = []
            for view in range(file.views):
                seen = batch
                if views is not None and draws is not None:
                    seen = turn_galaxies(
                        batch,
                        draws[start:following, view],
                        pixels=processor.pixels,
                        zoom_range=views.zoom_range,
                        max_shift=views.max_shift,
                    )
                outputs.append(runner(processor.rescale_and_normalize(seen)))
                progress.update(len(batch))
            file.write(start, torch.stack(outputs, dim=1))
            start = following


def _read_numbered(numbered: tuple[int, dict[str, Any]], *, processor: ZoobotImageProcessor, margin: float) -> Tensor:
    row, image = numbered
    return read_wide_field(image, processor, margin=margin, name=f"image {row}")


def _draw_views(views: Views, count: int) -> Tensor:
    """(images, views, 5), uniform in 0-1: an image's views depend on its place, not on how the work is shared."""
    generator = torch.Generator().manual_seed(views.seed)
    return torch.rand(count, views.count, NUMBERS_OF_A_TURN, generator=generator)


# Files ----------------------------------------------------------------------------------------------------------


def _open_on_all_processes(path: Path) -> Tensor | None:
    state = PartialState()
    if state.is_main_process:
        _open(path)  # deletes what is damaged before the others look
    state.wait_for_everyone()
    return _open(path)


def _open(path: Path) -> Tensor | None:
    """The file's embeddings, memory-mapped; None where there is no whole file, and what was there is deleted."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            return file.get_tensor(TENSOR)
    except SafetensorError as error:
        logger.warning("%s is damaged (%s) and is computed again.", path, error)
        path.unlink(missing_ok=True)
        return None


class _EmbeddingFile:
    """A file that is being written; it gets its name only when all of it is there.

    Several processes write to different places of the same file, which the first of them makes at its full size.
    """

    def __init__(self, path: Path, shape: tuple[int, int, int], *, dtype: str, encoder_name: str) -> None:
        self.path = path
        # A name for this run alone, the same on all of its processes: another run may compute the same embeddings.
        (name,) = broadcast_object_list([f"{path.name}.{uuid.uuid4().hex}.partial"])
        self.partial = path.with_name(name)
        self.views = shape[1]
        self.dtype = np.dtype(dtype)
        self.bytes_an_image = shape[1] * shape[2] * self.dtype.itemsize
        self.size = shape[0] * self.bytes_an_image
        self.header = _header(shape, dtype=dtype, encoder_name=encoder_name)

    def __enter__(self) -> "_EmbeddingFile":
        if PartialState().is_main_process:
            logger.info(
                "Computing %d embeddings once, %.1f MB in %s.",
                self.size // self.bytes_an_image * self.views,
                self.size / 1e6,
                self.path,
            )
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._check_space()
                with open(self.partial, "wb") as file:
                    file.write(self.header)
                    file.truncate(len(self.header) + self.size)
            except OSError as error:
                raise self._not_kept(error) from error
        PartialState().wait_for_everyone()
        self.file = open(self.partial, "r+b", buffering=0)  # closed in __exit__
        return self

    def write(self, first: int, embeddings: Tensor) -> None:
        """Writes the embeddings of some images.

        Args:
            first: Number of the first image.
            embeddings: (images, views, embedding_size), float32.

        Raises:
            ValueError: A value that the type can't hold.
            OSError: No space left.
        """
        with np.errstate(over="ignore"):
            values = embeddings.numpy().astype(self.dtype)
        if not np.isfinite(values).all():
            largest = embeddings.abs().max().item()
            raise ValueError(
                f"an embedding of {largest} doesn't fit into {self.dtype}; use float32, or check the encoder."
            )
        self.file.seek(len(self.header) + first * self.bytes_an_image)
        try:
            if self.file.write(values.tobytes()) != values.nbytes:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise self._not_kept(error) from error

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        self.file.close()
        if error_type is not None:
            self.partial.unlink(missing_ok=True)
            return
        PartialState().wait_for_everyone()
        if PartialState().is_main_process:
            os.replace(self.partial, self.path)
        PartialState().wait_for_everyone()

    def _check_space(self) -> None:
        free = shutil.disk_usage(self.path.parent).free
        if free < self.size + len(self.header):
            raise OSError(f"{free / 1e6:.1f} MB are free")

    def _not_kept(self, reason: OSError) -> OSError:
        return OSError(
            f"the embeddings take {self.size / 1e6:.1f} MB in {self.path.parent}, and can't be kept there: {reason}; "
            "clear the cache (zoobot-hf cache --clear), set HF_HOME (or the cache's folder, where you gave one) to a "
            "folder that has room and that you may write to, or choose fewer views or float16."
        )


def _header(shape: tuple[int, int, int], *, dtype: str, encoder_name: str) -> bytes:
    """The first bytes of a safetensors file with one tensor: the header's length in 8 bytes, then JSON.

    The format: https://github.com/huggingface/safetensors#format
    """
    size = math.prod(shape) * np.dtype(dtype).itemsize
    tensor = {"dtype": DTYPES[dtype], "shape": shape, "data_offsets": [0, size]}
    text = json.dumps({"__metadata__": {"encoder": encoder_name, "format": FORMAT}, TENSOR: tensor}).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _describe(path: Path) -> CachedFile:
    size = path.stat().st_size
    try:
        with safe_open(path, framework="pt") as file:
            images, views, _ = file.get_slice(TENSOR).get_shape()
            return CachedFile(path, (file.metadata() or {}).get("encoder", ""), images, views, size)
    except SafetensorError:
        return CachedFile(path, "damaged or not finished", 0, 0, size)
