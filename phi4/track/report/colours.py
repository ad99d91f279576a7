"""Colours that can be told apart, on white and on black, by people who see few of them."""

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
"""Of runs side by side, and of the curves of one chart of one run; the ninth begins anew."""

EVENTS = {"skipped step": "#c8374a", "roll back": "#d55e00", "resume": "#a67c00"}
"""Of a run that is alone on its page; of several, each run's events have its colour."""

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
"""Of wall time."""

HATCHES = {"restart": "/", "roll_back": "x", "start": "."}
"""For time that did not advance training."""

BACKGROUNDS = ("#ffffff", "#14171c")
"""Of the page, light and dark."""


def run_colour(index: int) -> str:
    """Colour of the run or curve with this index."""
    return RUNS[index % len(RUNS)]
