"""A server over any sampler, in threads of this process."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from phi4.data.vocabulary.tokenizer import Tokenizer
from phi4.sampling.protocol import Sampler, SamplerLoad
from phi4.sampling.scripted import ScriptedSampler
from phi4.serve.app import make_app
from phi4.serve.served_model import ServedModel
from phi4.serve.traffic import Traffic
from phi4.serve.web_server import listen, serving

MODEL_NAME = "phi-4-tiny"
WEIGHTS = "step_0000100"


class LoadedSampler(ScriptedSampler):
    """A script with a cache of 9 blocks, of which every open request has one."""

    def load(self) -> SamplerLoad:
        """See `phi4.sampling.protocol.ReportsLoad`."""
        return SamplerLoad(len(self._open), 9, len(self._open), 0)


@dataclass(frozen=True)
class Served:
    """A server that runs.

    Attributes:
        url: of its root.
        traffic: of its requests.
        model: that it serves.
    """

    url: str
    traffic: Traffic
    model: ServedModel


@contextmanager
def served(
    sampler: Sampler,
    tokenizer: Tokenizer,
    *,
    name: str = MODEL_NAME,
    api_key: str | None = None,
    max_open: int = 64,
    default_max_tokens: int = 64,
) -> Iterator[Served]:
    """Serve while the block runs; the sampler belongs to a thread of its own meanwhile."""
    limits = replace(sampler.limits)
    model = ServedModel(name, tokenizer, limits, 1_700_000_000, default_max_tokens)
    traffic = Traffic(WEIGHTS, max_open, drain_seconds=0.0)
    listener = listen("127.0.0.1", 0)
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    thread = threading.Thread(target=traffic.run, args=(sampler,), name="model")
    thread.start()
    try:
        with serving(make_app(traffic, model, api_key), listener):
            yield Served(url, traffic, model)
    finally:
        traffic.drain()
        thread.join()
