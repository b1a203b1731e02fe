"""ZoobotImageProcessor: images of galaxies to pixel values."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.nn import functional
from transformers import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor
from transformers.utils import TensorType

try:
    from astropy.visualization import make_lupton_rgb
except ImportError:  # this file also travels in repositories, and images that are not FITS do without it
    make_lupton_rgb = None

# PIL's modes for 16-bit images; "I" has room for 32 bits, but is how older versions of PIL open 16-bit PNG files.
SIXTEEN_BIT_MODES = ("I;16", "I;16B", "I;16L", "I")
INTERPOLATIONS = {2: "bilinear", 3: "bicubic"}  # PIL's numbers, as transformers keeps them
# Far above any encoder's; a damaged preprocessor_config.json can't ask for all of the memory.
LARGEST_SIZE = 4096
STRETCHES = ("asinh", "lupton", "linear")


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
        fits_bands: For FITS images the names of the planes that become red, green and blue, or the one that becomes
            grey: extension names ("SCI,2" where several have the name), or numbers as text, with ":0", ":1", ... for
            the planes of a cube, in any case. Not needed where a file has a single plane.
        fits_stretch: How FITS values become 0-255. "linear" cuts them at `fits_percentiles` and scales them to 0-1;
            "asinh" then takes asinh(x * `fits_softening`), which at 1 ends at 0.88 as galaxy-datasets has it for
            Zoobot (`fits_to_jpg_like_scaling`) and beyond 1.18, where it would exceed 1, is scaled to end there;
            "lupton" makes colours as Lupton et al. 2004, PASP 116, 133, through astropy.
        fits_percentiles: Two percentiles of the finite pixels of all bands together, 0-100.
        fits_softening: The factor in "asinh", above 0.
        fits_lupton: For "lupton" the minimum, the stretch and Q, in the units of the image.
        fits_most_bad_pixels: Largest share of pixels, 0-1, that may be NaN or infinite. Those are black; an image
            with more is refused.
        **kwargs: Kept as attributes, as transformers does.

    Raises:
        ValueError: A size that isn't square, a zoom below 1, another interpolation, numbers of channels that don't
            agree, a standard deviation of 0, or FITS settings that don't exist.
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
        fits_bands: Sequence[str] | None = None,
        fits_stretch: str = "asinh",
        fits_percentiles: tuple[float, float] | list[float] = (0.0, 99.7),
        fits_softening: float = 1.0,
        fits_lupton: tuple[float, float, float] | list[float] = (0.0, 5.0, 8.0),
        fits_most_bad_pixels: float = 0.1,
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
        names = [fits_bands] if isinstance(fits_bands, str) else fits_bands
        self.fits_bands = None if names is None else [str(band) for band in names]
        self.fits_stretch = fits_stretch
        self.fits_percentiles = list(fits_percentiles)
        self.fits_softening = fits_softening
        self.fits_lupton = list(fits_lupton)
        self.fits_most_bad_pixels = fits_most_bad_pixels
        self._check()

    @property
    def pixels(self) -> int:
        """Height and width of the output, in pixels."""
        return self.size["height"]

    def preprocess(self, images: Any, *, return_tensors: str | TensorType | None = "pt", **kwargs: Any) -> BatchFeature:
        """The pixel values of one image or of a list of images.

        Args:
            images: PIL images or arrays: uint8 (0-255) or uint16 (0-65535), (height, width) or
                (height, width, channels). Of a FITS file its planes by name, float, (height, width) each.
            return_tensors: "pt" for torch tensors, "np" for numpy arrays.
            **kwargs: Not used; transformers passes some.

        Returns:
            `pixel_values`, float32, (batch, channels, height, width), in 0-1 before any normalisation.

        Raises:
            ValueError: An image of another kind or without pixels; or no image.
        """
        batch = images if isinstance(images, (list, tuple)) else [images]
        if not batch:
            raise ValueError("images is an empty list; give at least one image.")
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
        picture = self.to_eight_bit(image)
        height, width, _ = picture.shape
        shorter_side = min(height, width)
        field = shorter_side / self.zoom
        wide_field = min(field * margin, shorter_side)
        # The same number for images of all sizes.
        pixels = round(self.pixels * min(margin, self.zoom))
        side = max(1, round(wide_field))
        left, top = (width - side) // 2, (height - side) // 2
        planes = torch.from_numpy(picture[None, top : top + side, left : left + side]).permute(0, 3, 1, 2)
        # PyTorch's antialiased uint8 resize takes a third of the time of PIL's.
        return functional.interpolate(planes, (pixels, pixels), mode=INTERPOLATIONS[self.resample], antialias=True)[0]

    def to_eight_bit(self, image: Any) -> NDArray[np.uint8]:
        """The whole image as uint8, 0-255, (height, width, channels).

        Args:
            image: A PIL image, an array or the planes of a FITS file, as for `preprocess`.

        Raises:
            ValueError: An image of another kind or without pixels.
        """
        if isinstance(image, dict):
            image = self._render(image)
        if not isinstance(image, Image.Image):
            image = _as_eight_bit_array(image)
            _check_size(image.shape[1], image.shape[0])
            if image.ndim == 3 and image.shape[2] == self.num_channels:
                return np.require(image, requirements=["C", "W"])  # what PyTorch takes; mostly it is that already
            image = Image.fromarray(image)
        _check_size(*image.size)
        picture = self._without_alpha(image)
        return np.array(picture).reshape(picture.height, picture.width, self.num_channels)

    def rescale_and_normalize(self, images: torch.Tensor) -> torch.Tensor:
        """The encoder's input: float32, (batch, channels, height, width), on the images' device.

        Args:
            images: uint8 or float, 0-255, (batch, channels, height, width).
        """
        pixel_values = images * self.rescale_factor  # float32 for uint8 as well
        if not self.do_normalize:
            return pixel_values
        mean, std = (pixel_values.new_tensor(v).view(-1, 1, 1) for v in (self.image_mean, self.image_std))
        return (pixel_values - mean) / std

    def _without_alpha(self, picture: Image.Image) -> Image.Image:
        """The image in 8 bits, "RGB" or "L"."""
        if picture.mode in SIXTEEN_BIT_MODES:
            picture = Image.fromarray(_as_eight_bit_array(_as_sixteen_bit_array(picture)))
        if picture.mode == "F":
            raise ValueError("the image holds floating-point values, whose range is unknown; scale it to uint8 first.")
        if "transparency" in picture.info or picture.mode in ("RGBA", "LA", "PA"):
            with_alpha = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, (0, 0, 0, 255)), with_alpha)
        return picture.convert("RGB" if self.num_channels == 3 else "L")

    def _render(self, planes: dict[str, NDArray[np.float64]]) -> NDArray[np.uint8]:
        """The chosen bands of a FITS image as uint8, 0-255: (height, width), or (height, width, 3)."""
        bands = self._choose_bands(planes)
        is_good = np.isfinite(bands)
        bad = int(is_good.size - is_good.sum())
        if bad == is_good.size or bad > self.fits_most_bad_pixels * is_good.size:
            raise ValueError(
                f"{bad} of {is_good.size} pixels are NaN or infinite, and fits_most_bad_pixels is "
                f"{self.fits_most_bad_pixels:g}."
            )
        if self.fits_stretch == "lupton":
            minimum, stretch, softening = self.fits_lupton
            red, green, blue = np.where(is_good, bands, minimum)
            with np.errstate(invalid="ignore"):  # a pixel at the minimum in all bands is 0 / 0, and black
                return np.asarray(make_lupton_rgb(red, green, blue, minimum=minimum, stretch=stretch, Q=softening))
        low, high = np.percentile(bands[is_good], self.fits_percentiles)
        if not high > low:
            raise ValueError(f"its pixels are all {low:g} between the percentiles {self.fits_percentiles}.")
        scaled = (np.where(is_good, bands, low).clip(low, high) - low) / (high - low)
        if self.fits_stretch == "asinh":
            scaled = np.arcsinh(scaled * self.fits_softening) / max(1, math.asinh(self.fits_softening))
        levels = np.round(255 * scaled.clip(0, 1)).astype(np.uint8)
        return np.asarray(levels[0] if len(levels) == 1 else np.moveaxis(levels, 0, -1))

    def _choose_bands(self, planes: dict[str, NDArray[np.float64]]) -> NDArray[np.float64]:
        """The chosen bands, (1 or 3, height, width)."""
        names = ", ".join(planes)
        if self.fits_bands is None and len(planes) > 1:
            raise ValueError(
                f"it has {len(planes)} planes ({names}), and the image processor's fits_bands don't say which one is "
                "grey, or red, green, blue; finetune with --fits_bands, or add fits_bands to the model's "
                "preprocessor_config.json."
            )
        # Whatever the case: astropy has extensions' names in capitals.
        planes = {name.upper(): plane for name, plane in planes.items()}
        wanted = [band.upper() for band in self.fits_bands or planes]
        missing = [band for band in wanted if band not in planes]
        if missing:
            raise ValueError(f"it has no plane {missing[0]!r} of fits_bands; it has {names}.")
        shapes = {planes[band].shape for band in wanted}
        if len(shapes) > 1:
            raise ValueError(f"its planes {', '.join(wanted)} have the shapes {sorted(shapes)}; choose equal ones.")
        if self.fits_stretch == "lupton" and len(wanted) != 3:
            raise ValueError(f"fits_stretch is 'lupton', which needs 3 bands; {len(wanted)} is there.")
        return np.stack([planes[band] for band in wanted])

    def _check(self) -> None:
        self._check_fits()
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

    def _check_fits(self) -> None:
        if self.fits_stretch not in STRETCHES:
            raise ValueError(f"fits_stretch is {self.fits_stretch!r}; choose one of {', '.join(STRETCHES)}.")
        if self.fits_stretch == "lupton" and make_lupton_rgb is None:
            raise ValueError("fits_stretch is 'lupton', which needs astropy; install it.")
        if self.fits_bands is not None and len(self.fits_bands) not in (1, 3):
            raise ValueError(f"fits_bands is {self.fits_bands}; give one name, or three for red, green and blue.")
        if len(self.fits_percentiles) != 2 or not 0 <= self.fits_percentiles[0] < self.fits_percentiles[1] <= 100:
            raise ValueError(f"fits_percentiles is {self.fits_percentiles}; give a lower and a higher one, 0-100.")
        if not 0 < self.fits_softening < math.inf:
            raise ValueError(f"fits_softening is {self.fits_softening}; give a number above 0.")
        if len(self.fits_lupton) != 3 or not min(self.fits_lupton[1:]) > 0:
            raise ValueError(f"fits_lupton is {self.fits_lupton}; give a minimum, a stretch above 0 and Q above 0.")
        if not 0 <= self.fits_most_bad_pixels <= 1:
            raise ValueError(f"fits_most_bad_pixels is {self.fits_most_bad_pixels}; give a share from 0 to 1.")


def _check_size(width: int, height: int) -> None:
    if min(width, height) == 0:
        raise ValueError(f"the image has {width} x {height} pixels; at least 1 x 1 is needed.")


def _as_sixteen_bit_array(picture: Image.Image) -> NDArray[np.uint16]:
    array = np.asarray(picture)
    if array.min() < 0 or array.max() > 65535:
        raise ValueError(f"the image has values from {array.min()} to {array.max()}; scale them to 0-65535 first.")
    return array.astype(np.uint16)


def _as_eight_bit_array(image: Any) -> NDArray[np.uint8]:
    array = np.asarray(image)
    if array.dtype.kind == "U":
        raise ValueError(f"the image is the text {str(image)!r}; open the file first, such as with PIL's Image.open.")
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
