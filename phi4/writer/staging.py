"""Memory shared by a rank and its writer process, in which tensors wait to be written.

An anonymous file of the kernel (memfd): a kill leaves no name behind, and a container's small
/dev/shm does not limit it. It grows to the largest save and is kept, so later saves allocate
nothing. If the tensors are on a GPU it is pinned, so that the copy reaches the bus's bandwidth.
"""

import mmap
import os
from collections.abc import Sequence

import psutil
import torch

from phi4.errors import PlatformError
from phi4.writer.messages import StagedTensor

_ALIGNMENT = 256


class Staging:
    """The shared memory of one rank.

    Args:
        device: device of the tensors that are staged.
        ranks_per_host: number of ranks that stage on this machine.

    Attributes:
        fd: descriptor for the writer process.
        capacity: bytes for tensors; messages follow them.
    """

    def __init__(self, device: torch.device, ranks_per_host: int = 1) -> None:
        self.fd = os.memfd_create("phi4_checkpoint", os.MFD_CLOEXEC)
        self.capacity = 0
        self._device, self._ranks_per_host = device, ranks_per_host
        self._bytes = torch.empty(0, dtype=torch.uint8)
        self._is_pinned = False

    def stage(self, tensors: Sequence[torch.Tensor]) -> list[StagedTensor]:
        """Copy tensors; they may change once this returns.

        Raises:
            PlatformError: the machine has too little memory, or the driver cannot pin more.
        """
        offsets, end = [], 0
        for tensor in tensors:
            offsets.append(end)
            end += -(-tensor.numel() * tensor.itemsize // _ALIGNMENT) * _ALIGNMENT
        self._reserve(end)
        staged = []
        for tensor, offset in zip(tensors, offsets, strict=True):
            num_bytes = tensor.numel() * tensor.itemsize
            self._copy(tensor.detach(), self._bytes[offset : offset + num_bytes])
            staged.append(StagedTensor(offset, num_bytes, tensor.dtype, tensor.shape))
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return staged

    def close(self) -> None:
        """Free the memory."""
        self._unpin()
        self._bytes = torch.empty(0, dtype=torch.uint8)
        os.close(self.fd)

    def _copy(self, tensor: torch.Tensor, place: torch.Tensor) -> None:
        if self._device.type == "cpu":
            # memcpy is a sixth faster than torch, which reads every cache line that it overwrites.
            place.numpy()[:] = tensor.reshape(-1).view(torch.uint8).numpy()
        else:
            target = place.view(tensor.dtype).view(tensor.shape)
            target.copy_(tensor, non_blocking=True)

    def _reserve(self, num_bytes: int) -> None:
        if num_bytes <= self.capacity:
            return
        grows = (num_bytes - self.capacity) * self._ranks_per_host
        free = psutil.virtual_memory().available
        if grows > free:
            raise PlatformError(
                f"an asynchronous save needs {grows:,} more bytes of this machine's memory, but "
                f"{free:,} are available; use checkpoint.asynchronous=false or a larger "
                f"parallel.data"
            )
        self._unpin()
        # If a later step here fails, nothing is staged.
        self.capacity = 0
        # Allocated now: a page that cannot be allocated later would cause a SIGBUS.
        os.posix_fallocate(self.fd, 0, num_bytes)
        self._bytes = torch.frombuffer(mmap.mmap(self.fd, num_bytes), dtype=torch.uint8)
        if self._device.type == "cuda":
            self._pin(num_bytes)
        self.capacity = num_bytes

    def _pin(self, num_bytes: int) -> None:
        code = int(torch.cuda.cudart().cudaHostRegister(self._bytes.data_ptr(), num_bytes, 0))
        if code:
            raise PlatformError(
                f"CUDA cannot pin {num_bytes:,} bytes for asynchronous saves (error {code}); "
                "raise the limit of locked memory (ulimit -l), or use checkpoint.asynchronous=false"
            )
        self._is_pinned = True

    def _unpin(self) -> None:
        if self._is_pinned:
            torch.cuda.cudart().cudaHostUnregister(self._bytes.data_ptr())
        self._is_pinned = False


def staged_records(
    memory: mmap.mmap, records: Sequence[bytes | StagedTensor]
) -> list[bytes | torch.Tensor]:
    """Return records with tensors in the shared memory; each has a storage of its own size."""
    return [r if isinstance(r, bytes) else _tensor(memory, r) for r in records]


def _tensor(memory: mmap.mmap, staged: StagedTensor) -> torch.Tensor:
    if not staged.num_bytes:
        return torch.empty(staged.shape, dtype=staged.dtype)
    flat = torch.frombuffer(memory, dtype=torch.uint8, offset=staged.offset, count=staged.num_bytes)
    return flat.view(staged.dtype).view(staged.shape)
