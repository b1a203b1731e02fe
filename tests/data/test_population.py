import numpy as np
import pandas as pd
import pytest
from plain_disks import draw_plain_disk

from zoobot_hf.data.population import KINDS, draw_survey_parameters
from zoobot_hf.data.simulation import SURVEY_SIZE, draw_galaxies, draw_light, survey_pixel_arcsec

SIZE = 97  # odd: the centre is a pixel


@pytest.fixture
def plain_disk():
    """A face-on disk without structure, its half-light radius 10 pixels."""
    return draw_plain_disk(size=SIZE, radius=10.0)


def light_of(parameters):
    old, young = draw_light(parameters, seed=0, size=SIZE)
    return (old + young)[0].astype(float)


def test_every_kind_comes_with_its_share():
    parameters = draw_survey_parameters(2000, seed=1)
    shares = parameters["kind"].value_counts(normalize=True)
    for kind, share in KINDS.items():
        assert shares[kind] == pytest.approx(share, abs=0.04)
    assert parameters["is_merging"].mean() == pytest.approx(0.1, abs=0.03)
    assert parameters["id_str"].is_unique
    assert np.isfinite(parameters.select_dtypes("number").to_numpy()).all()


def test_each_kind_is_as_it_is_said_to_be():
    parameters = draw_survey_parameters(2000, seed=1, size=SURVEY_SIZE)
    kinds, merging = parameters.groupby("kind"), parameters["is_merging"]
    rings = {"elliptical": 0.0, "lenticular": 0.48, "spiral": 0.22, "irregular": 0.08}
    assert kinds["ring"].mean().to_dict() == pytest.approx(rings, abs=0.05)
    bulges = {"elliptical": 0.775, "lenticular": 0.32, "spiral": 0.16, "irregular": 0.04}
    assert kinds["bulge_to_total"].mean().to_dict() == pytest.approx(bulges, abs=0.03)
    has_companion = parameters["companion_strength"] > 0
    assert has_companion.groupby(merging).mean().tolist() == pytest.approx([0.05, 0.65], abs=0.1)
    assert parameters["disturbance"][merging].median() == pytest.approx(0.28, rel=0.15)
    assert parameters["half_light_arcsec"].median() == pytest.approx(4.4, rel=0.05)
    seeing = parameters["psf_fwhm_px"] * parameters["half_light_arcsec"].map(survey_pixel_arcsec)
    assert seeing.median() == pytest.approx(1.25, rel=0.03)


def test_a_smaller_frame_has_neighbours_by_its_area():
    whole, half = (draw_survey_parameters(300, seed=1, frame=frame) for frame in (SURVEY_SIZE, SURVEY_SIZE / 2))
    assert half["neighbour_count"].mean() == pytest.approx(whole["neighbour_count"].mean() / 4, rel=0.1)


def test_inclinations_are_those_of_random_directions():
    cosines = np.cos(np.deg2rad(draw_survey_parameters(3000, seed=2)["inclination_deg"]))
    assert np.histogram(cosines, 5, (0, 1))[0] == pytest.approx(600, abs=100)


def test_a_galaxy_does_not_depend_on_the_others_in_its_table():
    whole, rest = draw_survey_parameters(6, seed=3), draw_survey_parameters(2, seed=3, first=4)
    pd.testing.assert_frame_equal(whole.iloc[4:], rest, check_index_type=False)
    np.testing.assert_array_equal(draw_galaxies(whole, seed=3, size=64)[4:], draw_galaxies(rest, seed=3, size=64))
    assert (draw_survey_parameters(6, seed=4)["half_light_arcsec"] != whole["half_light_arcsec"]).all()


def test_a_smaller_frame_shows_the_same_galaxy_larger():
    parameters = draw_survey_parameters(3, seed=4, size=128).assign(neighbour_count=0, sky_noise=1e-6)
    whole = draw_galaxies(parameters, seed=4, size=128).astype(int)
    centre = draw_galaxies(parameters, seed=4, size=64, frame=212).astype(int)
    assert np.abs(whole[:, 42:86, 42:86] - centre[:, 10:54, 10:54]).mean() < 1.5


def test_lengths_in_pixels_follow_size_and_frame():
    wide, centre = draw_survey_parameters(1, seed=4, size=128), draw_survey_parameters(1, seed=4, size=128, frame=212)
    assert (centre[["disk_radius_px", "psf_fwhm_px"]] == 2 * wide[["disk_radius_px", "psf_fwhm_px"]]).all(axis=None)


def test_a_thick_disk_is_no_needle_from_the_side(plain_disk):
    light = light_of(plain_disk.assign(inclination_deg=89.0, disk_thickness=0.4))
    rows, columns = np.indices(light.shape) - SIZE // 2
    heights, widths = ((light * offset**2).sum() for offset in (rows, columns))
    assert min(heights, widths) / max(heights, widths) == pytest.approx(0.4**2, rel=0.2)


def test_a_disk_ends_at_its_edge(plain_disk):
    faded, ended = (light_of(plain_disk.assign(disk_edge=edge))[SIZE // 2] for edge in (0.0, 1.5))
    assert ended[SIZE // 2 + 5] == pytest.approx(faded[SIZE // 2 + 5], rel=0.01)
    assert ended[SIZE // 2 + 25] < 0.01 * faded[SIZE // 2 + 25]


def test_a_disturbed_disk_is_not_symmetric_and_keeps_its_centre(plain_disk):
    light = light_of(plain_disk.assign(disturbance=0.3))
    assert not np.allclose(light, light[::-1, ::-1], rtol=0.2)
    assert light[SIZE // 2, SIZE // 2] == pytest.approx(light_of(plain_disk)[SIZE // 2, SIZE // 2], rel=1e-4)


def test_more_clumps_are_more_light_away_from_the_centre(plain_disk):
    added = [light_of(plain_disk.assign(clump_count=n, clump_strength=1.0)) - light_of(plain_disk) for n in (0, 3, 12)]
    assert added[0].max() == 0
    assert 0 < added[1].sum() < added[2].sum()


def test_a_companion_is_where_it_should_be(plain_disk):
    companion = {"companion_strength": 2.0, "companion_size": 0.2, "companion_distance": 3.0}
    added = light_of(plain_disk.assign(**companion, companion_angle_deg=90.0)) - light_of(plain_disk)
    row, column = np.unravel_index(added.argmax(), added.shape)
    assert (row - SIZE // 2, column - SIZE // 2) == (0, -30)  # to the east, which is left


def test_saturation_and_gain_change_the_display(plain_disk):
    settings = {"young_fraction": 1.0, "sky_noise": 0.01}
    grey = draw_galaxies(plain_disk.assign(**settings, saturation=0.0), seed=0, size=SIZE)[0].astype(int)
    assert np.ptp(grey, axis=2).max() == 0
    dim, bright = (
        draw_galaxies(plain_disk.assign(**settings, display_gain=gain), seed=0, size=SIZE)[0, SIZE // 2, SIZE // 2]
        for gain in (0.5, 2.0)
    )
    assert bright.mean() > dim.mean() + 20


def test_no_galaxy_at_all_is_refused():
    with pytest.raises(ValueError, match="count is 0, allowed is 1 or more"):
        draw_survey_parameters(0, seed=0)
