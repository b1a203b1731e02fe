import bz2
import gzip
import math
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from astropy.io import fits
from astropy.io.fits.verify import VerifyWarning

from zoobot_hf import ZoobotImageProcessor
from zoobot_hf.data.images import UnreadableImageError, open_image


@pytest.fixture
def values():
    return np.random.default_rng(0).normal(10, 3, (3, 16, 16))


def saved(tmp_path, *extensions, name="galaxy.fits"):
    fits.HDUList(list(extensions)).writeto(tmp_path / name)
    return tmp_path / name


def only_plane(path):
    (values,) = open_image(path).values()
    return values


@pytest.mark.parametrize("kind", ["float32", "float64", "int16", "int32", "uint8", "uint16", "uint32", "uint64"])
def test_an_image_of_any_type_comes_as_it_was_with_its_first_row_below(tmp_path, values, kind):
    data = values[0].round().astype(kind)
    planes = open_image(saved(tmp_path, fits.PrimaryHDU(data)))
    assert list(planes) == ["0"]
    np.testing.assert_array_equal(planes["0"], data[::-1])


def test_integers_are_scaled_and_blank_ones_are_nan(tmp_path):
    extension = fits.PrimaryHDU(np.array([[1, 2], [3, -99]], dtype=np.int16))
    path = saved(tmp_path, extension)
    with fits.open(path, mode="update", do_not_scale_image_data=True) as file:
        file[0].header.update(BSCALE=0.5, BZERO=100.0, BLANK=-99)
    np.testing.assert_array_equal(only_plane(path), [[101.5, np.nan], [100.5, 101.0]])


@pytest.mark.parametrize("make", [fits.ImageHDU, fits.CompImageHDU])
@pytest.mark.parametrize(("kind", "zero"), [("int16", 2**15), ("int32", 2**31), ("uint8", -128)])
def test_blank_pixels_are_nan_among_integers_of_the_other_sign(tmp_path, make, kind, zero):
    highest = np.iinfo(kind).max
    extension = make(np.array([[highest, highest - 1], [highest - 2, highest - 3]], dtype=kind))
    extension.header.update(BLANK=int(highest), BZERO=zero)
    with warnings.catch_warnings(action="ignore"):  # astropy's, of a card that it wouldn't write itself
        path = saved(tmp_path, fits.PrimaryHDU(), extension)
    top = highest + zero
    np.testing.assert_array_equal(only_plane(path), [[top - 2, top - 3], [np.nan, top - 1]])


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress])
def test_compressed_files_are_read(tmp_path, values, compress):
    path = saved(tmp_path, fits.PrimaryHDU(values[0]))
    packed = tmp_path / "packed"
    packed.write_bytes(compress(path.read_bytes()))
    np.testing.assert_array_equal(only_plane(packed), values[0][::-1])
    np.testing.assert_array_equal(next(iter(open_image(packed.read_bytes()).values())), values[0][::-1])


def test_tile_compressed_files_are_read(tmp_path, values):
    data = (100 * values[0]).astype(np.int32)
    path = saved(tmp_path, fits.PrimaryHDU(), fits.CompImageHDU(data), name="galaxy.fits.fz")
    np.testing.assert_array_equal(only_plane(path), data[::-1])


def test_planes_of_cubes_and_extensions_have_names(tmp_path, values):
    extensions = [fits.PrimaryHDU(values), fits.ImageHDU(values[0], name="VIS"), fits.ImageHDU(values[1])]
    table = fits.BinTableHDU.from_columns([fits.Column("a", "D", array=[1.0])])
    planes = open_image(saved(tmp_path, *extensions, table))
    assert list(planes) == ["0:0", "0:1", "0:2", "VIS", "2"]
    np.testing.assert_array_equal(planes["0:2"], values[2][::-1])


def test_damaged_files_are_named(tmp_path, values):
    path = saved(tmp_path, fits.PrimaryHDU(np.tile(values[0], (20, 20))))
    content = path.read_bytes()
    for damaged in (content[: len(content) // 2], content[: 2880 * 20], gzip.compress(content)[:-200]):
        with pytest.raises(UnreadableImageError, match="it is damaged: "):
            open_image(damaged)
    with pytest.raises(UnreadableImageError, match="what is compressed in it is no FITS file"):
        open_image(gzip.compress(b"hello"))
    with pytest.raises(UnreadableImageError, match="a FITS file without an image"):
        open_image(saved(tmp_path, fits.PrimaryHDU(), name="empty.fits"))


def test_damage_of_which_astropy_has_classes_of_its_own_is_named(tmp_path, values):
    whole = saved(tmp_path, fits.PrimaryHDU(), fits.ImageHDU(values[0], name="SCI")).read_bytes()
    place = whole.find(b"EXTNAME") + 10
    card = whole[:place] + b"#!" + whole[place + 2 :]
    data = (100 * np.tile(values[0], (8, 8))).astype(np.int32)
    packed = saved(tmp_path, fits.PrimaryHDU(), fits.CompImageHDU(data), name="packed.fits.fz").read_bytes()
    for damaged in (card, packed[:-2880] + bytes(2880)):
        with pytest.raises(UnreadableImageError, match="it is damaged: "):
            open_image(damaged)


def test_what_astropy_warns_of_is_read_in_threads_too(tmp_path, values):
    extension = fits.PrimaryHDU(values[0])
    extension.header["BLANK"] = -999  # which floating-point images can't have
    with pytest.warns(VerifyWarning):
        path = saved(tmp_path, extension)
    before = list(warnings.filters)
    with ThreadPoolExecutor(4) as pool:
        opened = list(pool.map(open_image, [path] * 200))
    assert warnings.filters == before
    assert all(np.array_equal(planes["0"], values[0][::-1]) for planes in opened)


def test_extensions_of_one_name_are_told_apart_by_their_versions(tmp_path, values):
    extensions = [fits.ImageHDU(values[number], name="SCI", ver=number + 1) for number in range(2)]
    planes = open_image(saved(tmp_path, fits.PrimaryHDU(), *extensions))
    assert list(planes) == ["SCI,1", "SCI,2"]
    np.testing.assert_array_equal(planes["SCI,1"], values[0][::-1])
    table = fits.BinTableHDU.from_columns([fits.Column("a", "D", array=[1.0])], name="SCI")
    assert list(open_image(saved(tmp_path, fits.PrimaryHDU(), extensions[0], table, name="table.fits"))) == ["SCI"]
    twins = [fits.ImageHDU(values[number], name="SCI", ver=1) for number in range(2)]
    with pytest.raises(UnreadableImageError, match="two extensions SCI,1"):
        open_image(saved(tmp_path, fits.PrimaryHDU(), *twins, name="twins.fits"))


def test_a_fits_bomb_is_not_unpacked(monkeypatch, tmp_path, values):
    monkeypatch.setattr("zoobot_hf.data.images.LARGEST_FITS", 5000)
    content = saved(tmp_path, fits.PrimaryHDU(np.tile(values[0], (4, 4)))).read_bytes()
    for bomb in (content, gzip.compress(content)):
        with pytest.raises(UnreadableImageError, match="may be a decompression bomb"):
            open_image(bomb)


# Stretches ------------------------------------------------------------------------------------------------------


def rendered(planes, **options):
    side = next(iter(planes.values())).shape[0]
    return ZoobotImageProcessor(side, **options).crop_and_resize(planes).permute(1, 2, 0).numpy()


def test_asinh_is_that_of_galaxy_datasets(values):
    # clip to the percentiles, scale to 0-1, asinh; not scaled again
    low, high = np.percentile(values[0], [0, 99.7])
    expected = np.arcsinh((values[0].clip(low, high) - low) / (high - low))
    image = rendered({"0": values[0]})
    np.testing.assert_array_equal(image, np.round(255 * expected).astype(np.uint8)[..., None].repeat(3, 2))
    assert image.max() == round(255 * math.asinh(1))


def test_linear_scales_all_bands_together(values):
    planes = {"z": values[0], "r": 2 * values[1], "g": values[2]}
    options = {"fits_stretch": "linear", "fits_percentiles": [0, 100]}
    image = rendered(planes, fits_bands=["z", "r", "g"], **options)
    bands = np.stack(list(planes.values()), axis=-1)
    expected = np.round(255 * (bands - bands.min()) / (bands.max() - bands.min()))
    np.testing.assert_array_equal(image, expected.astype(np.uint8))
    assert np.array_equal(rendered(planes, fits_bands="r", **options), rendered(planes, fits_bands=["r"], **options))
    swapped = rendered(planes, fits_bands=["G", "R", "z"], **options)
    np.testing.assert_array_equal(swapped, image[..., ::-1])


def test_a_strong_softening_keeps_the_brightest_at_white(values):
    assert rendered({"0": values[0]}, fits_softening=10.0).max() == 255
    assert np.unique(rendered({"0": values[0]}, fits_softening=10.0)).size > 50


def test_lupton_is_astropys():
    red, green, blue = (np.full((4, 4), value) for value in (2.0, 1.0, 0.5))
    red[1, 1] = green[1, 1] = blue[1, 1] = np.nan
    planes, options = {"r": red, "g": green, "b": blue}, {"fits_bands": ["r", "g", "b"], "fits_stretch": "lupton"}
    with np.errstate(invalid="raise"):
        image = rendered(planes, **options, fits_lupton=[0, 5, 8])
    # Lupton et al. 2004: every band times asinh(Q I / stretch) / I, I being the bands' mean; astropy's scale is such
    # that a tenth of white is where a linear stretch has it
    mean = 3.5 / 3
    factor = 25.5 / math.asinh(0.8) * math.asinh(8 * mean / 5) / mean
    np.testing.assert_allclose(image[0, 0], [2 * factor, factor, 0.5 * factor], atol=1)
    assert rendered(planes, **options, fits_lupton=[-1, 5, 8])[1, 1].tolist() == [0, 0, 0]


def test_bad_pixels_are_black_and_too_many_are_refused(values):
    plane = values[0].copy()
    plane[3, 4], plane[5, 6] = np.nan, np.inf
    image = rendered({"0": plane})
    assert image[3, 4].tolist() == image[5, 6].tolist() == [0, 0, 0]
    assert image.max() == 225
    np.testing.assert_array_equal(rendered({"0": plane}, fits_most_bad_pixels=2 / 256), image)
    plane[:8] = np.nan
    with pytest.raises(ValueError, match=r"128 of 256 pixels are NaN or infinite, and fits_most_bad_pixels is 0\.1"):
        rendered({"0": plane})
    with pytest.raises(ValueError, match="256 of 256 pixels are NaN or infinite"):
        rendered({"0": np.full((16, 16), np.nan)}, fits_most_bad_pixels=1.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "has 3 planes .0:0, 0:1, 0:2., and .*; finetune with --fits_bands, or add fits_bands to .*r_config.json"),
        ({"fits_bands": ["VIS"]}, "it has no plane 'VIS' of fits_bands; it has 0:0, 0:1, 0:2"),
        ({"fits_bands": ["0:1"], "fits_stretch": "lupton"}, "which needs 3 bands; 1 is there"),
    ],
)
def test_bands_that_do_not_fit_are_refused(values, options, message):
    with pytest.raises(ValueError, match=message):
        rendered({f"0:{plane}": values[plane] for plane in range(3)}, **options)


def test_images_of_one_value_and_of_several_shapes_are_refused(values):
    with pytest.raises(ValueError, match="its pixels are all 1 between the percentiles"):
        rendered({"0": np.ones((4, 4))})
    planes = {"a": values[0], "b": values[1], "c": values[2, :4]}
    with pytest.raises(ValueError, match=r"have the shapes .*choose equal ones"):
        rendered(planes, fits_bands=["a", "b", "c"])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("fits_stretch", "log"),
        ("fits_bands", ["a", "b"]),
        ("fits_percentiles", [99, 1]),
        ("fits_softening", 0),
        ("fits_lupton", [0, 0, 8]),
        ("fits_most_bad_pixels", 2),
    ],
)
def test_settings_that_do_not_exist_are_refused(name, value):
    with pytest.raises(ValueError, match=f"^{name} is "):
        ZoobotImageProcessor(16, **{name: value})


def test_the_settings_are_saved_with_the_processor(tmp_path):
    options = {"fits_bands": ["z", "r", "g"], "fits_stretch": "lupton", "fits_lupton": [0.0, 0.1, 8.0]}
    ZoobotImageProcessor(16, **options).save_pretrained(tmp_path)
    loaded = ZoobotImageProcessor.from_pretrained(tmp_path)
    assert {name: getattr(loaded, name) for name in options} == options
