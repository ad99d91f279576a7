"""Registration of kernels as torch operators, for compile, fake tensors and opcheck.

csrc's own operators, `phi4_native::`, take a stream, which the library's ABI cannot read on a
machine without CUDA. The public ones, `phi4::`, take none: they pass the stream that is current
when they run, so that they can be captured, compiled and called on any device.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from phi4_kernels import cuda_library, registry


def register(op: str, step: str, schema: str, fake: Callable[..., Any]) -> Any:
    """Define `phi4::<schema>` for CPU (interpreted) and CUDA tensors.

    Args:
        op: the op's folder.
        step: the function of the implementation's module that runs it.
        schema: name, arguments and results in torch's schema language. A last argument
            `str implementation` is added, and names the module.
        fake: returns outputs of the right shape, dtype and device without computing them.

    Returns:
        The operator's default overload.
    """
    name = schema.partition("(")[0]
    signature = schema.removeprefix(name).replace(") ->", ", str implementation) ->", 1)

    def launch(*args: Any) -> Any:
        # Looked up when called: an implementation is imported when it first runs.
        run, device = getattr(registry.implementation(op, args[-1]), step), args[0].device
        if device.type == "cpu" or device.index == torch.cuda.current_device():
            return run(*args[:-1])
        # Triton launches on the current device, not on that of the tensors.
        with torch.cuda.device(device):
            return run(*args[:-1])

    return define(name, signature, launch, lambda *args: fake(*args[:-1]))


def register_cuda(schema: str, fake: Callable[..., Any]) -> Any:
    """Define `phi4::<schema>` over csrc's operator of that name and a last `int stream`.

    Args:
        schema: name, arguments and results in torch's schema language; the first argument is a
            tensor or a list of them, whose device is used.
        fake: makes outputs of the right shape, dtype and device without computing them.

    Returns:
        The operator's default overload. A call loads the library.
    """
    name = schema.partition("(")[0]

    def launch(*args: Any) -> Any:
        cuda_library.load()
        first = args[0] if isinstance(args[0], torch.Tensor) else args[0][0]
        with stream_of(first.device) as stream:
            return getattr(torch.ops.phi4_native, name).default(*args, stream)

    return define(name, schema.removeprefix(name), launch, fake)


@contextmanager
def stream_of(device: torch.device) -> Iterator[int]:
    """Make a device current; yields its current stream as csrc takes it, 0 on the CPU."""
    if device.type == "cpu":
        yield 0
        return
    with torch.cuda.device(device):
        yield torch.cuda.current_stream(device).cuda_stream


def define(name: str, signature: str, launch: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Define `phi4::<name><signature>` for CPU and CUDA tensors.

    torch increments the version counter of tensors that its own operators overwrite. Here this is
    done explicitly, so that code that saved such a tensor for backward gets torch's error, not a
    wrong gradient.

    Returns:
        A function that calls it: of `_direct`, or of `_traceable` if the operator overwrites.
    """
    torch.library.define(f"phi4::{name}", signature)
    operator = getattr(torch.ops.phi4, name).default
    aliases = [argument.alias_info for argument in operator._schema.arguments]
    written = [i for i, alias in enumerate(aliases) if alias is not None and alias.is_write]

    def run(*args: Any) -> Any:
        result = launch(*args)
        for index in written:
            torch.autograd.graph.increment_version(args[index])
        return result

    kernel = run if written else launch
    torch.library.impl(f"phi4::{name}", ("cpu", "cuda"))(kernel)
    torch.library.register_fake(f"phi4::{name}")(fake)
    dispatched = _traceable(operator, signature, written, launch) if written else operator
    return _direct(kernel, dispatched)


def _direct(kernel: Callable[..., Any], dispatched: Callable[..., Any]) -> Callable[..., Any]:
    """Call the kernel without torch's dispatcher, which takes as long as all other host work.

    Tracing, compilation, profiling, fake tensors and tensor subclasses get the operator.
    """
    is_compiling = torch.compiler.is_compiling
    num_modes, is_profiling = (
        torch._C._len_torch_dispatch_stack,
        torch._C._autograd._profiler_enabled,
    )

    def call(*args: Any, **named: Any) -> Any:
        first = args[0]
        if isinstance(first, list) and first:
            first = first[0]
        is_plain = type(first) in _PLAIN and not named
        # Modes and subclasses need the operator; plain eager calls do not.
        if not is_plain or is_compiling() or num_modes() or is_profiling():
            return dispatched(*args, **named)
        return kernel(*args)

    return call


_PLAIN = (torch.Tensor, torch.nn.Parameter)


def _traceable(
    operator: Any, signature: str, written: list[int], launch: Callable[..., Any]
) -> Callable[..., None]:
    """The operator; under torch.compile, one that writes to copies, which are then copied back.

    To preserve a tensor that an operator overwrites, inductor copies its memory by the strides and
    offset seen while tracing (`clone_preserve_strides`). But on a GPU it pads rows of more than
    1024 elements (seen in torch 2.11 and 2.13), and an input begins at its own first element, not
    at its storage's (2.11). Both give wrong numbers without an error. An operator that overwrites
    nothing gets tensors as they were traced, and torch's own copy_ handles every layout. The cost,
    under torch.compile only, is a copy of the overwritten tensors and a copy back.
    """
    arguments, arrow, results = signature.partition(" -> ")
    if results != "()":
        raise ValueError(f"{operator} overwrites and returns {results}; expected ()")
    types = [str(operator._schema.arguments[index].type) for index in written]
    made = ", ".join("Tensor[]" if kind.startswith("List") else "Tensor" for kind in types)
    name = operator._schema.name.partition("::")[2]
    plain = re.sub(r"\([a-z]!\)", "", arguments)
    torch.library.define(f"phi4_copying::{name}", f"{plain}{arrow}({made})")
    torch.library.impl(f"phi4_copying::{name}", ("cpu", "cuda"))(_on_copies(written, launch))
    nothing = _on_copies(written, lambda *args: None)
    torch.library.register_fake(f"phi4_copying::{name}")(nothing)
    copying = getattr(torch.ops.phi4_copying, name).default

    def call(*args: Any) -> None:
        if not torch.compiler.is_compiling():
            operator(*args)
            return
        fresh = copying(*args)
        for index, values in zip(written, fresh if len(written) > 1 else [fresh], strict=True):
            targets = args[index] if isinstance(args[index], list) else [args[index]]
            sources = values if isinstance(args[index], list) else [values]
            for target, source in zip(targets, sources, strict=True):
                target.copy_(source)

    return call


def _on_copies(written: list[int], launch: Callable[..., Any]) -> Callable[..., Any]:
    """Run `launch` on copies of the arguments that it overwrites, and return the copies."""

    def run(*args: Any) -> Any:
        renewed = list(args)
        for index in written:
            old = args[index]
            renewed[index] = [x.clone() for x in old] if isinstance(old, list) else old.clone()
        launch(*renewed)
        fresh = tuple(renewed[index] for index in written)
        return fresh if len(fresh) > 1 else fresh[0]

    return run
