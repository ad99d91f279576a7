"""What a report draws: fewer points with the same extremes, in colours that can be told apart."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from phi4.track.report import colours as palette
from phi4.track.report.decimate import kept_points


@given(st.lists(st.floats(-1e30, 1e30), min_size=1, max_size=400), st.integers(4, 60))
def test_decimation_keeps_extremes_and_ends(values: list[float], limit: int) -> None:
    array = np.array(values)
    kept = kept_points(array, limit)
    assert len(kept) <= limit
    assert list(kept) == sorted(set(kept.tolist()))
    assert (kept[0], kept[-1]) == (0, len(values) - 1)
    assert (array[kept].min(), array[kept].max()) == (array.min(), array.max())
    num_bins = (limit - 2) // 2
    if len(values) > limit:
        # No neighbours are further apart than two bins.
        assert np.diff(kept).max() <= 2 * math.ceil(len(values) / num_bins)


def luminance(colour: str) -> float:
    """Relative luminance of WCAG 2."""
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("background", palette.BACKGROUNDS)
def test_colours_stand_out_on_light_and_dark(background: str) -> None:
    for colour in (*palette.RUNS, *palette.BUCKETS.values(), *palette.EVENTS.values()):
        low, high = sorted((luminance(colour), luminance(background)))
        assert (high + 0.05) / (low + 0.05) >= 3.0, colour
