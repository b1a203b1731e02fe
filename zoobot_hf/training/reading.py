"""The images of a dataset: for the encoder, and as pictures for people, all through the package's own reader."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, overload

from datasets import Dataset
from datasets import Image as ImageFeature
from PIL import Image
from torch import Tensor
from torch.utils.data import get_worker_info

from zoobot_hf.data.images import DECODING_THREADS, UnreadableImageError, open_image
from zoobot_hf.models.image_processing_zoobot import ZoobotImageProcessor


def undecoded(dataset: Dataset) -> Dataset:
    """A dataset whose images are left as their files have them.

    Pillow, through which `datasets` decodes, reads FITS without a stretch and turns what has an EXIF orientation.

    Args:
        dataset: With `image`.

    Raises:
        ValueError: It has no column `image`, or a transform of its own, which would get what is not decoded.
    """
    if "image" not in dataset.column_names:
        raise ValueError(f"the dataset has no column image; it has {', '.join(dataset.column_names)}.")
    if dataset.format["type"] == "custom":
        raise ValueError(
            "the dataset has a transform (with_transform, set_transform), which would not be applied; make new images "
            "with map, or take it away with reset_format()."
        )
    return dataset.with_format(None).cast_column("image", ImageFeature(decode=False))


def read_wide_field(image: Any, processor: ZoobotImageProcessor, *, margin: float, name: str) -> Tensor:
    """An image as `processor.crop_and_resize` makes it, uint8, (channels, height, width).

    Args:
        image: Of a dataset's image column: `bytes`, or `path` where they are None; or decoded already.
        processor: The encoder's image processor.
        margin: Factor by which the field is wider than the processor's crop.
        name: What an error calls an image without a path.

    Raises:
        UnreadableImageError: It can't be opened, or the processor refuses it.
    """
    path = image["path"] if _is_undecoded(image) else None
    try:
        return processor.crop_and_resize(_opened(image), margin=margin)
    except ValueError as error:
        raise UnreadableImageError(f"{path or name} can't be read: {str(error).rstrip('.')}.") from error


def read_wide_fields(
    images: Sequence[Any], processor: ZoobotImageProcessor, *, margin: float, name: str
) -> list[Tensor]:
    """Images as `read_wide_field` gives them.

    They are decoded in threads, since PIL and PyTorch release the interpreter; one after the other in a data loader's
    worker, which has others beside it: two of them read 540 galaxies a second so, and 490 with threads.

    Args:
        images: As `read_wide_field` takes them.
        processor: Likewise.
        margin: Likewise.
        name: Likewise.

    Raises:
        UnreadableImageError: Likewise.
    """

    def read(image: Any) -> Tensor:
        return read_wide_field(image, processor, margin=margin, name=name)

    if get_worker_info() is not None:
        return [read(image) for image in images]
    with ThreadPoolExecutor(DECODING_THREADS) as pool:
        return list(pool.map(read, images))


class Pictures(Sequence[Image.Image]):
    """The images of a dataset to look at, whole, in the stretch that the encoder sees; opened when asked for.

    Args:
        dataset: With `image`.
        processor: The encoder's image processor.
    """

    def __init__(self, dataset: Dataset, processor: ZoobotImageProcessor) -> None:
        self.images = undecoded(dataset.with_format(None))
        self.processor = processor

    def __len__(self) -> int:
        return len(self.images)

    @overload
    def __getitem__(self, row: int) -> Image.Image: ...

    @overload
    def __getitem__(self, row: slice) -> list[Image.Image]: ...

    def __getitem__(self, row: int | slice) -> Image.Image | list[Image.Image]:
        """The picture of a row.

        Args:
            row: Its number, or those of several.
        """
        if isinstance(row, slice):
            return [self[number] for number in range(*row.indices(len(self)))]
        pixels = self.processor.to_eight_bit(_opened(self.images[row]["image"]))
        return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)


def _is_undecoded(image: Any) -> bool:
    return isinstance(image, dict) and image.keys() == {"bytes", "path"}


def _opened(image: Any) -> Any:
    if not _is_undecoded(image):
        return image
    return open_image(image["bytes"] if image["bytes"] is not None else image["path"])
