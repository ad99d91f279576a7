"""Stand-ins for CUDA on a platform without it: device arguments of torch calls, random states.

megatron-core names CUDA devices and generators literally. Nothing here changes torch or
megatron-core; `patches.py` puts the stand-ins in place.
"""

import contextlib
from collections.abc import Iterator

import torch
from megatron.core.tensor_parallel import random as megatron_random
from torch.overrides import TorchFunctionMode


class CudaMeansHere(TorchFunctionMode):
    """Rewrites the device argument of torch calls from cuda to another device.

    Replaces no attribute of torch or megatron-core; costs about 1 us per torch call, so the engine
    leaves it (`without_rewriting`) around the model's own forward pass, which uses no literal
    device.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(self, func, types, args=(), kwargs=None):
        """See TorchFunctionMode."""
        kwargs = kwargs or {}
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == "cuda":
            kwargs = {**kwargs, "device": self.device}
        if kwargs.get("pin_memory"):
            kwargs = {**kwargs, "pin_memory": False}
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return f"torch.cuda.{func(*args).rpartition('.')[2]}"
        return func(*args, **kwargs)


without_rewriting = torch._C.DisableTorchFunction
"""Context in which torch calls skip every TorchFunctionMode."""


class CpuRngTracker(megatron_random.CudaRNGStatesTracker):
    """megatron's tracker of named random states, over the CPU generator."""

    def add(self, name: str, seed: int) -> None:
        """Register a state under a name."""
        if name in self.states_ or seed in self.seeds_:
            raise ValueError(f"random state {name} or seed {seed} is already registered")
        self._is_initialized = True
        self.seeds_.add(seed)
        self.states_[name] = torch.Generator().manual_seed(seed).get_state()

    @contextlib.contextmanager
    def fork(self, name: str = megatron_random._MODEL_PARALLEL_RNG_TRACKER_NAME) -> Iterator[None]:
        """Use a named state inside the context."""
        outside = torch.get_rng_state()
        torch.set_rng_state(self.states_[name])
        try:
            yield
        finally:
            self.states_[name] = torch.get_rng_state()
            torch.set_rng_state(outside)


def get_cpu_rng_state(device="cuda", clone=False, graph_safe=False) -> torch.Tensor:
    """Return the CPU generator's state, whatever device is asked for; megatron-core's signature."""
    return torch.get_rng_state()


def set_cpu_rng_state(new_state, device=-1, graph_safe=False) -> None:
    """Set the CPU generator's state, whatever device is named; megatron-core's signature."""
    torch.set_rng_state(new_state)
