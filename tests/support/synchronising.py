"""Finds what holds the host until the device is done, without a device.

An engine on the meta device runs every torch call of a step, and there what is on the device and
what is on the host are told apart. Its collectives move nothing, so one process is any rank.
"""

import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import megatron.core
import phi4_kernels
import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import p2p_communication
from torch import Tensor
from torch._C._distributed_c10d import FakeWork
from torch.fx.experimental import _config
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import phi4
from phi4.config import Recipe
from phi4.engine.engine import Engine
from phi4.engine.model import placement
from phi4.engine.patches import Patches
from phi4.engine.platform import Platform

META = torch.device("meta")
# By place, as a clone's own directory may be named phi4, too.
_WATCHED = tuple(
    f"{Path(package.__file__).parent}/" for package in (phi4, phi4_kernels, megatron.core)
)
_COPIES = ("aten::_to_copy", "aten::copy_")
_SIZED_BY_VALUES = ("nonzero", "masked_select", "unique", "equal", "is_nonzero", "bincount")
"""Their results, or the sizes of these, are known to the host only once they are computed."""


class Waits(TorchDispatchMode):
    """Inside: calls that wait for the device, as `operator in function`.

    Reads of the device get ones. A copy to the device waits unless it is from a staging block and
    does not block.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.pinned: set[int] = set()
        """Addresses of staging blocks."""
        self._works: list[FakeWork] = []
        self._is_entered = self._is_making = False

    def __enter__(self) -> "Waits":
        self._is_entered = True
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        self._is_entered = False
        super().__exit__(*exception)

    def from_host_values(self, name: str, make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """In place of what makes tensors of Python values, which no operator shows."""

        def call(*args: Any, **kwargs: Any) -> Tensor:
            # Under a torch-function mode it is asked again for the same tensor.
            is_first, self._is_making = not self._is_making, True
            made = make(*args, **kwargs)
            self._is_making = not is_first
            if self._is_entered and made.is_meta and is_first:
                self._note(f"{name} on the device")
            return made

        return call

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """See TorchDispatchMode."""
        kwargs, name = kwargs or {}, func.name().split(".")[0]
        on_device = any(x.is_meta for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor))
        if func.namespace == "c10d":
            return self._moves_nothing(func, args)
        if name == "aten::_local_scalar_dense" and on_device:
            self._note(name)
            return torch.ones((), dtype=args[0].dtype).item()
        if name in _COPIES:
            return self._copied(func, name, args, kwargs)
        if on_device and (
            name.split("::")[1].strip("_") in _SIZED_BY_VALUES or _by_mask(name, args)
        ):
            self._note(name)
        return func(*args, **kwargs)

    def staging_block(self, num_bytes: int, device: torch.device) -> Tensor:
        """In place of placement's, which pins for CUDA."""
        block = torch.empty(num_bytes, dtype=torch.uint8)
        self.pinned.add(block.data_ptr())
        return block

    def _copied(self, func: Any, name: str, args: Any, kwargs: Any) -> Tensor:
        target = args[0] if name == "aten::copy_" else None
        source = args[0] if target is None else args[1]
        to_device = (kwargs.get("device") == META) if target is None else target.is_meta
        to_host = source.is_meta and not (
            to_device or (target is None and kwargs.get("device") is None)
        )
        if to_host:
            self._note(f"{name} to the host")
            ones = torch.ones(source.shape, dtype=kwargs.get("dtype") or source.dtype)
            return ones if target is None else target.copy_(ones)
        if to_device and not source.is_meta:
            blocks = not (
                kwargs.get("non_blocking") or (target is not None and args[2:] == (True,))
            )
            if blocks or source.untyped_storage().data_ptr() not in self.pinned:
                self._note(f"{name} to the device")
        return func(*args, **kwargs)

    def _moves_nothing(self, func: Any, args: Any) -> Any:
        results = []
        for result in func._schema.returns:
            if "Work" in str(result.type):
                self._works.append(FakeWork())
                results.append(self._works[-1].boxed())
            else:
                results.append(args[0])
        return results[0] if len(results) == 1 else tuple(results)

    def _note(self, operator: str) -> None:
        frames = traceback.extract_stack()
        ours = [
            frame
            for frame in frames
            if frame.filename.startswith(_WATCHED) and frame.name != "__torch_function__"
        ]
        self.found.append(f"{operator} in {ours[-1].name}" if ours else operator)


def _by_mask(name: str, args: Any) -> bool:
    """Whether elements are picked by where a mask on the device is true."""
    # One number in their place is a masked_fill_ on CUDA, for which torch leaves it on the host.
    indexes = name == "aten::index" or (name == "aten::index_put_" and args[2].numel() > 1)
    masked = indexes and any(
        x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1]
    )
    return masked or (name == "aten::repeat_interleave" and len(args) == 1)


@contextmanager
def engine_on_paper(recipe: Recipe, rank: int) -> Iterator[tuple[Engine, Waits]]:
    """Any rank of any layout on the meta device, and what finds its waits while it is entered."""
    world_size = recipe.parallel.model_parallel_size * recipe.parallel.data
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    waits = Waits()
    replaced = {
        (placement, "staging_block"): waits.staging_block,
        (p2p_communication.torch.distributed, "batch_isend_irecv"): lambda exchanges: [],
        (torch, "tensor"): waits.from_host_values("tensor", torch.tensor),
        (torch, "as_tensor"): waits.from_host_values("as_tensor", torch.as_tensor),
        (Tensor, "new_tensor"): waits.from_host_values("new_tensor", Tensor.new_tensor),
    }
    with ExitStack() as stack:
        stack.callback(dist.destroy_process_group)
        stack.enter_context(_config.patch(meta_nonzero_assume_all_nonzero=True))
        for (owner, name), value in replaced.items():
            stack.enter_context(mock.patch.object(owner, name, value))
        platform = Platform("cuda", META, rank, world_size, "on paper")
        engine = Engine(recipe, platform, patches=Patches("meta"), draws_weights=False)
        yield engine, waits
        engine.close()
