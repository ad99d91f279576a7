"""Measures one pass of one case for all its providers, and makes the rows."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from phi4_kernels import dispatch
from phi4_kernels.bench import providers, timing
from phi4_kernels.bench.ceilings import Ceilings
from phi4_kernels.errors import GateError, KernelError
from phi4_kernels.evidence import machine_of
from phi4_kernels.registry import CallInputs, Case, Cost, Entry
from phi4_kernels.testing import error_rule, evidence_rows, numerics

NUM_SAMPLES = 50
_QUICK = 15
"""Samples per variant when only a choice depends on them, not a published number."""
_POSSIBLE = 1.15
"""Datasheet bandwidth over measured copy rate, on H100 and H200 alike: faster is a mistake."""


@dataclass(frozen=True, slots=True)
class Variant:
    """One provider's function, and whether its results meet the error rule."""

    name: str
    run: Callable[..., Any]
    is_right: bool


@dataclass(frozen=True, slots=True)
class Pass:
    """One thing to time."""

    entry: Entry
    case: Case
    dtype: torch.dtype
    mode: str
    cost: Cost


def variants(entry: Entry, ours: str, against: list[str]) -> tuple[list[Variant], list[str]]:
    """Our implementation and the available providers, and why the others are missing."""
    own = partial(entry.timed or entry.function, implementation=ours)
    found, absent = [Variant(ours, own, True)], []
    for name in against:
        try:
            run = providers.function(name, entry)
            found.append(Variant(name, run, _is_right(entry, run)))
        except Exception as error:  # a foreign package may fail in any way
            absent.append(f"{name}: {error}")
    return found, absent


def _is_right(entry: Entry, run: Callable[..., Any]) -> bool:
    """Check the provider's forward by the error rule, on the first proof case that it supports."""
    for case in entry.proof_cases:
        inputs = _moved(entry.make(case, _dtype_of(entry, torch.bfloat16)))
        try:
            ours = numerics.evaluate(run, inputs, None)
        except Exception:  # of this case; cuDNN takes no document of one token
            if case is entry.proof_cases[-1]:
                raise
        else:
            break
    # The same rule as for our kernels: a fast provider that is wrong is marked in its row.
    truth = numerics.evaluate(entry.reference, numerics.converted(inputs, numerics.doubled), None)
    eager = numerics.evaluate(entry.reference, inputs, None)
    try:
        for name, exact in truth.items():
            error_rule.check(name, ours[name], eager[name], exact)
    except GateError:
        return False
    return True


def _moved(inputs: CallInputs) -> CallInputs:
    return numerics.converted(inputs, partial(numerics.copied, device="cuda"))


def _drawn(task: Pass) -> CallInputs:
    """Random inputs generated on the GPU: billions of numbers take minutes on a CPU."""
    with torch.device("cuda"):
        return _moved(task.entry.make(task.case, task.dtype))


def _prepared(
    task: Pass, run: Callable[..., Any], sets: list[CallInputs], stream: torch.cuda.Stream
) -> list[Callable[[], Any]]:
    """One call per input set: forward without autograd, or backward of a graph already built."""
    if task.mode == "forward":
        return [partial(_forward, run, inputs) for inputs in sets]
    with torch.cuda.stream(stream):
        return [_backward(run, inputs) for inputs in sets]


def _forward(run: Callable[..., Any], inputs: CallInputs) -> Any:
    # Autograd's bookkeeping is not the kernel's time.
    with torch.no_grad():
        return run(**inputs.tensors, **inputs.constants)


def _backward(run: Callable[..., Any], inputs: CallInputs) -> Callable[[], Any]:
    leaves = {name: t.detach().requires_grad_() for name, t in inputs.tensors.items()}
    # The op may overwrite an activation but not a leaf; * 1 is not timed.
    activations = {name: leaf * 1 for name, leaf in leaves.items()}
    outputs = numerics.outputs_of(run(**activations, **inputs.constants))
    gradients = [torch.randn_like(output) for output in outputs]
    wanted = list(activations.values())
    return partial(
        torch.autograd.grad, outputs, wanted, gradients, retain_graph=True, allow_unused=True
    )


def _memory(task: Pass, run: Callable[..., Any], inputs: CallInputs) -> dict[str, int]:
    """Peak bytes in addition to the inputs, and bytes that autograd keeps in addition to them."""
    # Inputs are not counted, only what the function keeps in addition.
    given = {tensor.data_ptr() for tensor in inputs.tensors.values()}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in given:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    leaves = {
        name: t.clone().requires_grad_(task.entry.differentiable)
        for name, t in inputs.tensors.items()
    }
    activations = {name: leaf * 1 for name, leaf in leaves.items()}
    given |= {t.untyped_storage().data_ptr() for t in (*leaves.values(), *activations.values())}
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = run(**activations, **inputs.constants)
    peak = torch.cuda.max_memory_allocated() - before
    del outputs
    return {"peak_bytes": peak, "saved_bytes": sum(saved.values())}


def measure(task: Pass, found: list[Variant], ceilings: Ceilings) -> list[dict[str, Any]]:
    """Time all variants of a pass, interleaved.

    Raises:
        GateError: a time is under the floor, so the measurement is wrong.
    """
    # max(bytes / copy rate, FLOPs / product rate)
    floor = task.cost.floor_seconds(ceilings.bytes_per_second, ceilings.flops_per_second)
    num_sets = timing.num_input_sets(task.cost.bytes)
    sets = [_drawn(task) for _ in range(num_sets)]
    stream, replays, calls = torch.cuda.Stream(), {}, {}
    # Calls of a replay: every input set equally often, and long enough for the clock.
    count = num_sets * timing.repeats(floor, num_sets)
    for variant in found:
        try:
            calls[variant.name] = _prepared(task, variant.run, sets, stream)
            # Once outside of the graph: compilation and allocation cannot be captured.
            for call in calls[variant.name]:
                call()
            torch.cuda.synchronize()
            replays[variant.name] = timing.captured(
                calls[variant.name] * (count // num_sets), stream
            )
        except Exception as error:  # a foreign provider may refuse a graph; ours must not
            if variant is found[0]:
                raise
            print(f"  {variant.name}: not timed, {type(error).__name__}: {error}")
    times = timing.sample_seconds(replays, NUM_SAMPLES)
    return [
        _row(task, variant, [t / count for t in times[variant.name]], floor, ceilings)
        | _memory(task, variant.run, sets[0])
        | {
            "host_us": round(timing.host_seconds(calls[variant.name][0]) * 1e6, 2),
            "input_sets": num_sets,
        }
        for variant in found
        if variant.name in times
    ]


def beside_each_other(entry: Entry, names: Sequence[str]) -> dict[str, float | None]:
    """Median microseconds of all passes of the first bench case, implementations interleaved.

    Calls are not captured in a graph, so what they cost on the host is in the number where the
    device waits for it, as in training.

    Args:
        entry: with bench cases.
        names: implementations of its op.

    Returns:
        By implementation; None where it cannot run the case, for example for lack of memory.
    """
    totals = dict.fromkeys(names, 0.0)
    dtype, case = _dtype_of(entry, torch.bfloat16), entry.bench_cases[0]
    for mode, cost in entry.cost(case, dtype).items():
        task = Pass(entry, case, dtype, mode, cost)
        sets = [_drawn(task) for _ in range(timing.num_input_sets(cost.bytes))]
        stream, calls = torch.cuda.current_stream(), {}
        for name in list(totals):
            run = partial(entry.timed or entry.function, implementation=name)
            try:
                calls[name] = _prepared(task, run, sets, stream)
                for call in calls[name]:
                    call()
                torch.cuda.synchronize()
            except (KernelError, RuntimeError):  # torch.OutOfMemoryError is one
                del totals[name]
                calls.pop(name, None)
        runs: dict[str, Callable[[], None]] = {
            name: partial(_all, own) for name, own in calls.items()
        }
        times = timing.sample_seconds(runs, _QUICK) if runs else {}
        for name, seconds in times.items():
            totals[name] += timing.percentile(seconds, 50) / len(sets) * 1e6
    return {name: totals.get(name) for name in names}


def _all(calls: list[Callable[[], Any]]) -> None:
    for call in calls:
        call()


def _row(
    task: Pass, variant: Variant, seconds: list[float], floor: float, ceilings: Ceilings
) -> dict[str, Any]:
    median = timing.percentile(seconds, 50)
    # Data that the previous call left in L2 need not be read.
    moved = replace(task.cost, bytes=max(0, task.cost.bytes - ceilings.l2_bytes))
    fastest = moved.floor_seconds(ceilings.bytes_per_second, ceilings.flops_per_second) / _POSSIBLE
    if median < fastest:
        raise GateError(
            f"{task.entry.name} {task.mode} by {variant.name} took {median * 1e6:.1f} us; expected "
            f"at least {fastest * 1e6:.1f} us; the timing or the byte formula is wrong"
        )
    return {
        "op": task.entry.name,
        "mode": task.mode,
        "case": task.case.name,
        "dtype": str(task.dtype).removeprefix("torch."),
        "provider": variant.name,
        "meets_error_rule": variant.is_right,
        **{f"p{q}_us": round(timing.percentile(seconds, q) * 1e6, 3) for q in (20, 50, 80)},
        "floor_us": round(floor * 1e6, 3),
        "percent_of_floor": round(100 * floor / median, 1),
        "bytes": task.cost.bytes,
        "flops": task.cost.flops,
        "formula": task.cost.formula,
        "copy_bytes_per_second": round(ceilings.bytes_per_second),
        "matmul_flops_per_second": round(ceilings.flops_per_second),
        "num_samples": len(seconds),
        **evidence_rows.machine(),
    }


def best_of_torch(measured: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Make `torch` the faster of eager and compile; both keep a row, `compile` under its name."""
    plain = {row["provider"]: row for row in measured if row["provider"] in ("torch", "compile")}
    if not plain:
        return measured
    # `torch` in a comparison is the faster of its two forms.
    fastest = min(plain.values(), key=lambda row: row["p50_us"])
    way = "eager" if fastest["provider"] == "torch" else "compile"
    others = [row for row in measured if row["provider"] not in plain]
    slower = [row | {"provider": _WAYS[name]} for name, row in plain.items() if row is not fastest]
    return [*others, fastest | {"provider": "torch", "way": way}, *slower]


_WAYS = {"torch": "torch-eager", "compile": "torch-compile"}


def passes(entry: Entry, dtype: torch.dtype) -> list[Pass]:
    """All passes of an entry's bench cases."""
    dtype = _dtype_of(entry, dtype)
    return [
        Pass(entry, case, dtype, mode, cost)
        for case in entry.bench_cases
        for mode, cost in entry.cost(case, dtype).items()
    ]


def _dtype_of(entry: Entry, wanted: torch.dtype) -> torch.dtype:
    return wanted if wanted in entry.dtypes else entry.dtypes[0]


def require_green(entry: Entry, implementation: str) -> None:
    """Raise GateError unless every numeric check of the entry is green on this GPU.

    A green row of the installed source on this capability is sufficient.
    """
    from phi4_kernels.testing import gates

    machine = machine_of(torch.device("cuda", torch.cuda.current_device()))
    if dispatch.known().proof(entry.op, implementation, machine):
        return
    for check in gates.names(entry, implementation):
        try:
            gates.check_numbers(*check, implementation, "cuda")
        except KernelError as error:
            raise GateError(f"{'/'.join(check)} is red, so nothing is timed: {error}") from error
