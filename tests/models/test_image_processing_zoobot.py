import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor

from zoobot_hf import ZoobotImageProcessor


def values_of(image, *, pixels=8, **settings):
    """The pixel values of one image, (channels, height, width)."""
    return ZoobotImageProcessor(pixels, **settings)(image)["pixel_values"][0]


def plain(color, *, mode="RGB", size=(8, 8)):
    return Image.new(mode, size, color)


def colors_of(values):
    """The one colour of a plain image, 0-255."""
    assert torch.equal(values, values[:, :1, :1].expand_as(values))
    return (values[:, 0, 0] * 255).round().int().tolist()


def gradient(height, width):
    """An RGB image whose red is 4 * x and whose green is 4 * y."""
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([4 * x, 4 * y, 0 * x], axis=-1).astype(np.uint8))


# Kinds of images ------------------------------------------------------------------------------------------------


def test_rgb_becomes_float32_in_0_to_1():
    values = values_of(plain((255, 128, 0)))
    assert values.dtype == torch.float32
    assert values.shape == (3, 8, 8)
    assert values.min() == 0
    assert values.max() == 1
    assert colors_of(values) == [255, 128, 0]


def test_pixels_of_the_same_size_are_not_touched():
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    expected = torch.from_numpy(pixels).permute(2, 0, 1) * (1 / 255)
    assert torch.equal(values_of(Image.fromarray(pixels)), expected)


def test_grey_becomes_three_equal_channels():
    assert colors_of(values_of(plain(77, mode="L"))) == [77, 77, 77]


def test_grey_stays_one_channel_where_the_encoder_has_one():
    assert colors_of(values_of(plain(77, mode="L"), num_channels=1)) == [77]


def test_colour_becomes_one_channel_by_its_luminance():
    # ITU-R 601: 0.299 R + 0.587 G + 0.114 B
    assert colors_of(values_of(plain((200, 100, 50)), num_channels=1)) == [round(59.8 + 58.7 + 5.7)]


def test_alpha_lies_over_a_black_sky():
    assert colors_of(values_of(plain((200, 100, 50, 0), mode="RGBA"))) == [0, 0, 0]
    assert colors_of(values_of(plain((200, 100, 50, 255), mode="RGBA"))) == [200, 100, 50]
    assert colors_of(values_of(plain((200, 100, 50, 51), mode="RGBA"))) == [40, 20, 10]


def test_grey_with_alpha_lies_over_black_too():
    assert colors_of(values_of(plain((100, 51), mode="LA"))) == [20, 20, 20]


def test_a_palette_is_resolved():
    image = plain((200, 100, 50)).quantize(4)
    assert image.mode == "P"
    assert colors_of(values_of(image)) == [200, 100, 50]


def test_a_palettes_transparent_colour_is_black(tmp_path):
    image = Image.new("P", (8, 8), 0)
    image.putpalette([250, 200, 150, 10, 20, 30])
    image.paste(1, (4, 0, 8, 8))
    image.save(tmp_path / "palette.png", transparency=0)
    values = values_of(Image.open(tmp_path / "palette.png"))
    assert colors_of(values[:, :, :4]) == [0, 0, 0]
    assert colors_of(values[:, :, 4:]) == [10, 20, 30]


def test_a_transparent_colour_without_an_alpha_channel_is_black(tmp_path):
    plain((1, 2, 3)).save(tmp_path / "rgb.png", transparency=(1, 2, 3))
    assert colors_of(values_of(Image.open(tmp_path / "rgb.png"))) == [0, 0, 0]


def test_sixteen_bits_are_divided_by_257(tmp_path):
    levels = np.array([[0, 257 * 9 + 129, 257 * 200, 65535]], dtype=np.uint16).repeat(4, axis=0)
    Image.fromarray(levels).save(tmp_path / "deep.png")
    image = Image.open(tmp_path / "deep.png")
    assert image.mode in ("I;16", "I")
    values = values_of(image, pixels=4)
    assert (values[0, 0] * 255).round().int().tolist() == [0, 10, 200, 255]
    assert torch.equal(values[0], values[2])


def test_thirty_two_bit_integers_count_as_sixteen():
    image = Image.fromarray(np.full((8, 8), 257 * 9, dtype=np.int32))
    assert image.mode == "I"
    assert colors_of(values_of(image)) == [9, 9, 9]


def test_black_and_white_bits_become_0_and_1():
    assert colors_of(values_of(plain(1, mode="1"))) == [255, 255, 255]
    assert colors_of(values_of(plain(0, mode="1"))) == [0, 0, 0]


def test_cmyk_becomes_rgb():
    assert colors_of(values_of(plain((0, 255, 255, 0), mode="CMYK"))) == [255, 0, 0]


@pytest.mark.parametrize(("dtype", "level"), [(np.uint8, 51), (np.uint16, 51 * 257)])
@pytest.mark.parametrize("shape", [(8, 8), (8, 8, 1), (8, 8, 3)])
def test_arrays_are_taken_as_images_are(dtype, level, shape):
    assert colors_of(values_of(np.full(shape, level, dtype=dtype))) == [51, 51, 51]


def test_an_arrays_fourth_channel_is_alpha():
    array = np.full((8, 8, 4), 100, dtype=np.uint8)
    array[..., 3] = 51
    assert colors_of(values_of(array)) == [20, 20, 20]


# Batches --------------------------------------------------------------------------------------------------------


def test_images_of_different_sizes_and_modes_make_one_batch():
    images = [plain((255, 0, 0)), plain(0, mode="L", size=(30, 20)), np.full((5, 9), 255, np.uint8)]
    values = ZoobotImageProcessor(16)(images)["pixel_values"]
    assert values.shape == (3, 3, 16, 16)
    assert values.mean(dim=(2, 3)).tolist() == [[1, 0, 0], [0, 0, 0], [1, 1, 1]]


def test_numpy_arrays_come_out_when_asked():
    values = ZoobotImageProcessor(8)(plain((255, 0, 0)), return_tensors="np")["pixel_values"]
    assert isinstance(values, np.ndarray)
    assert values.dtype == np.float32
    assert values.shape == (1, 3, 8, 8)


# Scale and field ------------------------------------------------------------------------------------------------


def test_normalisation_follows_rescaling():
    settings = {"do_normalize": True, "image_mean": [0.5, 0.25, 0], "image_std": [0.5, 0.25, 2]}
    values = values_of(plain((255, 255, 255)), **settings)
    assert values[:, 0, 0].tolist() == [1, 3, 0.5]


def test_without_do_normalize_mean_and_standard_deviation_do_nothing():
    values = values_of(plain((255, 255, 255)), image_mean=[0.5] * 3, image_std=[0.5] * 3)
    assert values.unique().tolist() == [1]


def test_the_rescale_factor_is_the_processors():
    assert values_of(plain((255, 255, 255)), rescale_factor=1 / 255**2).max() == pytest.approx(1 / 255)


def test_zoom_keeps_the_centre():
    image = plain((0, 0, 255), size=(64, 64))
    image.paste((255, 0, 0), (16, 16, 48, 48))
    assert colors_of(values_of(image, pixels=32, zoom=2)) == [255, 0, 0]
    assert values_of(image, pixels=32, zoom=1)[:, 0, 0].tolist() == [0, 0, 1]


def test_zoom_says_how_much_of_the_shorter_side_is_left():
    red = values_of(gradient(40, 60), pixels=20, zoom=2)[0] * 255 / 4
    # 20 of 40 pixels: x from 20 to 40 of 60
    assert torch.allclose(red[0], torch.arange(20, 40).float(), atol=0.01)
    # 34.3 of 48 are 34.
    red = values_of(gradient(48, 48), pixels=34, zoom=1.4)[0] * 255 / 4
    assert torch.allclose(red[0], torch.arange(7, 41).float(), atol=0.01)


@pytest.mark.parametrize("size", [(60, 40), (40, 60)])
def test_of_an_oblong_image_the_middle_square_is_taken(size):
    width, height = size
    values = values_of(gradient(height, width), pixels=40) * 255 / 4
    assert values[0, 0, 0] == pytest.approx((width - 40) / 2)
    assert values[1, 0, 0] == pytest.approx((height - 40) / 2)
    assert values[0, 0, -1] == pytest.approx(width - (width - 40) / 2 - 1)


@pytest.mark.parametrize("size", [(1, 1), (1, 50), (50, 1)])
@pytest.mark.parametrize("zoom", [1, 3.7])
def test_an_image_of_one_pixel_fills_the_field(size, zoom):
    assert colors_of(values_of(plain((9, 8, 7), size=size), zoom=zoom)) == [9, 8, 7]


def test_a_margin_widens_the_field_at_the_same_scale():
    smooth = gradient(60, 60)
    processor = ZoobotImageProcessor(20, zoom=2)
    crop = processor.crop_and_resize(smooth)
    wide = processor.crop_and_resize(smooth, margin=1.4)
    assert crop.shape == (3, 20, 20)
    assert wide.shape == (3, 28, 28)
    assert wide.dtype == torch.uint8
    assert (wide[:, 4:-4, 4:-4].int() - crop.int()).abs().max() <= 1


def test_a_margin_ends_where_the_image_does():
    assert ZoobotImageProcessor(20).crop_and_resize(gradient(60, 60), margin=1.4).shape == (3, 20, 20)
    assert ZoobotImageProcessor(20, zoom=1.2).crop_and_resize(gradient(60, 60), margin=1.4).shape == (3, 24, 24)


# Saving ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"zoom": 1.4, "resample": 3},
        {"num_channels": 1, "rescale_factor": 1 / 255**2},
        {"do_normalize": True, "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]},
    ],
)
def test_a_saved_processor_gives_the_same_values(settings, tmp_path, galaxy_images):
    processor = ZoobotImageProcessor(24, **settings)
    processor.save_pretrained(tmp_path)
    loaded = ZoobotImageProcessor.from_pretrained(tmp_path)
    images = galaxy_images[:3]
    assert torch.equal(loaded(images)["pixel_values"], processor(images)["pixel_values"])


def test_the_rescale_factor_is_saved(tmp_path):
    ZoobotImageProcessor(24, rescale_factor=1 / 255**2).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert saved["rescale_factor"] == 1 / 255**2
    assert saved["size"] == {"height": 24, "width": 24}


def test_auto_image_processor_loads_it(tmp_path):
    ZoobotImageProcessor(24, zoom=1.5).save_pretrained(tmp_path)
    loaded = AutoImageProcessor.from_pretrained(tmp_path)
    assert isinstance(loaded, ZoobotImageProcessor)
    assert (loaded.pixels, loaded.zoom) == (24, 1.5)


# Errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, -5, {"height": 8, "width": 9}, {"shortest_edge": 224}])
def test_a_size_that_is_not_square_is_refused(size):
    with pytest.raises(ValueError, match=r"size is .*; give an equal, positive height and width"):
        ZoobotImageProcessor(size)


@pytest.mark.parametrize("zoom", [0.9, 0, float("nan"), float("inf")])
def test_a_zoom_below_1_is_refused(zoom):
    with pytest.raises(ValueError, match=r"zoom is .*; give 1 for the whole image or more"):
        ZoobotImageProcessor(8, zoom=zoom)


def test_two_channels_are_refused():
    with pytest.raises(ValueError, match=r"num_channels is 2; give 3 \(RGB\) or 1 \(grey\)"):
        ZoobotImageProcessor(8, num_channels=2)


def test_normalisation_without_its_numbers_is_refused():
    with pytest.raises(ValueError, match="image_mean is None; do_normalize needs 3 numbers"):
        ZoobotImageProcessor(8, do_normalize=True)
    with pytest.raises(ValueError, match=r"image_std is \[1\]; do_normalize needs 3 numbers"):
        ZoobotImageProcessor(8, do_normalize=True, image_mean=[0, 0, 0], image_std=[1])


def test_a_standard_deviation_of_0_is_refused():
    with pytest.raises(ValueError, match=r"image_std is \[1, 0, 1\]; give numbers above 0"):
        ZoobotImageProcessor(8, do_normalize=True, image_mean=[0, 0, 0], image_std=[1, 0, 1])


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((8, 8, 3), np.float32), "an array of float32; give uint8"),
        (np.zeros((8, 8, 3), np.int64), "an array of int64; give uint8"),
        ("galaxy.jpg", "the image is the text 'galaxy.jpg'; open the file first"),
        ([], "images is an empty list; give at least one image"),
        (np.zeros((8, 8, 2), np.uint8), r"shape \(8, 8, 2\); give \(height, width\)"),
        (np.zeros((2, 8, 8, 3), np.uint8), r"shape \(2, 8, 8, 3\); give \(height, width\)"),
        (np.zeros((0, 8), np.uint8), "8 x 0 pixels; at least 1 x 1"),
    ],
)
def test_an_array_that_is_no_image_is_refused(array, message):
    with pytest.raises(ValueError, match=message):
        values_of(array)


def test_floating_point_images_are_refused():
    with pytest.raises(ValueError, match="floating-point values, whose range is unknown"):
        values_of(plain(0.5, mode="F"))


@pytest.mark.parametrize("level", [-1, 65536])
def test_integers_beyond_sixteen_bits_are_refused(level):
    with pytest.raises(ValueError, match=f"values from {level} to {level}; scale them to 0-65535"):
        values_of(Image.fromarray(np.full((8, 8), level, dtype=np.int32)))
