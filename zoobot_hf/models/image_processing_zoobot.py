"""ZoobotImageProcessor: images of galaxies to pixel values."""

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.nn import functional
from transformers import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor
from transformers.utils import TensorType

# PIL's modes for 16-bit images; "I" has room for 32 bits, but is how older versions of PIL open 16-bit PNG files.
SIXTEEN_BIT_MODES = ("I;16", "I;16B", "I;16L", "I")
INTERPOLATIONS = {2: "bilinear", 3: "bicubic"}  # PIL's numbers, as transformers keeps them
# Far above any encoder's; a damaged preprocessor_config.json can't ask for all of the memory.
LARGEST_SIZE = 4096


class ZoobotImageProcessor(BaseImageProcessor):
    """Crops the centre of each image, resizes it and scales it to what the encoder was trained on.

    Galaxy Zoo encoders take RGB in 0-1 at 224 px without normalisation, whatever their timm configuration says; the
    defaults are theirs. Alpha is laid over black (the sky), palettes are resolved, 16-bit values divided by 257.

    Args:
        size: Height and width of the output in pixels; the two are equal.
        zoom: Factor of at least 1 by which the centre is magnified: 1 / zoom of the shorter side is kept.
        num_channels: 3 for RGB, 1 for grey.
        resample: PIL's number for the interpolation: 2 (bilinear) or 3 (bicubic).
        rescale_factor: Number that each uint8 value is multiplied by.
        do_normalize: Whether `image_mean` is subtracted and the result divided by `image_std`.
        image_mean: A mean for each channel, after rescaling.
        image_std: A standard deviation for each channel, after rescaling.
        **kwargs: Kept as attributes, as transformers does.

    Raises:
        ValueError: A size that isn't square, a zoom below 1, another interpolation, numbers of channels that don't
            agree, or a standard deviation of 0.
    """

    model_input_names = ["pixel_values"]  # noqa: RUF012  transformers declares it so

    def __init__(
        self,
        size: dict[str, int] | int = 224,
        *,
        zoom: float = 1.0,
        num_channels: int = 3,
        resample: int = 2,
        rescale_factor: float = 1 / 255,
        do_normalize: bool = False,
        image_mean: list[float] | None = None,
        image_std: list[float] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.size = {"height": size, "width": size} if isinstance(size, int) else dict(size)
        self.zoom = zoom
        self.num_channels = num_channels
        self.resample = resample
        self.rescale_factor = rescale_factor
        self.do_normalize = do_normalize
        self.image_mean = image_mean
        self.image_std = image_std
        self._check()

    @property
    def pixels(self) -> int:
        """Height and width of the output, in pixels."""
        return self.size["height"]

    def preprocess(self, images: Any, *, return_tensors: str | TensorType | None = "pt", **kwargs: Any) -> BatchFeature:
        """The pixel values of one image or of a list of images.

        Args:
            images: PIL images or arrays: uint8 (0-255) or uint16 (0-65535), (height, width) or
                (height, width, channels).
            return_tensors: "pt" for torch tensors, "np" for numpy arrays.
            **kwargs: Not used; transformers passes some.

        Returns:
            `pixel_values`, float32, (batch, channels, height, width), in 0-1 before any normalisation.

        Raises:
            ValueError: An image of another kind or without pixels.
        """
        batch = images if isinstance(images, (list, tuple)) else [images]
        cropped = torch.stack([self.crop_and_resize(image) for image in batch])
        return BatchFeature({"pixel_values": self.rescale_and_normalize(cropped)}, tensor_type=return_tensors)

    def crop_and_resize(self, image: Any, *, margin: float = 1.0) -> torch.Tensor:
        """The centre of one image, resized: uint8, 0-255, (channels, pixels, pixels).

        Args:
            image: A PIL image or an array, as for `preprocess`.
            margin: Factor of at least 1 for a wider field at the same scale, from which a rotated crop is cut. The
                field never exceeds the image.

        Raises:
            ValueError: An image of another kind or without pixels.
        """
        picture = self._as_eight_bit(image)
        shorter_side = min(picture.size)
        field = shorter_side / self.zoom
        wide_field = min(field * margin, shorter_side)
        pixels = round(self.pixels * wide_field / field)
        side = max(1, round(wide_field))
        left, top = (picture.width - side) // 2, (picture.height - side) // 2
        crop = np.array(picture.crop((left, top, left + side, top + side)))
        planes = torch.from_numpy(crop.reshape(1, side, side, self.num_channels)).permute(0, 3, 1, 2)
        # PyTorch's antialiased uint8 resize takes a third of the time of PIL's.
        return functional.interpolate(planes, (pixels, pixels), mode=INTERPOLATIONS[self.resample], antialias=True)[0]

    def rescale_and_normalize(self, images: torch.Tensor) -> torch.Tensor:
        """The encoder's input: float32, (batch, channels, height, width), on the images' device.

        Args:
            images: uint8 or float, 0-255, (batch, channels, height, width).
        """
        pixel_values = images.float() * self.rescale_factor
        if not self.do_normalize:
            return pixel_values
        mean, std = (pixel_values.new_tensor(v).view(-1, 1, 1) for v in (self.image_mean, self.image_std))
        return (pixel_values - mean) / std

    def _as_eight_bit(self, image: Any) -> Image.Image:
        picture = image if isinstance(image, Image.Image) else Image.fromarray(_as_eight_bit_array(image))
        if min(picture.size) == 0:
            raise ValueError(f"the image has {picture.width} x {picture.height} pixels; at least 1 x 1 is needed.")
        if picture.mode in SIXTEEN_BIT_MODES:
            picture = Image.fromarray(_as_eight_bit_array(_as_sixteen_bit_array(picture)))
        if picture.mode == "F":
            raise ValueError("the image holds floating-point values, whose range is unknown; scale it to uint8 first.")
        if "transparency" in picture.info or picture.mode in ("RGBA", "LA", "PA"):
            with_alpha = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, (0, 0, 0, 255)), with_alpha)
        return picture.convert("RGB" if self.num_channels == 3 else "L")

    def _check(self) -> None:
        height, width = self.size.get("height"), self.size.get("width")
        if not isinstance(height, int) or height != width or not 0 < height <= LARGEST_SIZE:
            raise ValueError(f"size is {self.size}; give an equal, positive height and width up to {LARGEST_SIZE}.")
        if not 1 <= self.zoom < math.inf:
            raise ValueError(f"zoom is {self.zoom}; give 1 for the whole image or more for its centre.")
        if self.resample not in INTERPOLATIONS:
            raise ValueError(f"resample is {self.resample!r}; give 2 (bilinear) or 3 (bicubic).")
        if self.num_channels not in (1, 3):
            raise ValueError(f"num_channels is {self.num_channels}; give 3 (RGB) or 1 (grey).")
        if self.do_normalize:
            for name in ("image_mean", "image_std"):
                values = getattr(self, name)
                if values is None or len(values) != self.num_channels:
                    raise ValueError(f"{name} is {values}; do_normalize needs {self.num_channels} numbers in it.")
            if not min(self.image_std or []) > 0:
                raise ValueError(f"image_std is {self.image_std}; give numbers above 0.")


def _as_sixteen_bit_array(picture: Image.Image) -> NDArray[np.uint16]:
    array = np.asarray(picture)
    if array.min() < 0 or array.max() > 65535:
        raise ValueError(f"the image has values from {array.min()} to {array.max()}; scale them to 0-65535 first.")
    return array.astype(np.uint16)


def _as_eight_bit_array(image: Any) -> NDArray[np.uint8]:
    array = np.asarray(image)
    if array.dtype == np.uint16:
        array = np.round(array / 257).astype(np.uint8)
    if array.dtype != np.uint8:
        raise ValueError(
            f"the image is an array of {array.dtype}; give uint8 (0-255), uint16 (0-65535) or a PIL image."
        )
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (3, 4)):
        raise ValueError(f"the image has the shape {array.shape}; give (height, width) or (height, width, 3).")
    return array
