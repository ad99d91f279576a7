"""Every change to megatron-core's behaviour.

megatron-core hard-codes CUDA devices, falls back to an Adam that cannot resume, and takes four
passes over the gradient per step. The changes are a context that engine calls enter (`Patches`),
not state of the process: outside it torch and megatron-core are unmodified. Each change is a row of
`PATCHES` with its upstream location and reason; `tests/engine/test_patches.py` shows that each row
is needed. Written against megatron-core 0.16.1; any other version is refused.
"""

import contextlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from types import TracebackType
from typing import Any, Literal

import torch
from megatron.core import optimizer as megatron_optimizer
from megatron.core.dist_checkpointing import serialization
from megatron.core.dist_checkpointing.strategies import common as common_strategy
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies import torch as torch_strategy
from megatron.core.distributed import param_and_grad_buffer
from megatron.core.optimizer import distrib_optimizer
from megatron.core.tensor_parallel import layers as megatron_layers
from megatron.core.tensor_parallel import random as megatron_random
from phi4_kernels.adamw import FusedAdam
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner

from phi4.engine.checkpoint_capture import Capture
from phi4.engine.checkpoint_io import VettedReader, load_bytes_as_values
from phi4.engine.model.weight_gradients import FUSED_WEIGHT_GRADIENTS
from phi4.engine.optimizer.adamw import (
    OnePassChain,
    OnePassDistributed,
    OnePassFloat16,
    OnePassFP32,
)
from phi4.engine.optimizer.fp8_gather import FP8BucketGroup
from phi4.engine.without_cuda import (
    CpuRngTracker,
    CudaMeansHere,
    get_cpu_rng_state,
    set_cpu_rng_state,
)
from phi4.errors import PlatformError

MEGATRON_VERSION = "0.16.1"


@dataclass(frozen=True)
class Patch:
    """One change: upstream location, reason, platforms, and the attributes it replaces."""

    name: str
    upstream: str
    """megatron/core/ file:line that needs it."""
    reason: str
    kinds: tuple[Literal["cpu", "cuda", "meta"], ...]
    replacements: Callable[["Patches"], list[tuple[Any, str, Any]]]
    """(object, attribute, new value) triples."""


_ABSENT = object()
"""Marks an attribute that the owner does not have."""


def _checkpoint_writer(patches: "Patches") -> list[tuple[Any, str, Any]]:
    capture = patches.capture
    writer, common = filesystem_async.FileSystemWriterAsync, common_strategy.TorchCommonSaveStrategy
    return [
        (writer, "prepare_write_data", _as_method(capture.prepare_write_data)),
        (writer, "preload_tensors", staticmethod(capture.preload_tensors)),
        (writer, "write_preloaded_data_multiproc", staticmethod(capture.write_preloaded)),
        (writer, "finish", _as_method(capture.finish)),
        (common, "save_common", _as_method(capture.save_common)),
        (serialization, "save_config", capture.save_config),
    ]


def _as_method(act: Callable[..., None]) -> Callable[..., None]:
    """Convert a bound method to a function, so that it also gets the object it is called on."""

    def method(self: object, *args: Any, **kwargs: Any) -> None:
        return act(self, *args, **kwargs)

    return method


PATCHES = (
    Patch(
        "current_device",
        "tensor_parallel/layers.py:552, mappings.py:141, distrib_optimizer.py:791 and others",
        "tensors are placed on torch.cuda.current_device()",
        ("cpu", "meta"),
        lambda patches: [(torch.cuda, "current_device", lambda: patches.device)],
    ),
    Patch(
        "synchronize",
        "dist_checkpointing/strategies/fully_parallel.py:272,281",
        "waits for a CUDA device that does not exist",
        ("cpu",),
        lambda patches: [(torch.cuda, "synchronize", lambda device=None: None)],
    ),
    Patch(
        "rng_state",
        "tensor_parallel/random.py:447,457",
        "activation recompute saves and restores the CUDA generator",
        ("cpu", "meta"),
        lambda patches: [
            (megatron_random, "_get_cuda_rng_state", get_cpu_rng_state),
            (megatron_random, "_set_cuda_rng_state", set_cpu_rng_state),
        ],
    ),
    Patch(
        "rng_tracker",
        "tensor_parallel/random.py:235",
        "the tracker of named random states reads CUDA generators",
        ("cpu", "meta"),
        lambda patches: [
            (megatron_random, "_CUDA_RNG_STATE_TRACKER", patches.rng_tracker),
            (megatron_random, "_CUDA_RNG_STATE_TRACKER_INITIALIZED", True),
        ],
    ),
    Patch(
        "adam",
        "optimizer/__init__.py:30, optimizer/distrib_optimizer.py:642,940",
        "without apex and transformer-engine, torch's AdamW takes the place of FusedAdam; its step "
        "counts per parameter and cannot resume under the distributed optimizer",
        ("cpu", "cuda", "meta"),
        lambda patches: [
            (megatron_optimizer, "Adam", FusedAdam),
            (megatron_optimizer, "USING_PYTORCH_OPTIMIZER", False),
            (distrib_optimizer, "Adam", FusedAdam),
            (distrib_optimizer, "HAVE_APEX_OR_TE", True),
            (distrib_optimizer, "USING_APEX_OPTIMIZER", True),
        ],
    ),
    Patch(
        "one_pass",
        "optimizer/__init__.py:447,461,465,689, optimizer/optimizer.py:1308 and 560, "
        "optimizer/distrib_optimizer.py:2429",
        "clipping rewrites the gradient, and the copy to the weights reads the masters again; both "
        "run outside of Adam.step",
        ("cpu", "cuda", "meta"),
        lambda patches: [
            (megatron_optimizer, "ChainedOptimizer", OnePassChain),
            (megatron_optimizer, "DistributedOptimizer", OnePassDistributed),
            (megatron_optimizer, "Float16OptimizerWithFloat16Params", OnePassFloat16),
            (megatron_optimizer, "FP32Optimizer", OnePassFP32),
        ],
    ),
    Patch(
        "fp8_param_gather",
        "distributed/param_and_grad_buffer.py:1057,1069,1095",
        "a bucket is gathered in its dtype, or in FP8 if its weights are Transformer Engine's FP8 "
        "tensors; those of precision.fp8=torch are bf16",
        ("cpu", "cuda"),
        lambda patches: [(param_and_grad_buffer, "_ParamAndGradBucketGroup", FP8BucketGroup)],
    ),
    Patch(
        "weight_gradients",
        "tensor_parallel/layers.py:44,561",
        "adding a weight's gradient to the fp32 buffer inside its product takes an extension of "
        "apex; without it every micro-batch's is rounded to bf16 and added in a second pass",
        ("cpu", "cuda", "meta"),
        lambda patches: [
            (megatron_layers, "_grad_accum_fusion_available", True),
            (megatron_layers, "fused_weight_gradient_mlp_cuda", FUSED_WEIGHT_GRADIENTS),
        ],
    ),
    Patch(
        "checkpoint_writer",
        "dist_checkpointing/strategies/filesystem_async.py:104,212,235,475, "
        "strategies/common.py:40, serialization.py:422",
        "a save starts a Manager process per rank, which outlives a killed worker, forks writers "
        "out of a process that runs threads, and clones every tensor that is a view. Rank 0 alone "
        "writes common.pt, .metadata and metadata.json: an error there leaves the others in a "
        "collective, and in an asynchronous save training waits for them",
        ("cpu", "cuda"),
        _checkpoint_writer,
    ),
    Patch(
        "checkpoint_reader",
        "dist_checkpointing/strategies/torch.py:798, torch/distributed/checkpoint/filesystem.py "
        "(read_metadata), torch/distributed/checkpoint/default_planner.py (load_bytes)",
        "the index and every record of bytes are unpickled without restriction, which runs code "
        "that a checkpoint holds",
        ("cpu", "cuda"),
        lambda patches: [
            (torch_strategy, "_get_filesystem_reader", VettedReader),
            (DefaultLoadPlanner, "load_bytes", load_bytes_as_values),
        ],
    ),
)
DEVICE_LITERALS = "device_literals"
"""Name of the change that is a TorchFunctionMode: literal device="cuda", .cuda(), pin_memory
(pipeline_parallel/schedules.py:596,983,2138, optimizer/clip_grads.py:103 and 17 other places)."""


UPSTREAM_WARNINGS = (
    # torch 2.13 renames collectives and checkpoint calls that megatron-core uses by the old name.
    r"`torch\.distributed\.\w+` is deprecated",
    r"`load_state_dict` is deprecated",
    r"Please use DTensor instead",
    # schedules.py:480 reads .grad of a received tensor, which sequence parallelism made a view.
    r"The \.grad attribute of a Tensor that is not a leaf",
    # transformer_config.py:1225 is about transformer-engine's attention; ours is recomputed.
    r"If you are using transformer_engine as the transformer implementation",
)
"""Messages of megatron-core's own calls, suppressed inside the context; a user cannot act on
them."""


class Patches:
    """A re-entrant context in which megatron-core runs on this kind of platform.

    Args:
        kind: cpu, cuda, or meta (shapes only, for the planner).
        without: names of patches to omit; for the tests that show each is needed.

    Raises:
        PlatformError: megatron-core is missing or has another version.
    """

    device: torch.device
    rng_tracker: CpuRngTracker

    def __init__(
        self, kind: Literal["cpu", "cuda", "meta"], without: frozenset[str] = frozenset()
    ) -> None:
        check_megatron_version()
        self.device = torch.device("cuda" if kind == "cuda" else kind)
        self.rng_tracker = CpuRngTracker()
        self.capture = Capture()
        """Destination of a checkpoint's content."""
        self._active = [p for p in PATCHES if kind in p.kinds and p.name not in without]
        rewrites = kind != "cuda" and DEVICE_LITERALS not in without
        self._mode = CudaMeansHere(self.device) if rewrites else contextlib.nullcontext()
        self._saved: list[tuple[Any, str, Any]] = []
        self._warnings = warnings.catch_warnings()
        self._depth = 0

    def __enter__(self) -> "Patches":
        self._depth += 1
        if self._depth == 1:
            self._warnings = warnings.catch_warnings()
            self._warnings.__enter__()
            for message in UPSTREAM_WARNINGS:
                warnings.filterwarnings("ignore", message)
            for patch in self._active:
                for owner, name, value in patch.replacements(self):
                    self._saved.append((owner, name, getattr(owner, name, _ABSENT)))
                    setattr(owner, name, value)
            self._mode.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._depth -= 1
        if self._depth == 0:
            self._mode.__exit__(kind, error, trace)
            while self._saved:
                owner, name, value = self._saved.pop()
                if value is _ABSENT:
                    delattr(owner, name)
                else:
                    setattr(owner, name, value)
            self._warnings.__exit__(kind, error, trace)


def check_megatron_version() -> None:
    """Raise an error for a megatron-core version that the patches were not written against.

    Raises:
        PlatformError: missing, or not MEGATRON_VERSION.
    """
    try:
        found = version("megatron-core")
    except PackageNotFoundError:
        found = "none"
    if found != MEGATRON_VERSION:
        raise PlatformError(
            f"megatron-core {found} is installed; the engine's patches are written against "
            f"{MEGATRON_VERSION}; run: pip install megatron-core=={MEGATRON_VERSION}"
        )
