"""The galaxies of a whole survey: ellipticals, lenticulars, spirals and irregulars, at any inclination, some merging.

`simulation.draw_parameters` makes rings and what they are mistaken for; here is everything that volunteers meet.
Shares and ranges were set by eye against Galaxy Zoo DECaLS images (Walmsley et al. 2022,
https://arxiv.org/abs/2102.08414), and are wider than the survey's where an encoder should learn not to care: depth,
seeing, size in the frame, display.
"""

import math

import numpy as np
import pandas as pd

from zoobot_hf.data.simulation import NATIVE_PIXEL_ARCSEC, REGULAR, SURVEY_SIZE, survey_pixel_arcsec

KINDS = {"elliptical": 0.18, "lenticular": 0.31, "spiral": 0.27, "irregular": 0.24}
MERGING_SHARE = 0.1
SUPERPOSED_SHARE = 0.05

# A stream of random numbers of its own, apart from those of `simulation`.
POPULATION_STREAM = 100


def draw_survey_parameters(
    count: int, *, seed: int, size: int = 128, frame: float = SURVEY_SIZE, first: int = 0
) -> pd.DataFrame:
    """A table with the true parameters of a survey's galaxies `first` to `first + count - 1`, for `draw_galaxies`.

    Args:
        count: How many galaxies, 1 or more.
        seed: Names the sample; 0 or more.
        size: Height and width of the frame in pixels, 32 or more.
        frame: Height and width of the frame in the survey's pixels; a smaller one shows the centre alone.
        first: Number of the first galaxy, 0 or more.

    Returns:
        The columns of `SimulatedGalaxies.parameters`, and `kind` and `is_merging`; the index is the galaxy's number.

    Raises:
        ValueError: No galaxy was asked for.
    """
    if count < 1:
        raise ValueError(f"count is {count}, allowed is 1 or more: pass a larger count.")
    numbers = range(first, first + count)
    rows = [_one_galaxy(np.random.default_rng((seed, number, POPULATION_STREAM)), frame) for number in numbers]
    parameters = pd.DataFrame(rows, index=pd.Index(numbers, name="number"))
    parameters[["disk_radius_px", "psf_fwhm_px"]] *= size / frame
    parameters["ring"] = (parameters["ring_strength"] > 0).astype("int64")
    parameters.insert(0, "id_str", [f"survey-{seed}-{number:06d}" for number in numbers])
    return parameters


def _one_galaxy(rng: np.random.Generator, frame: float) -> dict[str, object]:
    kind = str(rng.choice(list(KINDS), p=list(KINDS.values())))
    is_merging = bool(rng.random() < MERGING_SHARE)
    structure = {"elliptical": _elliptical, "lenticular": _lenticular, "spiral": _spiral, "irregular": _irregular}[kind]
    return {
        "kind": kind,
        "is_merging": is_merging,
        **REGULAR,
        **_frame(rng, frame),
        **_orientation(rng),
        **_no_structure(rng),
        **structure(rng),
        **_companion(rng, is_merging),
        **({"disturbance": _log_normal(rng, 0.28, 0.4)} if is_merging else {}),
    }


def _log_normal(rng: np.random.Generator, median: float, scatter: float) -> float:
    return median * math.exp(scatter * rng.standard_normal())


def _share(rng: np.random.Generator, mean: float, scatter: float) -> float:
    return float(np.clip(rng.normal(mean, scatter), 0.01, 0.95))


def _frame(rng: np.random.Generator, frame: float) -> dict[str, float]:
    half_light_arcsec = _log_normal(rng, 4.4, 0.45)
    pixel_arcsec = survey_pixel_arcsec(half_light_arcsec)
    return {
        "half_light_arcsec": half_light_arcsec,
        "disk_radius_px": half_light_arcsec / pixel_arcsec * _log_normal(rng, 1.45, 0.4),
        "psf_fwhm_px": _log_normal(rng, 1.25, 0.2) / pixel_arcsec,
        "sky_noise": _log_normal(rng, 1.0, 0.35),
        "noise_grain": 0.54 * NATIVE_PIXEL_ARCSEC / pixel_arcsec * _log_normal(rng, 1.0, 0.2),
        "neighbour_count": int(rng.poisson(_log_normal(rng, 24, 0.5) * (frame / SURVEY_SIZE) ** 2)),
        "display_gain": _log_normal(rng, 1.0, 0.25),
        "saturation": rng.uniform(0.3, 1.1),
    }


def _orientation(rng: np.random.Generator) -> dict[str, float]:
    return {
        "inclination_deg": math.degrees(math.acos(rng.random())),
        "position_angle_deg": rng.uniform(0, 180),
        "disk_thickness": rng.uniform(0.1, 0.3),
        "disturbance": _log_normal(rng, 0.02, 0.7),
        "lopsidedness": rng.uniform(0, 0.08),
    }


def _no_structure(rng: np.random.Generator) -> dict[str, float]:
    """What a galaxy has of each structure unless its kind says otherwise: its shape, at strength 0."""
    return {
        "disk_sersic_index": rng.uniform(0.6, 1.3),
        "lens_strength": 0.0,
        "lens_radius": rng.uniform(0.6, 1.6),
        "bulge_radius": rng.uniform(0.08, 0.3),
        "bulge_sersic_index": rng.uniform(1.0, 3.0),
        "bar_strength": 0.0,
        "bar_length": rng.uniform(0.3, 1.0),
        "bar_angle_deg": rng.uniform(0, 180),
        **_arms(rng, strength=0.0),
        "clumpiness": rng.uniform(0.05, 0.3),
        "ring_strength": 0.0,
        "ring_radius": rng.uniform(0.8, 2.3),
        "ring_width": rng.uniform(0.07, 0.2),
        "ring_axis_ratio": rng.uniform(0.7, 1.0),
        "gap_depth": 0.0,
    }


def _arms(rng: np.random.Generator, *, strength: float) -> dict[str, float]:
    return {
        "spiral_strength": strength,
        "spiral_arms": int(rng.choice([1, 2, 3, 4, 5], p=[0.07, 0.58, 0.16, 0.12, 0.07])),
        "pitch_angle_deg": rng.uniform(7, 38),
        "arm_length_deg": rng.uniform(150, 420),
        "winding": int(rng.choice([-1, 1])),
    }


def _ring(rng: np.random.Generator) -> dict[str, float]:
    """Mostly faint and broad; a bright hoop is the exception."""
    return {"ring_strength": _log_normal(rng, 1.0, 0.6), "gap_depth": rng.uniform(0, 0.65)}


def _edge(rng: np.random.Generator, share: float) -> float:
    return rng.uniform(1.5, 2.8) if rng.random() < share else 0.0


def _elliptical(rng: np.random.Generator) -> dict[str, float]:
    return {
        "surface_brightness": _log_normal(rng, 14, 0.6),
        "young_fraction": _share(rng, 0.0, 0.1),
        "bulge_to_total": rng.uniform(0.6, 0.95),
        "bulge_radius": rng.uniform(0.3, 0.9),
        "bulge_sersic_index": rng.uniform(1.5, 4.0),
        "disk_thickness": rng.uniform(0.3, 0.7),
    }


def _lenticular(rng: np.random.Generator) -> dict[str, float]:
    return {
        "surface_brightness": _log_normal(rng, 50, 0.6),
        "young_fraction": _share(rng, 0.08, 0.12),
        "lens_strength": _log_normal(rng, 0.6, 0.6) if rng.random() < 0.6 else 0.0,
        "disk_edge": _edge(rng, 0.75),
        "bulge_to_total": _share(rng, 0.32, 0.15),
        "bar_strength": _log_normal(rng, 3.5, 0.7) if rng.random() < 0.5 else 0.0,
        **_arms(rng, strength=_log_normal(rng, 0.25, 0.5) if rng.random() < 0.2 else 0.0),
        **(_ring(rng) if rng.random() < 0.48 else {}),
    }


def _spiral(rng: np.random.Generator) -> dict[str, float]:
    return {
        "surface_brightness": _log_normal(rng, 30, 0.6),
        "young_fraction": _share(rng, 0.5, 0.22),
        "lopsidedness": rng.uniform(0, 0.2),
        "disturbance": _log_normal(rng, 0.05, 0.6),
        "disk_edge": _edge(rng, 0.4),
        "bulge_to_total": _share(rng, 0.16, 0.12),
        "bar_strength": _log_normal(rng, 3.5, 0.7) if rng.random() < 0.45 else 0.0,
        **_arms(rng, strength=_log_normal(rng, 0.7, 0.6)),
        "clumpiness": rng.uniform(0.1, 0.75),
        "clump_count": int(rng.poisson(2)) if rng.random() < 0.5 else 0,
        "clump_strength": _log_normal(rng, 0.6, 0.6),
        **(_ring(rng) if rng.random() < 0.22 else {}),
    }


def _irregular(rng: np.random.Generator) -> dict[str, float]:
    return {
        "surface_brightness": _log_normal(rng, 16, 0.6),
        "young_fraction": _share(rng, 0.75, 0.2),
        "lopsidedness": rng.uniform(0, 0.5),
        "disturbance": _log_normal(rng, 0.2, 0.55),
        "disk_thickness": rng.uniform(0.2, 0.5),
        "disk_edge": rng.uniform(1.1, 2.2) if rng.random() < 0.7 else 0.0,
        "bulge_to_total": _share(rng, 0.03, 0.05),
        "bar_strength": _log_normal(rng, 2.0, 0.7) if rng.random() < 0.35 else 0.0,
        **_arms(rng, strength=_log_normal(rng, 0.5, 0.5) if rng.random() < 0.3 else 0.0),
        "clumpiness": rng.uniform(0.3, 1.0),
        "clump_count": int(rng.integers(1, 15)),
        "clump_strength": _log_normal(rng, 2.4, 0.7),
        **(_ring(rng) if rng.random() < 0.08 else {}),
    }


def _companion(rng: np.random.Generator, is_merging: bool) -> dict[str, float]:
    is_there = rng.random() < (0.65 if is_merging else SUPERPOSED_SHARE)
    return {
        "companion_strength": _log_normal(rng, 0.8, 0.6) if is_there else 0.0,
        "companion_size": rng.uniform(0.2, 0.8),
        "companion_distance": rng.uniform(0.8, 2.6),
        "companion_angle_deg": rng.uniform(0, 360),
    }
