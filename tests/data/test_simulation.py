import numpy as np
import pandas as pd
import pytest
from datasets import ClassLabel, Image
from plain_disks import draw_plain_disk

from zoobot_hf.data.simulation import (
    draw_galaxies,
    draw_light,
    draw_parameters,
    simulate_galaxies,
    simulate_ring_dataset,
)

SIZE = 129  # odd: the centre is a pixel


@pytest.fixture
def plain_disk() -> pd.DataFrame:
    """A face-on, symmetric disk with no bulge to speak of, no structure and no neighbours."""
    return draw_plain_disk(size=SIZE, radius=14.0).assign(disk_sersic_index=1.0)


def light_of(parameters: pd.DataFrame) -> np.ndarray:
    old, young = draw_light(parameters, seed=0, size=SIZE)
    return (old + young)[0].astype(float)


def offsets() -> tuple[np.ndarray, np.ndarray]:
    """Distances from the centre to the north and to the west, in pixels."""
    axis = np.arange(SIZE) - (SIZE - 1) / 2
    return -axis[:, None] * np.ones(SIZE), axis[None, :] * np.ones((SIZE, 1))


def test_the_same_arguments_give_the_same_bytes():
    first, second = simulate_galaxies(3, seed=7, size=64), simulate_galaxies(3, seed=7, size=64)
    assert first.images.tobytes() == second.images.tobytes()
    pd.testing.assert_frame_equal(first.parameters, second.parameters)


def test_another_seed_gives_other_galaxies():
    assert not np.array_equal(
        simulate_galaxies(2, seed=1, size=64).images, simulate_galaxies(2, seed=2, size=64).images
    )


def test_a_galaxy_does_not_depend_on_how_many_are_drawn():
    few, many = simulate_galaxies(3, seed=7, size=64), simulate_galaxies(70, seed=7, size=64)
    pd.testing.assert_frame_equal(few.parameters, many.parameters.iloc[:3])
    np.testing.assert_array_equal(few.images, many.images[:3])


def test_a_table_that_starts_later_continues_the_same_sample():
    whole, rest = draw_parameters(6, seed=3), draw_parameters(2, seed=3, first=4)
    pd.testing.assert_frame_equal(whole.iloc[4:], rest, check_index_type=False)


def test_images_are_rgb_bytes_on_a_dark_sky():
    images = simulate_galaxies(8, seed=4, size=96).images
    assert images.dtype == np.uint8
    assert images.shape == (8, 96, 96, 3)
    assert 10 < np.median(images[:, :12]) < 25
    centre = images[:, 44:52, 44:52].mean(axis=(1, 2, 3))
    assert np.median(centre) > 90


def test_labels_agree_with_the_true_parameters():
    parameters = draw_parameters(200, seed=5)
    assert ((parameters["ring_strength"] > 0) == (parameters["ring"] == 1)).all()
    assert 70 < parameters["ring"].sum() < 130
    assert parameters["id_str"].iloc[12] == "simulated-5-000012"
    assert parameters["id_str"].is_unique
    assert np.isfinite(parameters.drop(columns="id_str").to_numpy()).all()


@pytest.mark.parametrize(("ring_fraction", "expected"), [(0.0, 0), (1.0, 20)])
def test_a_ring_fraction_of_none_or_all_is_exact(ring_fraction: float, expected: int):
    assert draw_parameters(20, seed=5, ring_fraction=ring_fraction)["ring"].sum() == expected


def test_lengths_in_pixels_follow_the_size():
    small, large = draw_parameters(4, seed=6, size=64), draw_parameters(4, seed=6, size=128)
    in_pixels = ["disk_radius_px", "psf_fwhm_px"]
    np.testing.assert_allclose(2 * small[in_pixels], large[in_pixels])
    pd.testing.assert_frame_equal(small.drop(columns=in_pixels), large.drop(columns=in_pixels))


def test_a_face_on_disk_without_structure_is_symmetric(plain_disk: pd.DataFrame):
    light = light_of(plain_disk)
    np.testing.assert_allclose(light, light[::-1], rtol=1e-4)
    np.testing.assert_allclose(light, light[:, ::-1], rtol=1e-4)
    np.testing.assert_allclose(light, light.T, rtol=1e-4)


def test_half_of_the_disk_lies_within_its_radius_at_its_surface_brightness(plain_disk: pd.DataFrame):
    light = light_of(plain_disk)
    inside = np.hypot(*offsets()) < 14
    assert light[inside].sum() / light.sum() == pytest.approx(0.5, abs=0.02)
    assert light[inside].mean() == pytest.approx(50, rel=0.02)


def test_a_bulge_holds_its_share_of_the_light(plain_disk: pd.DataFrame):
    disk = light_of(plain_disk).sum()
    both = light_of(plain_disk.assign(bulge_to_total=0.4, bulge_radius=0.3, bulge_sersic_index=1.0)).sum()
    assert 1 - disk / both == pytest.approx(0.4, abs=0.02)


def test_inclination_shrinks_the_minor_axis_by_its_cosine(plain_disk: pd.DataFrame):
    light = light_of(plain_disk.assign(inclination_deg=60.0, disk_radius_px=9.0))
    north, west = offsets()
    major = np.sqrt((light * north**2).sum() / light.sum())
    minor = np.sqrt((light * west**2).sum() / light.sum())
    assert minor / major == pytest.approx(0.5, abs=0.01)


def test_the_position_angle_turns_from_north_through_east(plain_disk: pd.DataFrame):
    light = light_of(plain_disk.assign(inclination_deg=60.0, position_angle_deg=45.0))
    # North is up and east is left: the upper left is brighter than the upper right.
    assert light[44, 44] > 2 * light[44, 84]


def test_a_ring_is_a_bump_at_its_radius(plain_disk: pd.DataFrame):
    ring = plain_disk.assign(ring=1, ring_strength=1.0, ring_radius=1.5, ring_width=0.1, ring_axis_ratio=1.0)
    excess = light_of(ring.assign(clumpiness=0.0)) - light_of(plain_disk)
    radius = np.hypot(*offsets())
    profile = [excess[np.abs(radius - r) < 0.5].mean() for r in range(60)]
    assert np.argmax(profile) == 21  # 1.5 half-light radii of 14 pixels
    there = np.abs(radius - 21) < 0.5
    assert excess[there].mean() == pytest.approx(light_of(plain_disk)[there].mean(), rel=0.05)
    assert profile[5] < 1e-3


@pytest.mark.parametrize("structure", ["bar_strength", "spiral_strength", "lens_strength", "lopsidedness"])
def test_each_structure_shows_in_the_light(plain_disk: pd.DataFrame, structure: str):
    light, plain = light_of(plain_disk.assign(**{structure: 0.5})), light_of(plain_disk)
    assert np.abs(light - plain).max() > 5


def test_two_arms_look_the_same_turned_by_half_a_turn(plain_disk: pd.DataFrame):
    light = light_of(plain_disk.assign(spiral_strength=1.0, spiral_arms=2, clumpiness=0.0))
    np.testing.assert_allclose(light, light[::-1, ::-1], rtol=2e-3)
    assert not np.allclose(light, light[:, ::-1], rtol=0.05)


def test_a_bulge_is_redder_than_arms(plain_disk: pd.DataFrame):
    bulge = plain_disk.assign(young_fraction=0.0, sky_noise=0.0)
    arms = plain_disk.assign(young_fraction=1.0, spiral_strength=1.0, sky_noise=0.0)
    red, _, blue = draw_galaxies(bulge, seed=0, size=SIZE)[0, 64, 64].astype(int)
    assert red > blue
    red, _, blue = draw_galaxies(arms, seed=0, size=SIZE)[0, 64, 64].astype(int)
    assert blue > red


def test_neighbours_add_light_away_from_the_galaxy(plain_disk: pd.DataFrame):
    alone = draw_galaxies(plain_disk, seed=0, size=SIZE).astype(int)
    crowded = draw_galaxies(plain_disk.assign(neighbour_count=40), seed=0, size=SIZE).astype(int)
    assert crowded[0, :20].max() > alone[0, :20].max() + 30


def test_noise_is_quieter_on_a_coarser_grid():
    coarse, fine = (
        draw_galaxies(draw_parameters(4, seed=1, size=size).assign(neighbour_count=0), seed=1, size=size)
        for size in (64, 424)
    )
    assert coarse[:, :4].std() < 0.5 * fine[:, :26].std()


def test_the_dataset_holds_what_was_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    dataset = simulate_ring_dataset(70, seed=8, size=64)
    drawn = simulate_galaxies(70, seed=8, size=64)
    assert dataset.features["label"] == ClassLabel(names=["not ring", "ring"])
    assert dataset.features["image"] == Image()
    assert dataset["id_str"][:] == drawn.parameters["id_str"].tolist()
    assert dataset["label"][:] == drawn.parameters["ring"].tolist()
    np.testing.assert_allclose(dataset["ring_radius"][:], drawn.parameters["ring_radius"], rtol=1e-6)
    decoded = np.asarray(dataset[69]["image"]).astype(int)
    assert np.abs(decoded - drawn.images[69]).mean() < 5


@pytest.mark.parametrize("draw", [simulate_galaxies, simulate_ring_dataset])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"count": 0, "seed": 0}, "count is 0, allowed is 1 or more"),
        ({"count": 1, "seed": -1}, "seed is -1, allowed is 0 or more"),
        ({"count": 1, "seed": 0, "size": 31}, "size is 31, allowed is 32 or more"),
        ({"count": 1, "seed": 0, "ring_fraction": 1.1}, "ring_fraction is 1.1, allowed is 0 to 1"),
    ],
)
def test_an_argument_out_of_range_is_named(draw, arguments, message):
    with pytest.raises(ValueError, match=message):
        draw(**arguments)
