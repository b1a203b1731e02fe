"""A drawn galaxy with nothing but a disk, to which tests add one structure at a time."""

from zoobot_hf.data.simulation import draw_parameters


def draw_plain_disk(*, size, radius):
    """The parameters of a face-on, symmetric disk with no bulge to speak of and no neighbours; radius in pixels."""
    return draw_parameters(1, seed=0, size=size).assign(
        disk_radius_px=radius,
        surface_brightness=50.0,
        bulge_to_total=1e-9,
        inclination_deg=0.0,
        position_angle_deg=0.0,
        lopsidedness=0.0,
        lens_strength=0.0,
        bar_strength=0.0,
        spiral_strength=0.0,
        ring_strength=0.0,
        gap_depth=0.0,
        neighbour_count=0,
    )
