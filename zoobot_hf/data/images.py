"""Open images, and find those that can't be opened before a long run depends on them."""

import bz2
import gzip
import io
import multiprocessing
import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from astropy.io import fits
from datasets import Dataset
from datasets import Image as ImageFeature
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

try:
    from torchvision.io import ImageReadMode, decode_jpeg
except ImportError:  # torchvision 0.29 says that a later one will not have it
    decode_jpeg = None

# PIL releases the interpreter while it decodes, so threads help.
DECODING_THREADS = max(4, os.cpu_count() or 4)
BATCHES_IN_A_TURN = 4
MOST_READING_PROCESSES = 16
# How files in FITS begin, and how compressed ones do, which FITS files often are.
FITS_BEGINNING, GZIP_BEGINNING, BZIP2_BEGINNING = b"SIMPLE  =", b"\x1f\x8b", b"BZh"
# As many values as PIL's limit for pixels; a small compressed file can't ask for all of the memory.
LARGEST_FITS = 89_478_485 * 8

Planes = dict[str, npt.NDArray[np.float64]]
Pixels = npt.NDArray[np.uint8]

Item = TypeVar("Item")
Result = TypeVar("Result")
Batch = TypeVar("Batch")


class UnreadableImageError(ValueError):
    """An image that can't be opened; the message says why."""


def open_image(source: str | Path | bytes) -> Image.Image | Pixels | Planes:
    """A decoded image: of a FITS file its planes by name, of a JPEG in colours an array, of any other a PIL image.

    The array is uint8, 0-255, (height, width, 3), and the same as PIL's.

    Args:
        source: Path of a file in FITS or in a format that PIL knows, or such a file's content. FITS may be compressed:
            `.gz`, `.bz2`, `.fz`.

    Raises:
        UnreadableImageError: The file is missing, empty, not an image, truncated, or so large that it is likely a
            decompression bomb (over 89 million pixels, PIL's limit).
    """
    if source == b"" or (not isinstance(source, bytes) and Path(source).is_file() and not Path(source).stat().st_size):
        raise UnreadableImageError("the file is empty")
    beginning = source[:10] if isinstance(source, bytes) else _read_beginning(source)
    if beginning.startswith((FITS_BEGINNING, GZIP_BEGINNING, BZIP2_BEGINNING)):
        return _open_fits(source if isinstance(source, bytes) else Path(source).read_bytes())
    return _open_with_pil(source)


def _read_beginning(path: str | Path) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(10)
    except FileNotFoundError as error:
        raise UnreadableImageError("there is no such file") from error
    except OSError as error:
        raise UnreadableImageError(f"it is damaged: {error}") from error


def _open_fits(content: bytes) -> Planes:
    """The planes of a FITS file, float64, first row at the top, scaled by its BSCALE and BZERO.

    A plane is called after its extension, with the version where several have the name, as in "SCI,2"; or by the
    extension's number where it has no name; of a cube ":0", ":1" and so on follow. What is BLANK becomes NaN.
    """
    planes: Planes = {}
    try:
        content = _decompress(content)
        if len(content) % 2880:  # FITS files are blocks of this length
            raise ValueError("it ends in the middle of a block")
        # Where values are missing, astropy warns and then fails. Its warnings can't be turned into errors here, because
        # Python's filters for them are the same in all threads.
        # Astropy's shortcut for unsigned integers passes BLANK over; without it, those of 64 bits lose digits.
        with fits.open(io.BytesIO(content), memmap=False, uint=b"BLANK  " not in content) as extensions:
            for name, values in _read_planes(extensions):
                if name in planes:
                    raise ValueError(f"it has two extensions {name}")
                planes[name] = values
    except MemoryError:
        raise
    except Exception as error:  # of a damaged file, astropy and its codecs raise classes of their own too
        raise UnreadableImageError(f"it is damaged: {' '.join(str(error).split()) or type(error).__name__}") from error
    if not planes:
        raise UnreadableImageError("it is a FITS file without an image")
    return planes


def _decompress(content: bytes) -> bytes:
    if not content.startswith((GZIP_BEGINNING, BZIP2_BEGINNING)):
        return content
    open_compressed = gzip.open if content.startswith(GZIP_BEGINNING) else bz2.open
    with open_compressed(io.BytesIO(content), "rb") as file:
        whole: bytes = file.read(LARGEST_FITS + 1)
    if len(whole) > LARGEST_FITS:
        raise ValueError("it has over 89 million pixels and may be a decompression bomb")
    if not whole.startswith(FITS_BEGINNING):
        raise ValueError("what is compressed in it is no FITS file")
    return whole


def _read_planes(extensions: fits.HDUList) -> Iterator[tuple[str, npt.NDArray[np.float64]]]:
    names = Counter(extension.name for extension in extensions if extension.is_image)
    for number, extension in enumerate(extensions):
        if not extension.is_image:
            continue
        if np.prod(extension.shape, dtype=float) * 8 > LARGEST_FITS:
            raise ValueError("it has over 89 million pixels and may be a decompression bomb")
        if not 2 <= len([length for length in extension.shape if length != 1]) <= 3:
            continue
        values = np.squeeze(np.asarray(extension.data, dtype=np.float64))[..., ::-1, :]
        if extension.name in ("", "PRIMARY", "COMPRESSED_IMAGE"):
            name = str(number)
        else:
            name = extension.name if names[extension.name] == 1 else f"{extension.name},{extension.ver}"
        if values.ndim == 2:
            yield name, values
        else:
            yield from ((f"{name}:{plane}", values[plane]) for plane in range(len(values)))


def _open_with_pil(source: str | Path | bytes) -> Image.Image | Pixels:
    try:
        # The file is closed also where the image can't be decoded; the pixels stay.
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            # PIL only warns up to twice its limit. Turning that into an error would not be safe in several threads.
            if Image.MAX_IMAGE_PIXELS is not None and image.width * image.height > Image.MAX_IMAGE_PIXELS:
                raise Image.DecompressionBombError
            pixels = _decode_jpeg(source) if (image.format, image.mode) == ("JPEG", "RGB") else None
            if pixels is not None:
                return pixels
            image.load()
    except FileNotFoundError as error:
        raise UnreadableImageError("there is no such file") from error
    except UnidentifiedImageError as error:
        raise UnreadableImageError("it is not an image in a format that PIL knows") from error
    except Image.DecompressionBombError as error:
        raise UnreadableImageError("it has over 89 million pixels and may be a decompression bomb") from error
    except (OSError, SyntaxError, ValueError, RuntimeError) as error:
        # PIL's decoders raise any of these for damaged files, SyntaxError and (for AVIF) RuntimeError among them.
        raise UnreadableImageError(f"it is damaged: {error}") from error
    return image


def _decode_jpeg(source: str | Path | bytes) -> Pixels | None:
    """The same pixels as PIL's in three quarters of the time; None where torchvision refuses, so that PIL says why."""
    if decode_jpeg is None:
        return None
    content = source if isinstance(source, bytes) else Path(source).read_bytes()
    try:
        planes = decode_jpeg(torch.from_numpy(np.frombuffer(content, np.uint8).copy()), mode=ImageReadMode.RGB)
    except RuntimeError:
        return None
    return np.asarray(planes.permute(1, 2, 0).numpy())


def read_ahead(read: Callable[[Item], Result], items: Iterable[Item], *, batch_size: int) -> Iterator[list[Result]]:
    """Batches of what `read` makes of each item, in order; the next two are read in threads while one is used.

    Args:
        read: Reads one item; an error that it raises ends the iteration.
        items: What to read; they are taken as they are needed.
        batch_size: Items in a batch, at least 1; the last one may have fewer.
    """
    remaining = iter(items)
    with ThreadPoolExecutor(DECODING_THREADS) as pool:
        ahead: deque[Future[Result]] = deque()
        while True:
            ahead.extend(pool.submit(read, item) for item in islice(remaining, 3 * batch_size - len(ahead)))
            if not ahead:
                return
            yield [ahead.popleft().result() for _ in range(min(batch_size, len(ahead)))]


def read_in_turns(read: Callable[[Item], Result], items: Iterable[Item], *, batch_size: int) -> Iterator[list[Result]]:
    """Batches of what `read` makes of each item, in order; several are read in threads, then used, then the next.

    For a network on the CPU: threads that decode beside it take turns with its own, which wait for each other at every
    layer.

    Args:
        read: As in `read_ahead`.
        items: As in `read_ahead`.
        batch_size: As in `read_ahead`.
    """
    remaining = iter(items)
    # One for each core: on two of them four threads read 750 galaxies a second, two 800.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        while results := list(pool.map(read, islice(remaining, BATCHES_IN_A_TURN * batch_size))):
            yield from (results[start : start + batch_size] for start in range(0, len(results), batch_size))


class ReadingProcesses:
    """Processes that read batches side by side, for a GPU: threads of one interpreter can't keep it busy.

    Every step of decoding ends in waiting for the interpreter. ConvNeXt nano on an H100 with 16 cores predicted 990
    galaxies a second from files that 16 threads read, and 2618 from those that 15 processes read.

    Args:
        count: How many processes; they start with the first batch and end with `close`.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._pool: ProcessPoolExecutor | None = None

    def read(
        self,
        read: Callable[[Item], Result],
        items: Iterable[Item],
        *,
        batch_size: int,
        collate: Callable[[list[Result]], Batch],
    ) -> Iterator[Batch]:
        """Batches in order, each of what `collate` makes of what `read` makes of its items; the next are on their way.

        Args:
            read: Reads one item; a function that can be pickled. An error that it raises ends the iteration.
            items: What to read; they are taken as they are needed.
            batch_size: Items in a batch, at least 1; the last one may have fewer.
            collate: Makes one batch; a function that can be pickled.

        Raises:
            RuntimeError: A process was killed.
        """
        if self._pool is None:
            self._pool = ProcessPoolExecutor(
                self.count, multiprocessing.get_context("fork"), torch.set_num_threads, (1,)
            )
            self._pool.submit(int).result()  # they start now, before `items` has threads at work
        remaining = iter(items)
        batches = iter(lambda: list(islice(remaining, batch_size)), [])
        ahead: deque[Future[Batch]] = deque()
        while True:
            try:
                wanted = islice(batches, self.count + 2 - len(ahead))
                ahead.extend(self._pool.submit(_read_batch, read, batch, collate) for batch in wanted)
                if not ahead:
                    return
                batch = ahead.popleft().result()
            except BrokenProcessPool as error:
                raise RuntimeError(
                    f"one of {self.count} processes that read images was killed, likely because the memory is full; "
                    f"free some of it, or choose a batch_size below {batch_size}."
                ) from error
            yield batch

    def close(self) -> None:
        """Ends the processes."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None


def _read_batch(read: Callable[[Item], Result], items: list[Item], collate: Callable[[list[Result]], Batch]) -> Batch:
    return collate([read(item) for item in items])


def find_unreadable_images(dataset: Dataset, *, prepare: Callable[[Any], object] | None = None) -> pd.DataFrame:
    """A row for each image that can't be opened: `id_str`, `file_loc` and `reason`, in the dataset's order.

    Args:
        dataset: With `id_str` and `image`.
        prepare: What the opened images are for, such as a processor's `crop_and_resize`; it raises ValueError for one
            that it refuses. It is tried on FITS, floating-point and 16-bit images, the only ones it may refuse.
    """
    undecoded = dataset.select_columns(["id_str", "image"]).cast_column("image", ImageFeature(decode=False))

    def describe(index: int) -> dict[str, str] | None:
        row = undecoded[index]
        if row["image"] is None:
            return {"id_str": row["id_str"], "file_loc": "", "reason": "there is no image"}
        try:
            image = open_image(row["image"]["bytes"] if row["image"]["bytes"] is not None else row["image"]["path"])
            if prepare is not None and _may_be_refused(image):
                prepare(image)
        except ValueError as error:
            return {"id_str": row["id_str"], "file_loc": row["image"]["path"] or "", "reason": str(error)}
        return None

    with ThreadPoolExecutor(DECODING_THREADS) as pool:
        reasons = pool.map(describe, range(len(dataset)))
        found = list(tqdm(reasons, total=len(dataset), desc="checking images", unit="image"))
    return pd.DataFrame([row for row in found if row], columns=["id_str", "file_loc", "reason"])


def _may_be_refused(image: Image.Image | Pixels | Planes) -> bool:
    return isinstance(image, dict) or (isinstance(image, Image.Image) and image.mode.startswith(("F", "I")))


def check_images(dataset: Dataset, *, prepare: Callable[[Any], object] | None = None) -> None:
    """Checks that every image of a dataset can be opened.

    Args:
        dataset: With `id_str` and `image`.
        prepare: As in `find_unreadable_images`.

    Raises:
        UnreadableImageError: Some can't; the message has the first five with their reasons, and how many there are.
    """
    unreadable = find_unreadable_images(dataset, prepare=prepare)
    if len(unreadable):
        examples = "; ".join(
            f"{row['file_loc'] or row['id_str']}: {row['reason'].rstrip('.')}"
            for row in unreadable.head(5).to_dict("records")
        )
        more = "; ... (zoobot_hf.data.images.find_unreadable_images lists all)" if len(unreadable) > 5 else ""
        raise UnreadableImageError(
            f"{len(unreadable)} of {len(dataset)} images can't be read: {examples}{more}. Mend or remove them."
        )
