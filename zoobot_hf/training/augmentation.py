"""Augmentation for galaxies: batched, on the device, one interpolation for each galaxy with its own parameters."""

import math

import torch
from torch import Tensor
from torch.nn import functional

# A square turned by 45 degrees covers this much more in width; the processor cuts its margin accordingly.
TURNED_MARGIN = math.sqrt(2)


def augment_galaxies(images: Tensor, *, pixels: int, zoom_range: float, max_shift: float) -> Tensor:
    """Each galaxy turned by any angle, mirrored or not, zoomed and shifted a little.

    The sky has no preferred direction, so that every angle and either handedness is as likely as any other.

    Args:
        images: (batch, channels, height, width), uint8 or float; wider than the output by a margin, at its scale.
        pixels: Height and width of the output.
        zoom_range: Largest zoom in and out; 0.15 draws factors from 0.85 to 1.15.
        max_shift: Largest shift in each direction, as a share of the output's width.

    Returns:
        float32, (batch, channels, pixels, pixels), in the range of the input.
    """
    # Drawn on the CPU, so that the same seed gives the same galaxies on every device.
    angle, mirror, zoom, *shift = torch.rand(5, len(images)).unbind()
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
