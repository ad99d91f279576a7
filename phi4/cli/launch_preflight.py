"""`phi4 launch preflight`: checks of the machines before a run."""

from pathlib import Path
from tempfile import mkdtemp
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from phi4.cli.tables import table_console
from phi4.config import check, load_recipe
from phi4.errors import PlatformError
from phi4.launch import WorkerEnvironment, join, on_ranks
from phi4.stages import require_stage

if TYPE_CHECKING:
    from phi4.verify.preflight import Facts, Preflight

_SHOWN_RANKS = 32


def preflight(
    recipe_path: Annotated[Path, typer.Argument(help="A .toml recipe.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value.")] = None,
) -> None:
    """Compare all ranks before a run: code, devices, memory, disk, speed. Exit 2 on a failure.

    Start it like the run: alone on one machine, or under torchrun or srun on several. It takes
    seconds, leaves no files behind, and names rank and host of every problem.
    """
    recipe = load_recipe(recipe_path, overrides or [])
    require_stage(recipe)
    check(recipe)
    parallel = recipe.parallel

    def body(worker: WorkerEnvironment) -> None:
        from phi4.engine.platform import disconnect
        from phi4.train.reliability.phases import Phases
        from phi4.train.reliability.watchdog import watched
        from phi4.verify import preflight as before

        reliability, phases = recipe.reliability, Phases()
        seconds = reliability.rendezvous_seconds
        platform = join(worker, recipe.run.platform, recipe.run.threads, seconds)
        with watched(platform, phases, reliability, print), phases.during("preflight", 0):
            found = before.preflight(recipe, platform, phases.tick)
        if platform.is_writer:
            _show(found)
        if found.failures:
            raise PlatformError(_summary(found.failures))
        disconnect()

    argv = ["launch", "preflight", str(recipe_path), *(overrides or [])]
    num_workers = parallel.model_parallel_size * max(parallel.data, 1)
    logs = Path(mkdtemp(prefix="phi4-preflight-"))
    raise typer.Exit(on_ranks(argv, body, num_workers=num_workers, work_dir=logs))


def _summary(failures: list[str]) -> str:
    more = f", and {len(failures) - 1} more above" if failures[1:] else ""
    return f"preflight: {failures[0]}{more}"


def _show(found: "Preflight") -> None:
    """The ranks as a table, those with failures first where there are many."""
    # Without a terminal a table is as wide as it needs to be, for logs.
    console = table_console(160)
    table = Table(box=SIMPLE_HEAD)
    columns = ("rank", "host", "device", "driver", "MHz", "C", "free memory", "of the host", "disk")
    for name in (*columns, "TFLOP/s", "link GB/s"):
        table.add_column(name, justify="left" if name in ("host", "device", "driver") else "right")
    failed = "\n".join(found.failures)
    facts = sorted(found.facts, key=lambda facts: f"{facts.where}:" not in failed)
    for one in facts[:_SHOWN_RANKS]:
        table.add_row(*_row(one))
    console.print(table)
    if facts[_SHOWN_RANKS:]:
        console.print(f"and {len(facts) - _SHOWN_RANKS} more ranks")
    program = found.facts[0].program
    console.print(f"code {program.code}, recipe {program.recipe}, {program.packages}", markup=False)
    if found.all_reduce_gbytes_per_second:
        console.print(f"all-reduce {found.all_reduce_gbytes_per_second:.2f} GB/s over all ranks")
    for line in found.failures or ["preflight: nothing is wrong"]:
        console.print(line, markup=False)


def _row(facts: "Facts") -> list[str]:
    device = facts.device
    clocks = f"{device.clock_mhz}/{device.max_clock_mhz}" if device.max_clock_mhz else "-"
    return [
        str(facts.program.rank),
        facts.program.host,
        device.name,
        device.driver or "-",
        clocks,
        str(device.celsius or "-"),
        f"{device.free_bytes / 2**30:.1f}/{device.total_bytes / 2**30:.1f} GiB",
        f"{facts.free_memory_bytes / 2**30:.1f} GiB",
        f"{facts.free_disk_bytes / 1e9:.0f} GB",
        f"{facts.matmul_tflops:.3g}",
        f"{facts.link_gbytes_per_second:.3g}",
    ]
