"""Colours that are distinguishable on white and on black, also with colour vision deficiency."""

RUNS = (
    "#0072b2",  # blue
    "#d55e00",  # vermilion
    "#009e73",  # green
    "#b65a93",  # purple
    "#a67c00",  # ochre
    "#4f8fb0",  # steel
    "#c8374a",  # red
    "#7a8290",  # grey
)
"""Colours of the runs, and of the curves in a chart of one run; the ninth repeats the first."""

EVENTS = {"skipped step": "#c8374a", "roll back": "#d55e00", "resume": "#a67c00"}
"""Colours of events of a single run; with several runs, events have the run's colour."""

BUCKETS = {
    "step": "#009e73",
    "data": "#0072b2",
    "evaluation": "#b65a93",
    "save": "#a67c00",
    "start": "#7a8290",
    "restart": "#d55e00",
    "roll_back": "#c8374a",
    "other": "#4f8fb0",
}
"""Colours of wall time buckets."""

HATCHES = {"restart": "/", "roll_back": "x", "start": "."}
"""Colours of buckets that did not advance training."""

BACKGROUNDS = ("#ffffff", "#14171c")
"""Colours of the page, light and dark."""


def run_colour(index: int) -> str:
    """Return the colour of the run or curve with this index."""
    return RUNS[index % len(RUNS)]
