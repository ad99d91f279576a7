"""A scripted model whose steps leave the processor to others, as those of a real one do."""

import time
from collections.abc import Sequence

from phi4.sampling.protocol import Event
from phi4.sampling.scripted import ScriptedSampler

_STEP_SECONDS = 0.0005


class UnhurriedSampler(ScriptedSampler):
    """For requests without an end: a script alone gives letters faster than a loop takes them."""

    def step(self) -> Sequence[Event]:
        """See `Sampler.step`."""
        time.sleep(_STEP_SECONDS)
        return super().step()
