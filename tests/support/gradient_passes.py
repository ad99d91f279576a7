"""Counts how often a piece of code reads and writes given buffers, by the torch calls it makes."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_ONLY_WRITE = ("aten::copy_", "aten::zero_", "aten::fill_.Scalar")
"""What updates in place reads too, but not these."""


class Passes(TorchDispatchMode):
    """Inside: bytes of the buffers that each operator takes as an argument, views left out.

    Args:
        buffers: tensors whose storages are watched.
    """

    def __init__(self, buffers: Sequence[Tensor]) -> None:
        super().__init__()
        self._watched = {buffer.untyped_storage().data_ptr() for buffer in buffers}
        self.reads: Counter[str] = Counter()
        """Bytes by operator."""
        self.writes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """See TorchDispatchMode."""
        kwargs = kwargs or {}
        if not func.is_view:
            for argument, value in zip(func._schema.arguments, args, strict=False):
                self._count(func, argument, value)
            for argument in func._schema.arguments[len(args) :]:
                self._count(func, argument, kwargs.get(argument.name))
        return func(*args, **kwargs)

    def _count(self, func: Any, argument: Any, value: Any) -> None:
        touched = sum(
            leaf.numel() * leaf.itemsize
            for leaf in tree_leaves(value)
            if isinstance(leaf, Tensor) and leaf.untyped_storage().data_ptr() in self._watched
        )
        name = func.name()
        written = argument.alias_info is not None and argument.alias_info.is_write
        if touched and not (written and name in _ONLY_WRITE):
            self.reads[name] += touched
        if touched and written:
            self.writes[name] += touched
