import math

import pytest
import torch

from zoobot_hf.training.augmentation import augment_galaxies, margin_of_turns, turn_galaxies


def gaussian_blob(pixels, *, x=0.0, y=0.0, width=0.15):
    """A round galaxy at (x, y) in units of the half-width."""
    axis = (torch.arange(pixels) + 0.5) / pixels * 2 - 1
    rows, columns = torch.meshgrid(axis, axis, indexing="ij")
    return torch.exp(-((columns - x) ** 2 + (rows - y) ** 2) / (2 * width**2))


def centroids(images):
    axis = (torch.arange(images.shape[-1]) + 0.5) / images.shape[-1] * 2 - 1
    flux = images.sum((-1, -2))
    return (images.sum(-2) @ axis) / flux, (images.sum(-1) @ axis) / flux


def test_the_output_is_the_centre_at_the_same_scale():
    torch.manual_seed(0)
    wide = gaussian_blob(96).expand(5, 3, 96, 96)
    turned = augment_galaxies(wide, pixels=64, zoom_range=0.0, max_shift=0.0)
    assert turned.shape == (5, 3, 64, 64)
    # A round galaxy in the centre looks the same from every angle: equal to the plain crop.
    assert torch.allclose(turned, wide[..., 16:80, 16:80], atol=0.01)


def test_every_galaxy_has_its_own_angle_and_both_handednesses_occur():
    torch.manual_seed(0)
    spot = gaussian_blob(90, x=0.5)
    mark = gaussian_blob(90, x=0.35, y=0.35)
    images = torch.stack([spot, mark]).expand(200, 2, 90, 90)
    turned = augment_galaxies(images, pixels=64, zoom_range=0.0, max_shift=0.0)
    x, y = centroids(turned)
    angle = torch.atan2(y, x)
    assert angle[:, 0].unique().numel() == 200
    # Angles cover the circle evenly: the mean direction is short.
    assert torch.hypot(angle[:, 0].cos().mean(), angle[:, 0].sin().mean()) < 0.15
    turn = (angle[:, 1] - angle[:, 0] + math.pi) % (2 * math.pi) - math.pi
    assert torch.allclose(turn.abs(), torch.full_like(turn, math.pi / 4), atol=0.05)
    assert 0.35 < (turn > 0).float().mean() < 0.65


def test_zoom_and_shift_stay_within_their_ranges():
    torch.manual_seed(0)
    wide = gaussian_blob(120).expand(300, 1, 120, 120)
    turned = augment_galaxies(wide, pixels=60, zoom_range=0.2, max_shift=0.1)
    x, y = centroids(turned)
    # max_shift is a share of the width, centroids are in units of the half-width; the zoom magnifies the shift too.
    assert torch.hypot(x, y).max() <= 0.2 * 2**0.5 * 1.2 + 0.01
    assert x.abs().max() > 0.15
    assert y.abs().max() > 0.15
    area = turned.sum((-1, -2)) / augment_galaxies(wide, pixels=60, zoom_range=0.0, max_shift=0.0).sum((-1, -2))
    assert 0.8**2 * 0.97 < area.min() < 0.75
    assert 1.35 < area.max() < 1.2**2 * 1.03


def test_each_direction_has_a_shift_of_its_own():
    draws = torch.tensor([[0.0, 0.0, 0.5, 0.25, 1.0]])  # no turn and no zoom
    turned = turn_galaxies(gaussian_blob(120).expand(1, 1, 120, 120), draws, pixels=60, zoom_range=0.2, max_shift=0.1)
    # The field moves a twentieth of the width to the left and a tenth down, and the galaxy the other way.
    assert [float(place) for place in centroids(turned)] == pytest.approx([0.1, -0.2], abs=0.01)


def test_the_same_seed_gives_the_same_galaxies():
    wide = torch.randint(0, 256, (4, 3, 40, 40), dtype=torch.uint8)
    torch.manual_seed(7)
    first = augment_galaxies(wide, pixels=28, zoom_range=0.15, max_shift=0.05)
    torch.manual_seed(7)
    assert torch.equal(first, augment_galaxies(wide, pixels=28, zoom_range=0.15, max_shift=0.05))


def test_values_stay_in_the_range_of_the_input():
    wide = torch.randint(0, 256, (16, 3, 48, 48), dtype=torch.uint8)
    turned = augment_galaxies(wide, pixels=32, zoom_range=0.5, max_shift=0.5)
    assert turned.dtype == torch.float32
    assert turned.min() >= 0
    assert turned.max() <= 255
    sky = augment_galaxies(torch.full((16, 3, 48, 48), 9.0), pixels=32, zoom_range=0.5, max_shift=0.5)
    assert torch.allclose(sky, torch.tensor(9.0))  # up to the corners that lie outside


@pytest.mark.parametrize(("zoom_range", "max_shift"), [(0.0, 0.0), (0.3, 0.0), (0.0, 0.2), (0.15, 0.05)])
def test_every_turn_lies_inside_of_a_field_with_its_margin(zoom_range, max_shift):
    pixels = 64
    width = math.ceil(pixels * margin_of_turns(zoom_range=zoom_range, max_shift=max_shift))
    axis = torch.arange(width, dtype=torch.float32)
    ramps = torch.stack(torch.meshgrid(axis, axis, indexing="ij")).expand(4, 2, width, width)
    # 45 degrees, the widest view, and shifts to all corners.
    draws = torch.tensor([[1 / 8, 0, 0, x, y] for x in (0.0, 1.0) for y in (0.0, 1.0)])
    turned = turn_galaxies(ramps, draws, pixels=pixels, zoom_range=zoom_range, max_shift=max_shift)
    # Of a ramp any turn is a ramp, unless it was reflected at an edge.
    for direction in (2, 3):
        steps = turned.diff(dim=direction)
        assert torch.allclose(steps, steps.mean((2, 3), keepdim=True).expand_as(steps), atol=1e-2)
