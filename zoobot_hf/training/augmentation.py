"""Augmentation for galaxies: batched, on the device, one interpolation for each galaxy with its own parameters."""

import math

import torch
from torch import Tensor
from torch.nn import functional

# A square turned by 45 degrees covers this much more in width; the processor cuts its margin accordingly.
TURNED_MARGIN = math.sqrt(2)
# Angle, handedness, zoom, and a shift in each direction.
NUMBERS_OF_A_TURN = 5


def margin_of_turns(*, zoom_range: float, max_shift: float) -> float:
    """How much wider than the output a field has to be for any turn of it to lie inside.

    Args:
        zoom_range: As in `augment_galaxies`.
        max_shift: As in `augment_galaxies`.
    """
    return TURNED_MARGIN / (1 - zoom_range) + 2 * max_shift


def augment_galaxies(images: Tensor, *, pixels: int, zoom_range: float, max_shift: float) -> Tensor:
    """Each galaxy turned by any angle, mirrored or not, zoomed and shifted a little, drawn anew at every call.

    Args:
        images: (batch, channels, height, width), uint8 or float; wider than the output by a margin, at its scale.
        pixels: Height and width of the output.
        zoom_range: Largest zoom in and out; 0.15 draws factors from 0.85 to 1.15.
        max_shift: Largest shift in each direction, as a share of the output's width.

    Returns:
        float32, (batch, channels, pixels, pixels), in the range of the input.
    """
    # Drawn on the CPU, so that the same seed gives the same galaxies on every device.
    draws = torch.rand(len(images), NUMBERS_OF_A_TURN)
    return turn_galaxies(images, draws, pixels=pixels, zoom_range=zoom_range, max_shift=max_shift)


def turn_galaxies(images: Tensor, draws: Tensor, *, pixels: int, zoom_range: float, max_shift: float) -> Tensor:
    """Each galaxy turned, mirrored, zoomed and shifted by numbers that were drawn for it.

    The sky has no preferred direction, so that every angle and either handedness is as likely as any other.

    Args:
        images: As in `augment_galaxies`.
        draws: (batch, 5), uniform in 0-1.
        pixels: As in `augment_galaxies`.
        zoom_range: As in `augment_galaxies`.
        max_shift: As in `augment_galaxies`.

    Returns:
        As `augment_galaxies`.
    """
    angle, mirror, zoom, *shift = draws.unbind(dim=1)
    angle = angle * 2 * math.pi
    handedness = torch.where(mirror < 0.5, 1.0, -1.0)
    # affine_grid maps output to input in units of the half-width: a zoom of 2 samples half of the field.
    scale = (1 + zoom_range * (2 * zoom - 1)).reciprocal() * pixels / images.shape[-1]
    offsets = max_shift * (2 * torch.stack(shift) - 1) * 2 * pixels / images.shape[-1]
    cosine, sine = scale * angle.cos(), scale * angle.sin()
    rows = [handedness * cosine, -sine, offsets[0], handedness * sine, cosine, offsets[1]]
    matrices = torch.stack(rows, dim=1).view(-1, 2, 3).to(images.device)
    grid = functional.affine_grid(matrices, [len(images), images.shape[1], pixels, pixels], align_corners=False)
    # Reflection keeps the sky's noise in corners that lie outside of the image, where zeros would draw an edge.
    return functional.grid_sample(images.float(), grid, padding_mode="reflection", align_corners=False)
