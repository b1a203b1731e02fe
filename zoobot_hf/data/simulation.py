"""Galaxies drawn with known morphology: data for demonstrations, tests and pretraining that needs no download.

Conventions. Images are (count, rows, columns, channels), first row at the top, north up and east to the left; the
galaxy sits at the centre of the frame, (size - 1) / 2 in both directions. Position angles are in degrees from north
through east. Surface brightness is in display units, in which the noise of a survey image is about 1. It does not
depend on the number of pixels: drawings of one galaxy at two sizes show the same scene.

The frame follows Galaxy Zoo DECaLS: 424 pixels, about 17 times the half-light radius, on a grey sky just above black
(Walmsley et al. 2022, https://arxiv.org/abs/2102.08414). Levels, grain and colours were set by eye and by histogram
against such images.
"""

import io
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from astropy.visualization import make_lupton_rgb
from datasets import ClassLabel, Dataset, Features, Image, Value
from numpy.typing import NDArray
from PIL import Image as PillowImage

# Drawn in float32; the numbers of one galaxy may be double.
FloatArray = NDArray[np.floating[Any]]

RING_CLASS_NAMES = ["not ring", "ring"]
SMALLEST_SIZE = 32

# Seeing and noise are stated on the survey's own grid and carried to the size that is drawn.
SURVEY_SIZE = 424
NATIVE_PIXEL_ARCSEC = 0.262  # Dark Energy Camera
RADIUS_IN_SURVEY_FRAME = (
    25.0  # Galaxy Zoo DECaLS cuts its frames so that the half-light radius is about this, in pixels
)

# `Dataset.from_generator` keeps what it made on disk: raise this number when the drawings change.
DRAWING_VERSION = 1

# Chunks of about this many pixels stay in the processor's cache; larger ones are slower.
PIXELS_IN_A_CHUNK = 16 * 128 * 128

# A galaxy has a stream of random numbers for each purpose, so that it never depends on the others in its table.
PARAMETER_STREAM, TEXTURE_STREAM, SOURCE_STREAM, NOISE_STREAM, DISTURBANCE_STREAM, CLUMP_STREAM = range(6)
TEXTURE_MODES = 12
DISTURBANCE_MODES = 4
MOST_CLUMPS = 16

# What the galaxies of `draw_parameters` don't have; those of a whole survey do.
REGULAR = {
    "disk_thickness": 0.0,
    "disk_edge": 0.0,
    "disturbance": 0.0,
    "clump_count": 0,
    "clump_strength": 0.0,
    "companion_strength": 0.0,
    "companion_size": 1.0,
    "companion_distance": 1.0,
    "companion_angle_deg": 0.0,
    "display_gain": 1.0,
    "saturation": 1.0,
}

# Core radius over full width at half maximum of a Moffat profile with beta 3.
MOFFAT_SCALE = 1 / (2 * math.sqrt(2 ** (1 / 3) - 1))

# The display shows z, r, g as red, green, blue. A galaxy with these colours in magnitudes comes out grey.
GREY_G_MINUS_R, GREY_R_MINUS_Z = 0.64, 0.52
OLD_COLOURS, YOUNG_COLOURS = (0.72, 0.60), (0.48, 0.34)  # g - r, r - z
SKY_LEVEL, STRETCH, SOFTENING = 1.6, 25.0, 8.0
FAINTEST_COLOUR, COLOURED_ABOVE = 0.15, 8.0


@dataclass(frozen=True)
class SimulatedGalaxies:
    """Drawn galaxies and what they were drawn from.

    Attributes:
        images: uint8, 0-255, (count, size, size, 3), red, green, blue.
        parameters: A row for each image, in the same order, indexed by the galaxy's number. Columns ("radii" are
            half-light radii of the disk; a strength of 0 is none):

            - `id_str`: "simulated-{seed}-{number}".
            - `ring`: 1 or 0.
            - `half_light_arcsec`: apparent half-light radius, arcseconds; small ones are more blurred.
            - `disk_radius_px`, `disk_sersic_index`: face-on half-light radius in pixels, profile of the disk.
            - `surface_brightness`: of the disk, mean within its half-light radius, display units.
            - `young_fraction`: of the disk's light, 0 to 1.
            - `lens_strength` (relative to the disk's mean surface brightness), `lens_radius` (radii): a plateau with an
              edge.
            - `bulge_to_total` (of bulge and smooth disk), `bulge_radius` (radii), `bulge_sersic_index`.
            - `inclination_deg` (0 is face-on), `position_angle_deg` (of the major axis).
            - `lopsidedness`: 0 is symmetric; the disk reaches out further by this fraction on one side.
            - `bar_strength` (relative to the disk's mean surface brightness), `bar_length` (radii),
              `bar_angle_deg` (from the major axis, in the disk).
            - `spiral_arms`, `spiral_strength` (relative to the disk), `pitch_angle_deg`,
              `arm_length_deg` (angle about the centre, bar's end to arm's end), `winding` (1 or -1).
            - `clumpiness`: of arms and ring, 0 is smooth.
            - `ring_strength` (relative to the disk's own light there), `ring_radius` (radii), `ring_width` (standard
              deviation over ring radius), `ring_axis_ratio` (in the disk, along the bar), `gap_depth` (0 to 1).
            - `disk_thickness`: axis ratio of the disk seen edge-on.
            - `disk_edge` (radii): where the disk ends; 0 where it fades out.
            - `disturbance` (radii): how far light is out of place, in smooth waves over the galaxy.
            - `clump_count`, `clump_strength` (relative to the disk's mean surface brightness): knots of young stars.
            - `companion_strength` (relative to the disk's mean surface brightness), `companion_size` and
              `companion_distance` (radii), `companion_angle_deg`: a second galaxy, merging or in front.
            - `psf_fwhm_px`: seeing in pixels.
            - `sky_noise`, `noise_grain`: noise in display units at 424 pixels, and its correlation length (Gaussian
              sigma) there in pixels.
            - `neighbour_count`: stars and other galaxies in the frame.
            - `display_gain`, `saturation`: how bright and how colourful the display is; 1 is the survey's.
    """

    images: NDArray[np.uint8]
    parameters: pd.DataFrame


def simulate_galaxies(count: int, *, seed: int, size: int = 128, ring_fraction: float = 0.5) -> SimulatedGalaxies:
    """Galaxies with their true parameters, all held in memory.

    Galaxy i is the same for every `count`.

    Args:
        count: How many galaxies, 1 or more.
        seed: Names the sample; 0 or more.
        size: Height and width in pixels, 32 or more. The frame's field of view stays the same.
        ring_fraction: Chance that a galaxy has a ring, 0 to 1.

    Returns:
        Images and parameters in the same order.

    Raises:
        ValueError: If an argument is out of its range.
    """
    parameters = draw_parameters(count, seed=seed, size=size, ring_fraction=ring_fraction)
    return SimulatedGalaxies(images=draw_galaxies(parameters, seed=seed, size=size), parameters=parameters)


def simulate_ring_dataset(count: int, *, seed: int, size: int = 128, ring_fraction: float = 0.5) -> Dataset:
    """A dataset of drawn galaxies, written to the datasets cache chunk by chunk.

    Args:
        count: How many galaxies, 1 or more.
        seed: Names the sample; 0 or more.
        size: Height and width in pixels, 32 or more.
        ring_fraction: Chance that a galaxy has a ring, 0 to 1.

    Returns:
        Columns `id_str`, `image` (JPEG of quality 95, decoded on access), `label` ("not ring" or "ring") and the other
        columns of `SimulatedGalaxies.parameters`. The same arguments give the same dataset, the second time from the
        cache.

    Raises:
        ValueError: If an argument is out of its range.
    """
    columns = draw_parameters(1, seed=seed, size=size, ring_fraction=ring_fraction).drop(columns=["id_str", "ring"])
    _check_at_least("count", count, 1)
    kinds = {name: Value("int32" if kind.kind == "i" else "float32") for name, kind in columns.dtypes.items()}
    features = {"id_str": Value("string"), "image": Image(), "label": ClassLabel(names=RING_CLASS_NAMES), **kinds}
    arguments = {"count": count, "seed": seed, "size": size, "ring_fraction": ring_fraction}
    return Dataset.from_generator(
        _examples, features=Features(features), gen_kwargs={**arguments, "drawing_version": DRAWING_VERSION}
    )


def draw_parameters(
    count: int, *, seed: int, size: int = 128, ring_fraction: float = 0.5, first: int = 0
) -> pd.DataFrame:
    """A table with the true parameters of galaxies `first` to `first + count - 1`, indexed by galaxy.

    Args:
        count: How many galaxies, 1 or more.
        seed: Names the sample; 0 or more.
        size: Height and width of the frame in pixels, 32 or more; only the columns in pixels depend on it.
        ring_fraction: Chance that a galaxy has a ring, 0 to 1.
        first: Number of the first galaxy, 0 or more.

    Returns:
        The columns are those of `SimulatedGalaxies.parameters`, the index is the galaxy's number.

    Raises:
        ValueError: If an argument is out of its range.
    """
    _check_at_least("count", count, 1)
    _check_at_least("seed", seed, 0)
    _check_at_least("size", size, SMALLEST_SIZE)
    if not 0 <= ring_fraction <= 1:
        raise ValueError(f"ring_fraction is {ring_fraction}, allowed is 0 to 1: pass the share of rings, such as 0.5.")
    numbers = range(first, first + count)
    rows = [_one_galaxy(np.random.default_rng((seed, number, PARAMETER_STREAM)), ring_fraction) for number in numbers]
    parameters = pd.DataFrame(rows, index=pd.Index(numbers, name="number"))
    parameters[["disk_radius_px", "psf_fwhm_px"]] *= size / SURVEY_SIZE
    parameters = parameters.assign(**REGULAR)
    parameters.insert(0, "id_str", [f"simulated-{seed}-{number:06d}" for number in numbers])
    return parameters


def draw_galaxies(
    parameters: pd.DataFrame, *, seed: int, size: int = 128, frame: float = SURVEY_SIZE
) -> NDArray[np.uint8]:
    """Images as a survey would show them: blurred, among stars and other galaxies, with noise and the Lupton stretch.

    Args:
        parameters: Table of `draw_parameters`, its values changed or not. The index chooses the random numbers for
            texture, neighbours and noise.
        seed: Names the sample; 0 or more.
        size: Height and width in pixels; the one that the table was made for.
        frame: Height and width in the survey's pixels; the one that the table was made for.

    Returns:
        uint8, 0-255, (count, size, size, 3) in the order of the table.
    """
    images = np.empty((len(parameters), size, size, 3), dtype=np.uint8)
    for rows in _chunks(len(parameters), size):
        galaxies = parameters.iloc[rows]
        old, young = draw_light(galaxies, seed=seed, size=size)
        bands = _mix_bands(old, young)
        bands = _observe(bands, galaxies, seed=seed, pixel=frame / size)
        images[rows] = _to_rgb(bands, galaxies)
    return images


def draw_light(parameters: pd.DataFrame, *, seed: int, size: int = 128) -> tuple[FloatArray, FloatArray]:
    """The galaxies alone, before atmosphere and camera: the light of old and of young stars.

    Args:
        parameters: Table of `draw_parameters`, its values changed or not.
        seed: Names the sample; 0 or more. It sets the texture of arms and rings only.
        size: Height and width in pixels; the one that the table was made for.

    Returns:
        Two float32 arrays (count, size, size), surface brightness in display units, 0 or more.
    """
    radius, angle = _disk_coordinates(parameters, size, seed)
    disk = _column(parameters, "surface_brightness") * _disk_profile(radius, parameters) * _gap(radius, parameters)
    disk *= _edge(radius, parameters)
    texture = _texture(radius, angle, parameters, seed)
    young_structure = disk * _spiral_arms(radius, angle, parameters) * texture
    ring = _ring(radius, angle, parameters) * texture
    young_fraction = _column(parameters, "young_fraction")
    old = (1 - young_fraction) * disk + _bulge(parameters, size, seed) + _bar(radius, angle, parameters)
    # Rings of early-type disks are as red as the disk; those of late types are blue with it.
    ring_youth = 0.25 + 0.75 * young_fraction
    old += (1 - ring_youth) * ring
    young = young_fraction * disk + young_structure + ring_youth * ring
    _add_clumps(young, radius, angle, parameters, seed)
    _add_companions(old, young, parameters)
    return old, young


def jpeg_of(image: NDArray[np.uint8]) -> bytes:
    """A drawn image as a JPEG file of quality 95.

    Args:
        image: uint8, 0-255, (height, width, 3).
    """
    buffer = io.BytesIO()
    PillowImage.fromarray(image).save(buffer, format="JPEG", quality=95)
    return buffer.getvalue()


def survey_pixel_arcsec(half_light_arcsec: float) -> float:
    """Height and width in arcseconds of a pixel of the survey's frame, which follows the galaxy's size.

    Args:
        half_light_arcsec: The galaxy's apparent half-light radius, arcseconds.
    """
    # Galaxy Zoo DECaLS stops zooming in at 0.1 arcseconds a pixel: smaller galaxies are smaller in the frame.
    return max(half_light_arcsec / RADIUS_IN_SURVEY_FRAME, 0.1)


def _check_at_least(name: str, value: int, smallest: int) -> None:
    if value < smallest:
        raise ValueError(f"{name} is {value}, allowed is {smallest} or more: pass a larger {name}.")


def _examples(
    count: int, seed: int, size: int, ring_fraction: float, drawing_version: int
) -> Iterator[dict[str, object]]:
    """Examples of the dataset; `drawing_version` only tells the cache apart."""
    for rows in _chunks(count, size):
        parameters = draw_parameters(
            rows.stop - rows.start, seed=seed, size=size, ring_fraction=ring_fraction, first=rows.start
        )
        images = draw_galaxies(parameters, seed=seed, size=size)
        records = parameters.rename(columns={"ring": "label"}).to_dict(orient="records")
        for image, record in zip(images, records, strict=True):
            values = {str(name): value for name, value in record.items()}
            yield {"image": {"bytes": jpeg_of(image), "path": None}, **values}


def _chunks(count: int, size: int) -> Iterator[slice]:
    length = max(1, PIXELS_IN_A_CHUNK // size**2)
    for start in range(0, count, length):
        yield slice(start, min(start + length, count))


# --- what a galaxy is like -------------------------------------------------------------------------------------------


def _one_galaxy(rng: np.random.Generator, ring_fraction: float) -> dict[str, float]:
    has_ring = int(rng.random() < ring_fraction)
    lateness = rng.random() ** 1.5  # 0: a red lenticular, 1: a blue late spiral
    return {
        "ring": has_ring,
        **_frame_parameters(rng),
        **_disk_parameters(rng, lateness),
        **_bar_parameters(rng, has_ring),
        **_spiral_parameters(rng, lateness, has_ring),
        **_ring_parameters(rng, has_ring),
        "neighbour_count": int(rng.poisson(_log_normal(rng, 24, 0.5))),
    }


def _log_normal(rng: np.random.Generator, median: float, scatter: float) -> float:
    return median * math.exp(scatter * rng.standard_normal())


def _frame_parameters(rng: np.random.Generator) -> dict[str, float]:
    half_light_arcsec = _log_normal(rng, 4.4, 0.4)
    pixel_arcsec = survey_pixel_arcsec(half_light_arcsec)
    return {
        "half_light_arcsec": half_light_arcsec,
        "disk_radius_px": half_light_arcsec / pixel_arcsec * _log_normal(rng, 1.5, 0.28),
        "psf_fwhm_px": _log_normal(rng, 1.25, 0.13) / pixel_arcsec,
        "sky_noise": _log_normal(rng, 1.0, 0.2),
        "noise_grain": 0.54 * NATIVE_PIXEL_ARCSEC / pixel_arcsec,
    }


def _disk_parameters(rng: np.random.Generator, lateness: float) -> dict[str, float]:
    return {
        "disk_sersic_index": rng.uniform(0.5, 1.15),
        "surface_brightness": _log_normal(rng, 52 - 35 * lateness, 0.55),
        "young_fraction": float(np.clip(rng.normal(0.9 * lateness - 0.05, 0.15), 0, 1)),
        "lens_strength": _log_normal(rng, 0.7, 0.5) if rng.random() < 0.35 else 0.0,
        "lens_radius": rng.uniform(0.6, 1.4),
        "bulge_to_total": float(np.clip(rng.normal(0.36 - 0.33 * lateness, 0.12), 0.01, 0.7)),
        "bulge_radius": rng.uniform(0.08, 0.28),
        "bulge_sersic_index": rng.uniform(1.0, 3.0),
        # Random orientations are uniform in the cosine; the nearly edge-on ones show no ring to anyone.
        "inclination_deg": math.degrees(math.acos(rng.uniform(0.45, 1.0))),
        "position_angle_deg": rng.uniform(0, 180),
        "lopsidedness": abs(rng.normal(0, 0.03 + 0.1 * lateness)),
    }


def _bar_parameters(rng: np.random.Generator, has_ring: int) -> dict[str, float]:
    has_bar = rng.random() < (0.6 if has_ring else 0.45)
    return {
        "bar_strength": _log_normal(rng, 5.5, 0.6) if has_bar else 0.0,
        "bar_length": rng.uniform(0.4, 1.0),
        "bar_angle_deg": rng.uniform(0, 180),
    }


def _spiral_parameters(rng: np.random.Generator, lateness: float, has_ring: int) -> dict[str, float]:
    has_arms = rng.random() < (0.15 if has_ring else 0.45) + 0.4 * lateness
    # Two tightly wound arms nearly close: the sky's own imitation of a ring.
    is_tight = rng.random() < 0.15
    return {
        "spiral_arms": 2 if is_tight else int(rng.choice([2, 3, 4], p=[0.7, 0.18, 0.12])),
        "spiral_strength": _log_normal(rng, 0.8, 0.5) if has_arms else 0.0,
        "pitch_angle_deg": rng.uniform(7, 12) if is_tight else rng.uniform(14, 32),
        "arm_length_deg": rng.uniform(150, 420),
        "winding": int(rng.choice([-1, 1])),
        "clumpiness": 0.15 + 0.55 * lateness * rng.random(),
    }


def _ring_parameters(rng: np.random.Generator, has_ring: int) -> dict[str, float]:
    return {
        "ring_strength": has_ring * _log_normal(rng, 1.8, 0.45),
        "ring_radius": rng.uniform(1.1, 2.1),
        "ring_width": rng.uniform(0.08, 0.17),
        "ring_axis_ratio": rng.uniform(0.75, 1.0),
        "gap_depth": has_ring * rng.uniform(0.2, 0.7),
    }


# --- its light -------------------------------------------------------------------------------------------------------


def _column(parameters: pd.DataFrame, name: str) -> FloatArray:
    """Values of a column that broadcast over (count, rows, columns)."""
    return parameters[name].to_numpy(np.float32)[:, None, None]


def _radians(parameters: pd.DataFrame, name: str) -> FloatArray:
    return np.deg2rad(_column(parameters, name))


def _disk_coordinates(parameters: pd.DataFrame, size: int, seed: int) -> tuple[FloatArray, FloatArray]:
    """Radius in half-light radii and angle from the major axis in radians, both measured in the plane of the disk."""
    west, north = _disturb(*_sky_coordinates(size), parameters, seed)
    position_angle = _radians(parameters, "position_angle_deg")
    sine, cosine = np.sin(position_angle), np.cos(position_angle)
    major = north * cosine - west * sine
    minor = (north * sine + west * cosine) / _axis_ratio(parameters)
    angle = np.arctan2(minor, major)
    radius = np.hypot(major, minor) / _column(parameters, "disk_radius_px")
    lopsided_side = 2 * _radians(parameters, "bar_angle_deg")
    radius /= 1 + _column(parameters, "lopsidedness") * np.cos(angle - lopsided_side)
    return radius, angle


def _sky_coordinates(size: int) -> tuple[FloatArray, FloatArray]:
    """Pixels to the west and to the north of the centre."""
    axis = np.arange(size, dtype=np.float32) - (size - 1) / 2
    return axis[None, None, :], -axis[None, :, None]


def _axis_ratio(parameters: pd.DataFrame) -> FloatArray:
    """Apparent axis ratio of an oblate spheroid (Hubble 1926, ApJ 64, 321)."""
    cosine, thickness = np.cos(_radians(parameters, "inclination_deg")), _column(parameters, "disk_thickness")
    ratio: FloatArray = np.where(thickness > 0, np.sqrt(cosine**2 + thickness**2 * (1 - cosine**2)), cosine)
    return ratio


def _disturb(west: FloatArray, north: FloatArray, parameters: pd.DataFrame, seed: int) -> tuple[FloatArray, FloatArray]:
    """Coordinates with smooth random waves in them, which leave the centre where it is."""
    if not parameters["disturbance"].any():
        return west, north
    rows = [
        np.random.default_rng((seed, int(number), DISTURBANCE_STREAM)).normal(0, 1, (5, DISTURBANCE_MODES))
        for number in parameters.index
    ]
    to_west, to_north, push_west, push_north, phase = np.stack(rows, axis=1)[..., None, None].astype(np.float32)
    scale = _column(parameters, "disk_radius_px")
    amplitude = _column(parameters, "disturbance") * scale / math.sqrt(DISTURBANCE_MODES)
    moved_west, moved_north = np.zeros_like(west), np.zeros_like(north)
    for mode in range(DISTURBANCE_MODES):
        wave = np.cos((to_west[:, mode] * west + to_north[:, mode] * north) / scale + 3 * phase[:, mode])
        wave = amplitude * (wave - np.cos(3 * phase[:, mode]))
        moved_west = moved_west + push_west[:, mode] * wave
        moved_north = moved_north + push_north[:, mode] * wave
    return west + moved_west, north + moved_north


def _sersic(radius: FloatArray, index: FloatArray) -> FloatArray:
    """Sersic profile whose mean within the half-light radius is 1.

    The scale b_n is the expansion of Ciotti & Bertin (1999), https://arxiv.org/abs/astro-ph/9911078, equation 18.

    Args:
        radius: In half-light radii, (count, rows, columns).
        index: Sersic index, 0.4 or more, broadcasting with the radius.
    """
    scale = 2 * index - 1 / 3 + 4 / (405 * index) + 46 / (25515 * index**2)
    gamma = np.vectorize(math.gamma)(2 * index)
    centre = scale ** (2 * index) / (index * gamma)
    # float32 throughout: double would take twice the time and not change a pixel.
    return np.exp(-scale * radius ** (1 / index)) * centre.astype(np.float32)


def _disk_profile(radius: FloatArray, parameters: pd.DataFrame) -> FloatArray:
    """Sersic profile with a lens on it, relative to the mean surface brightness of the disk."""
    edge = 8 * (radius / _column(parameters, "lens_radius") - 1)
    lens = _column(parameters, "lens_strength") / (1 + np.exp(np.minimum(edge, 30)))
    return _sersic(radius, _column(parameters, "disk_sersic_index")) + lens


def _edge(radius: FloatArray, parameters: pd.DataFrame) -> FloatArray:
    """Share of the disk's light that is left at its edge."""
    edge = _column(parameters, "disk_edge")
    share: FloatArray = np.where(edge > 0, 1 / (1 + np.exp(np.clip(7 * (radius - edge), -30, 30))), 1)
    return share.astype(np.float32)


def _gap(radius: FloatArray, parameters: pd.DataFrame) -> FloatArray:
    """Share of the disk's light that is left where a ring has swept up the gas inside it."""
    distance = (radius / _column(parameters, "ring_radius") - 0.62) / 0.2
    return 1 - _column(parameters, "gap_depth") * np.exp(-0.5 * distance**2)


def _bulge(parameters: pd.DataFrame, size: int, seed: int) -> FloatArray:
    """A slightly flattened spheroid that holds its share of the total flux."""
    flattened = parameters.assign(
        # A bulge looks rounder than its disk: half of the inclination, and no lopsidedness.
        inclination_deg=parameters["inclination_deg"] / 2,
        disk_radius_px=parameters["disk_radius_px"] * parameters["bulge_radius"],
        lopsidedness=0.0,
        disturbance=0.0,
    )
    radius, _ = _disk_coordinates(flattened, size, seed)
    share = _column(parameters, "bulge_to_total")
    flux_ratio = share / (1 - share) * _axis_ratio(parameters) / _axis_ratio(flattened)
    brightness = _column(parameters, "surface_brightness") * flux_ratio / _column(parameters, "bulge_radius") ** 2
    # A steep bulge is cut at a fifth of its radius, as no camera resolves it further; the seeing hides the difference.
    return brightness * _sersic(np.maximum(radius, 0.1), _column(parameters, "bulge_sersic_index"))


def _bar(radius: FloatArray, angle: FloatArray, parameters: pd.DataFrame) -> FloatArray:
    turned = angle - _radians(parameters, "bar_angle_deg")
    along = radius * np.cos(turned) / _column(parameters, "bar_length")
    across = radius * np.sin(turned) / (0.28 * _column(parameters, "bar_length"))
    squared = along**2 + across**2
    brightness = _column(parameters, "bar_strength") * _column(parameters, "surface_brightness")
    return brightness * np.exp(-1.5 * squared)


def _spiral_arms(radius: FloatArray, angle: FloatArray, parameters: pd.DataFrame) -> FloatArray:
    """Brightness of logarithmic arms relative to the disk; they start where the bar ends and fade over a radian."""
    from_bar = np.log(radius / _column(parameters, "bar_length") + 1e-3)
    swept = from_bar / np.tan(_radians(parameters, "pitch_angle_deg"))
    turned = angle - _radians(parameters, "bar_angle_deg") - swept * _column(parameters, "winding")
    wave = np.cos(_column(parameters, "spiral_arms") * turned)
    start = np.clip(1 + 2 * from_bar, 0, 1)
    end = 1 / (1 + np.exp(np.clip(2 * (swept - _radians(parameters, "arm_length_deg")), -30, 30)))
    return _column(parameters, "spiral_strength") * start * end * np.exp(2.2 * (wave - 1)) * 1.6


def _ring(radius: FloatArray, angle: FloatArray, parameters: pd.DataFrame) -> FloatArray:
    turned = angle - _radians(parameters, "bar_angle_deg")
    stretch = 1 + (1 / _column(parameters, "ring_axis_ratio") - 1) * np.sin(turned) ** 2
    place = _column(parameters, "ring_radius")
    distance = (radius * stretch / place - 1) / _column(parameters, "ring_width")
    disk_there = _column(parameters, "surface_brightness") * _disk_profile(place, parameters)
    return _column(parameters, "ring_strength") * disk_there * np.exp(-0.5 * distance**2)


def _add_clumps(light: FloatArray, radius: FloatArray, angle: FloatArray, parameters: pd.DataFrame, seed: int) -> None:
    """Adds knots to the light in place, round in the plane of the disk, fewer and fainter far out."""
    for row in np.flatnonzero(parameters["clump_count"]).tolist():
        galaxy = parameters.iloc[row]
        rng = np.random.default_rng((seed, int(str(parameters.index[row])), CLUMP_STREAM))
        values = rng.random((4, MOST_CLUMPS))[:, : int(galaxy["clump_count"])].astype(np.float32)
        places, turns, widths, peaks = values[..., None, None]
        distance, width = 2.2 * np.sqrt(places), 0.05 + 0.2 * widths**2
        x, y = radius[row] * np.cos(angle[row]), radius[row] * np.sin(angle[row])
        squared = (x - distance * np.cos(2 * np.pi * turns)) ** 2 + (y - distance * np.sin(2 * np.pi * turns)) ** 2
        peak = galaxy["clump_strength"] * galaxy["surface_brightness"] * 2 * peaks**2 * np.exp(-distance / 2)
        light[row] += (peak * np.exp(-0.5 * squared / width**2)).sum(axis=0)


def _add_companions(old: FloatArray, young: FloatArray, parameters: pd.DataFrame) -> None:
    """Adds a second galaxy to the light in place, an exponential disk as blue as the first."""
    for row in np.flatnonzero(parameters["companion_strength"]).tolist():
        galaxy = parameters.iloc[[row]]
        west, north = _sky_coordinates(old.shape[-1])
        place = _column(galaxy, "companion_distance") * _column(galaxy, "disk_radius_px")
        turn = _radians(galaxy, "companion_angle_deg")
        west, north = west + place * np.sin(turn), north - place * np.cos(turn)
        # Turned and flattened unlike the first galaxy, by numbers that the table has for other ends.
        own = 2 * turn + _radians(galaxy, "bar_angle_deg")
        along = west * np.cos(own) + north * np.sin(own)
        across = (north * np.cos(own) - west * np.sin(own)) / (0.45 + 0.5 * np.abs(np.sin(3 * own)))
        size = _column(galaxy, "companion_size") * _column(galaxy, "disk_radius_px")
        profile = _sersic(np.hypot(along, across) / size, np.full((1, 1, 1), 1.2, dtype=np.float32))
        light = (_column(galaxy, "companion_strength") * _column(galaxy, "surface_brightness") * profile)[0]
        share = float(galaxy["young_fraction"].iloc[0])
        old[row] += (1 - share) * light
        young[row] += share * light


def _texture(radius: FloatArray, angle: FloatArray, parameters: pd.DataFrame, seed: int) -> FloatArray:
    """Patchiness of star formation, about 1 on average: the exponential of a few random waves on the disk."""
    rows = [_texture_modes(np.random.default_rng((seed, int(number), TEXTURE_STREAM))) for number in parameters.index]
    across, around, phase = np.stack(rows, axis=1)[..., None, None].astype(np.float32)
    waves = np.zeros_like(radius)
    for mode in range(TEXTURE_MODES):
        waves += np.cos(across[:, mode] * radius + around[:, mode] * angle + phase[:, mode])
    amplitude = _column(parameters, "clumpiness")
    return np.exp(amplitude * waves * math.sqrt(2 / TEXTURE_MODES) - amplitude**2 / 2)


def _texture_modes(rng: np.random.Generator) -> NDArray[np.float64]:
    """Radial wave numbers, azimuthal wave numbers (whole, or the wave would break where it closes) and phases."""
    across = rng.normal(0, 7, TEXTURE_MODES)
    around = rng.integers(1, 14, TEXTURE_MODES)
    return np.stack([across, around, rng.uniform(0, 2 * math.pi, TEXTURE_MODES)])


# --- atmosphere, neighbours, camera ----------------------------------------------------------------------------------


def _band_weights(g_minus_r: FloatArray, r_minus_z: FloatArray) -> FloatArray:
    """Brightness in z, r, g of something of brightness 1 in r, with grey things at 1, 1, 1."""
    z = 10 ** (0.4 * (r_minus_z - GREY_R_MINUS_Z))
    g = 10 ** (-0.4 * (g_minus_r - GREY_G_MINUS_R))
    return np.stack([z, np.ones_like(g), g], axis=-1).astype(np.float32)


def _mix_bands(old: FloatArray, young: FloatArray) -> FloatArray:
    old_weights, young_weights = (
        _band_weights(np.array(colours[0]), np.array(colours[1]))[:, None, None]
        for colours in (OLD_COLOURS, YOUNG_COLOURS)
    )
    return old[:, None] * old_weights + young[:, None] * young_weights


def _observe(bands: FloatArray, parameters: pd.DataFrame, *, seed: int, pixel: float) -> FloatArray:
    """Bands (count, 3, rows, columns) after the seeing, with neighbours and correlated noise.

    Args:
        bands: Before it.
        parameters: Of the galaxies.
        seed: Names the sample.
        pixel: Width of a pixel in the survey's pixels.
    """
    size = bands.shape[-1]
    seeing = np.fft.rfft2(_seeing(parameters, size))[:, None]
    noise, grain = _white_noise(parameters, seed, size), _grain(parameters, size, pixel)
    spectrum = np.fft.rfft2(bands) * seeing + np.fft.rfft2(noise) * grain[:, None]
    observed: FloatArray = np.fft.irfft2(spectrum, s=(size, size)).astype(np.float32)
    _add_neighbours(observed, parameters, seed, reach=round(SURVEY_SIZE / pixel) // 8)
    return observed


def _seeing(parameters: pd.DataFrame, size: int) -> FloatArray:
    """Moffat profiles (beta 3) of sum 1 about pixel (0, 0), as a Fourier transform wants them."""
    offset = np.fft.fftfreq(size, 1 / size).astype(np.float32)
    squared = offset[:, None] ** 2 + offset[None, :] ** 2
    profile = (1 + squared / (MOFFAT_SCALE * _column(parameters, "psf_fwhm_px")) ** 2) ** -3
    return profile / profile.sum(axis=(1, 2), keepdims=True)


def _white_noise(parameters: pd.DataFrame, seed: int, size: int) -> FloatArray:
    generators = [np.random.default_rng((seed, int(number), NOISE_STREAM)) for number in parameters.index]
    return np.stack([rng.standard_normal((3, size, size), dtype=np.float32) for rng in generators])


def _grain(parameters: pd.DataFrame, size: int, pixel: float) -> FloatArray:
    """Filter in Fourier space that turns white noise of variance 1 into sky noise.

    A coadd's noise is smooth over the camera's pixel. Drawn on a coarser grid it averages out: noise with an area of
    correlation a keeps 1 / (a + p^2) of its power in pixels of side p.
    """
    grain = _column(parameters, "noise_grain")
    down, across = np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None, :]
    squared = (down**2 + across**2).astype(np.float32)
    shape = np.exp(-2 * (np.pi * grain / pixel) ** 2 * squared)
    # Measured: survey images reduced from 424 to 128 pixels keep 0.4 of their noise. A Gaussian's area, 4 pi s^2, would
    # leave 0.7 of it; sharp resampling leaves less on large scales.
    area = 2 * grain**2
    level = _column(parameters, "sky_noise") * np.sqrt((area + 1) / (area + pixel**2))
    # The display averages three bands, which takes the square root of 3 from their noise.
    return (math.sqrt(3) * level / np.sqrt((shape**2).mean(axis=(1, 2), keepdims=True)) * shape).astype(np.float32)


def _add_neighbours(bands: FloatArray, parameters: pd.DataFrame, seed: int, *, reach: int) -> None:
    """Adds stars and other galaxies to the bands in place, each on a small patch."""
    for image, (number, galaxy) in zip(bands, parameters.iterrows(), strict=True):
        rng = np.random.default_rng((seed, int(str(number)), SOURCE_STREAM))
        sources = _draw_sources(rng, int(galaxy["neighbour_count"]))
        _stamp(image, sources, fwhm=float(galaxy["psf_fwhm_px"]), reach=reach)


def _draw_sources(rng: np.random.Generator, count: int) -> dict[str, FloatArray]:
    """Values (count, 1, 1) of the neighbours: place in the frame, brightness, shape and band weights."""
    is_star = rng.random(count) < 0.4
    # Number counts rise as the inverse of the brightness; the cap keeps one star from filling the frame.
    peak = np.minimum(3.0 / (1 - rng.random(count)), np.where(is_star, 3000, 100))
    g_minus_r = np.where(is_star, rng.uniform(0.3, 1.3, count), rng.normal(0.8, 0.2, count))
    # Stars and galaxies lie along nearly the same line in these two colours.
    weights = _band_weights(g_minus_r, 0.75 * g_minus_r + rng.normal(0, 0.08, count))
    extent = np.where(is_star, 0, np.exp(rng.normal(-0.4, 0.6, count)))
    sources = {
        "row": rng.random(count),
        "column": rng.random(count),
        "extent": extent,
        "axis_ratio": rng.uniform(0.3, 1, count),
        "angle": rng.uniform(0, math.pi, count),
        **{band: peak * weights[:, position] for position, band in enumerate("zrg")},
    }
    # Each value broadcasts over a patch.
    return {name: values.astype(np.float32)[:, None, None] for name, values in sources.items()}


def _stamp(image: FloatArray, sources: dict[str, FloatArray], *, fwhm: float, reach: int) -> None:
    """Adds Moffat profiles to one image in place.

    Args:
        image: (3, rows, columns).
        sources: As `_draw_sources` returns them.
        fwhm: Seeing in pixels.
        reach: Half of a patch's width in pixels; profiles fall to 0 there.
    """
    size = image.shape[-1]
    steps = np.arange(-reach, reach + 1)
    rows = np.floor(sources["row"] * size).astype(int) + steps[:, None]
    columns = np.floor(sources["column"] * size).astype(int) + steps[None, :]
    down, across = rows - sources["row"] * size, columns - sources["column"] * size
    profile = _patch_profile(down, across, sources, fwhm=fwhm)
    inside = (rows >= 0) & (rows < size) & (columns >= 0) & (columns < size)
    places = (rows * size + columns)[inside]
    for plane, band in zip(image.reshape(3, -1), "zrg", strict=True):
        np.add.at(plane, places, (sources[band] * profile)[inside])


def _patch_profile(down: FloatArray, across: FloatArray, sources: dict[str, FloatArray], *, fwhm: float) -> FloatArray:
    """Elliptical Moffat profiles of peak 1, lowered so that they end at the border of the patch."""
    star = MOFFAT_SCALE * fwhm
    major = np.sqrt(star**2 + (sources["extent"] * star) ** 2)
    minor = np.sqrt(star**2 + (sources["extent"] * sources["axis_ratio"] * star) ** 2)
    sine, cosine = np.sin(sources["angle"]), np.cos(sources["angle"])
    squared = ((down * cosine - across * sine) / major) ** 2 + ((down * sine + across * cosine) / minor) ** 2
    profile = (1 + squared) ** -3
    border = np.maximum(profile[:, :1].max(axis=2, keepdims=True), profile[:, :, :1].max(axis=1, keepdims=True))
    return np.maximum(profile - border, 0).astype(np.float32)


def _to_rgb(bands: FloatArray, parameters: pd.DataFrame) -> NDArray[np.uint8]:
    """The stretch of Lupton et al. (2004), https://arxiv.org/abs/astro-ph/0312483, on (count, 3, rows, columns).

    As Galaxy Zoo DECaLS does, what is no brighter than the noise is shown nearly grey.
    """
    count, _, size, _ = bands.shape
    mean = bands.mean(axis=1, keepdims=True)
    signal = np.clip(mean / COLOURED_ABOVE, 0, 1) ** 2
    colour = (FAINTEST_COLOUR + (1 - FAINTEST_COLOUR) * signal) * _column(parameters, "saturation")[:, None]
    greyed = (mean + (bands - mean) * colour) * _column(parameters, "display_gain")[:, None] + SKY_LEVEL
    # The stretch is pixel by pixel and astropy's takes one image: the chunk goes in as one tall image.
    z, r, g = np.moveaxis(greyed, 1, 0).reshape(3, count * size, size)
    with np.errstate(invalid="ignore"):  # it divides by the intensity before it masks the pixels where that is 0
        rgb: NDArray[np.uint8] = make_lupton_rgb(z, r, g, stretch=STRETCH, Q=SOFTENING)
    return rgb.reshape(count, size, size, 3)
