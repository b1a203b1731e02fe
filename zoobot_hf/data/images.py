"""Open images, and find those that can't be opened before a long run depends on them."""

import io
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import TypeVar

import pandas as pd
from datasets import Dataset
from datasets import Image as ImageFeature
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

# PIL releases the interpreter while it decodes, so threads help.
DECODING_THREADS = 4

Item = TypeVar("Item")
Result = TypeVar("Result")


class UnreadableImageError(ValueError):
    """An image that can't be opened; the message says why."""


def open_image(source: str | Path | bytes) -> Image.Image:
    """A decoded image.

    Args:
        source: Path of a file in a format that PIL knows, or such a file's content.

    Raises:
        UnreadableImageError: The file is missing, empty, not an image, truncated, or so large that it is likely a
            decompression bomb (over 89 million pixels, PIL's limit).
    """
    if source == b"" or (not isinstance(source, bytes) and Path(source).is_file() and not Path(source).stat().st_size):
        raise UnreadableImageError("the file is empty")
    try:
        # The file is closed also where the image can't be decoded; the pixels stay.
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            # PIL only warns up to twice its limit. Turning that into an error would not be safe in several threads.
            if Image.MAX_IMAGE_PIXELS is not None and image.width * image.height > Image.MAX_IMAGE_PIXELS:
                raise Image.DecompressionBombError
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


def find_unreadable_images(dataset: Dataset, *, description: str = "checking images") -> pd.DataFrame:
    """A row for each image that can't be opened: `id_str`, `file_loc` and `reason`, in the dataset's order.

    Args:
        dataset: With `id_str` and `image`.
        description: What the progress bar says.
    """
    undecoded = dataset.select_columns(["id_str", "image"]).cast_column("image", ImageFeature(decode=False))

    def describe(index: int) -> dict[str, str] | None:
        row = undecoded[index]
        try:
            open_image(row["image"]["bytes"] if row["image"]["bytes"] is not None else row["image"]["path"])
        except UnreadableImageError as error:
            return {"id_str": row["id_str"], "file_loc": row["image"]["path"] or "", "reason": str(error)}
        return None

    with ThreadPoolExecutor(DECODING_THREADS) as pool:
        found = list(tqdm(pool.map(describe, range(len(dataset))), total=len(dataset), desc=description, unit="image"))
    return pd.DataFrame([row for row in found if row], columns=["id_str", "file_loc", "reason"])


def check_images(dataset: Dataset, *, description: str = "checking images") -> None:
    """Checks that every image of a dataset can be opened.

    Args:
        dataset: With `id_str` and `image`.
        description: What the progress bar says.

    Raises:
        UnreadableImageError: Some can't; the message has the first five with their reasons, and how many there are.
    """
    unreadable = find_unreadable_images(dataset, description=description)
    if len(unreadable):
        examples = "; ".join(
            f"{row['file_loc'] or row['id_str']}: {row['reason']}" for row in unreadable.head(5).to_dict("records")
        )
        more = "; ..." if len(unreadable) > 5 else ""
        raise UnreadableImageError(
            f"{len(unreadable)} of {len(dataset)} images can't be read: {examples}{more}. Mend or remove them."
        )
