"""A server under load: `phi4 serve` of a tiny model on this machine, and clients of every manner.

Three parts, on one server: patient streams, timed; requests that leave, dawdle or break off, which
must leave nothing behind; and new weights in the middle of it all.

    python -m tools.serve_load --seconds 60 --requests 1000 --json benchmarks/serve_load.jsonl
"""

import argparse
import asyncio
import json
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
from prometheus_client.parser import text_string_to_metric_families

from phi4.config import Recipe, dump_toml, load_recipe, with_overrides
from phi4.data.vocabulary.tokenizer import rank_file_bytes
from phi4.engine.checkpoint import save_checkpoint
from phi4.engine.engine import Engine
from phi4.engine.model.gpt import initialise
from phi4.engine.platform import connect, disconnect
from phi4.rundir.checkpoints import checkpoints_dir
from phi4.rundir.names import RECIPE_FILE
from phi4.verify.measured_rows import append_row
from tools.load_clients import (
    RudeClients,
    Server,
    Times,
    fetch,
    ids_of,
    keep_asking,
    random_body,
)

ROOT = Path(__file__).parents[1]
LARGEST_GROWTH = 0.05
"""Of the server's memory over the rude requests, after a warm-up of the same kind."""
_RECIPE = ROOT / "examples" / "recipes" / "tiny_pretrain.toml"
_START_SECONDS = 300.0
_SETTLE_SECONDS = 60.0
_NUM_COMPARED = 16


class Sizes(NamedTuple):
    """How much is asked.

    Attributes:
        streams: at once.
        seconds: duration of the complete streams.
        warm_up: rude requests before memory is measured.
        requests: rude requests whose traces are looked for.
        max_tokens: maximum tokens of their answers.
    """

    streams: int = 64
    seconds: float = 60.0
    warm_up: int = 500
    requests: int = 1000
    max_tokens: int = 48


class TinyRun:
    """A run directory whose checkpoints are drawn, not trained.

    Args:
        run_dir: made here.
    """

    def __init__(self, run_dir: Path) -> None:
        run_dir.mkdir(parents=True)
        ranks = run_dir / "bytes.tiktoken"
        ranks.write_bytes(rank_file_bytes({bytes([value]): value for value in range(256)}))
        words = (f"tokenizer.path={ranks}", "model.vocab_size=352", "parallel.sequence=false")
        single = (f"parallel.{name}=1" for name in ("tensor", "pipeline"))
        self.dir = run_dir
        self._recipe: Recipe = with_overrides(load_recipe(_RECIPE), [*words, *single])
        self._engine = Engine(self._recipe, connect("cpu", threads=1), trains=False)

    def write(self, step: int) -> Path:
        """Return a checkpoint whose weights belong to this step alone."""
        engine, files = self._engine, {RECIPE_FILE: dump_toml(self._recipe)}
        initialise(engine.bare_chunks, self._recipe.model, step, engine.layout)
        root = checkpoints_dir(self.dir)
        return save_checkpoint(engine, root, step, form="none", keep=9, files=files, data={})

    def close(self) -> None:
        """End the engine; the files stay."""
        self._engine.close()
        disconnect()


class ServerProcess:
    """`phi4 serve` on a free port.

    Args:
        words: arguments behind `serve`.
        log: takes what it says.
    """

    def __init__(self, words: Sequence[str], log: Path) -> None:
        self._log = log
        command = (sys.executable, "-m", "phi4", "serve", *words, "--port=0")
        with log.open("w") as stream:
            self._process = subprocess.Popen(command, stderr=stream, stdout=stream)

    def server(self) -> Server:
        """Where it answers, once it does.

        Raises:
            RuntimeError: it ended, or says nothing.
        """
        ends = time.monotonic() + _START_SECONDS
        while time.monotonic() < ends and self._process.poll() is None:
            found = re.search(r"^serving (\S+) .*http://([^:/]+):(\d+)", self.said(), re.MULTILINE)
            if found:
                return Server(found[2], int(found[3]), found[1])
            time.sleep(0.1)
        raise RuntimeError(f"phi4 serve does not answer: {self.said()}")

    def said(self) -> str:
        """Its output."""
        return self._log.read_text()

    def resident_bytes(self) -> int:
        """Of it and its children."""
        process = psutil.Process(self._process.pid)
        everyone = [process, *process.children(recursive=True)]
        return sum(one.memory_info().rss for one in everyone)

    def end(self) -> int:
        """Ask it to end; its exit code."""
        self._process.terminate()
        try:
            return self._process.wait(_START_SECONDS)
        finally:
            self._process.kill()


@contextmanager
def serving(words: Sequence[str], log: Path) -> Iterator[ServerProcess]:
    """A server while the block runs.

    Raises:
        RuntimeError: it does not end as expected when it is asked to.
    """
    process = ServerProcess(words, log)
    try:
        yield process
    finally:
        code = process.end()
    if code != 0:
        raise RuntimeError(f"phi4 serve ended with {code}: {process.said()}")


async def numbers(server: Server) -> dict[str, float]:
    """Return what /metrics says, by name; of those with labels the last one."""
    text = await fetch(server, "/metrics")
    families = text_string_to_metric_families(text)
    return {one.name: one.value for family in families for one in family.samples}


async def settled(server: Server) -> dict[str, float]:
    """Return the numbers once nothing is open, at the latest when patience is over."""
    ends = time.monotonic() + _SETTLE_SECONDS
    while True:
        found = await numbers(server)
        blocks = found.get("phi4_cache_blocks_in_use")
        if (not found["phi4_requests_open"] and blocks == 0) or time.monotonic() > ends:
            return found
        await asyncio.sleep(0.2)


async def measure_rude(
    server: Server, sizes: Sizes, resident_bytes: Callable[[], int]
) -> dict[str, Any]:
    """Return what requests of all manners leave behind."""
    draws, times = random.Random(1), Times()
    sizes_bytes = []
    for count in (sizes.warm_up, sizes.requests):
        clients = RudeClients(server, sizes.max_tokens, times)
        await clients.ask(draws, count, sizes.streams)
        clients.leave(draws)
        left = await settled(server)
        sizes_bytes.append(resident_bytes())
    return {
        "requests": sizes.requests,
        "manners": dict(clients.counts),
        "errors": dict(times.errors),
        "blocks_in_use": left["phi4_cache_blocks_in_use"],
        "open": left["phi4_requests_open"],
        "resident_mb": [round(size / 2**20, 1) for size in sizes_bytes],
        "growth": round(sizes_bytes[1] / sizes_bytes[0] - 1, 4),
    }


async def measure_reload(
    server: Server, sizes: Sizes, publish: Callable[[], Path]
) -> dict[str, Any]:
    """Load new weights during streams: failures, and the tokens before and after."""
    before, times, is_over = await compared_ids(server), Times(), asyncio.Event()
    streams = asyncio.create_task(keep_asking(server, sizes.streams, is_over.is_set, times, seed=2))
    path = await asyncio.to_thread(publish)
    ends = time.monotonic() + _START_SECONDS
    while json.loads(await fetch(server, "/health"))["weights"] != path.name:
        if time.monotonic() > ends:
            raise RuntimeError(f"the server does not take {path}")
        await asyncio.sleep(0.2)
    num_before = times.num_requests
    while times.num_requests < num_before + 2 * sizes.streams and not times.errors:
        await asyncio.sleep(0.2)
    is_over.set()
    await streams
    after = await compared_ids(server)
    return {
        "requests_before": num_before,
        "requests_after": times.num_requests - num_before,
        "errors": dict(times.errors),
        "changed": sum(one != other for one, other in zip(before, after, strict=True)),
        "after": after,
    }


async def compared_ids(server: Server) -> list[list[int]]:
    """Answers to some requests, one after the other."""
    draws = random.Random(3)
    return [await ids_of(server, random_body(server, draws, 32)) for _ in range(_NUM_COMPARED)]


async def measure_patient(server: Server, sizes: Sizes) -> dict[str, Any]:
    """How long streams wait for their tokens, in milliseconds."""
    begun, times = time.monotonic(), Times()
    ends = begun + sizes.seconds
    await keep_asking(server, sizes.streams, lambda: time.monotonic() > ends, times)
    return {
        "requests": times.num_requests,
        "errors": dict(times.errors),
        "tokens_per_second": round(times.num_tokens / (time.monotonic() - begun), 1),
        "first_token_ms": percentiles_ms(times.first),
        "between_tokens_ms": percentiles_ms(times.between),
    }


def percentiles_ms(seconds: Sequence[float]) -> dict[str, float]:
    """Return the median and the 99th percentile; nothing of nothing."""
    if not seconds:
        return {}
    found = np.percentile(seconds, (50, 99)) * 1e3
    return {"p50": round(float(found[0]), 2), "p99": round(float(found[1]), 2)}


def measure(work: Path, sizes: Sizes) -> dict[str, Any]:
    """Return all three parts; a row."""
    run = TinyRun(work / "tiny")
    run.write(1)
    words = (str(run.dir), "--follow", "--max-requests=2000")
    with serving(words, work / "server.log") as process:
        server = process.server()
        patient = asyncio.run(measure_patient(server, sizes))
        print(f"{sizes.streams} streams: {patient}", flush=True)
        rude = asyncio.run(measure_rude(server, sizes, process.resident_bytes))
        print(f"rude requests: {rude}", flush=True)
        reload = asyncio.run(measure_reload(server, sizes, lambda: run.write(2)))
        left = asyncio.run(settled(server))
    run.close()
    with serving((str(run.dir),), work / "fresh.log") as process:
        fresh = asyncio.run(compared_ids(process.server()))
    reload["equal_fresh"] = sum(
        one == other for one, other in zip(reload.pop("after"), fresh, strict=True)
    )
    reload["compared"] = _NUM_COMPARED
    reload["reloads"] = left["phi4_reloads_total"]
    print(f"reload: {reload}", flush=True)
    return {
        "benchmark": "serve_load",
        "streams": sizes.streams,
        "seconds": sizes.seconds,
        "patient": patient,
        "rude": rude,
        "reload": reload,
    }


def faults(row: dict[str, Any]) -> list[str]:
    """Return what a row shows that must not be."""
    rude, reload = row["rude"], row["reload"]
    compared = reload["compared"]
    checks = {
        f"errors of patient streams: {row['patient']['errors']}": not row["patient"]["errors"],
        f"errors of rude requests that read all: {rude['errors']}": not rude["errors"],
        f"{rude['blocks_in_use']:g} blocks in use": not rude["blocks_in_use"],
        f"{rude['open']:g} requests open": not rude["open"],
        f"memory grew by {rude['growth']:.1%}": rude["growth"] <= LARGEST_GROWTH,
        f"errors while weights changed: {reload['errors']}": not reload["errors"],
        "no stream was there when the weights changed": reload["requests_before"] > 0,
        f"{reload['reloads']:g} reloads": reload["reloads"] == 1,
        "tokens did not change": reload["changed"] == compared,
        f"{reload['equal_fresh']} of {compared} answers as a fresh server's": (
            reload["equal_fresh"] == compared
        ),
    }
    return [what for what, holds in checks.items() if not holds]


def main() -> int:
    """Command line; exit 1 where something must not be."""
    sizes = Sizes()
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--streams", type=int, default=sizes.streams)
    parser.add_argument("--seconds", type=float, default=sizes.seconds)
    parser.add_argument("--warm-up", type=int, default=sizes.warm_up)
    parser.add_argument("--requests", type=int, default=sizes.requests)
    parser.add_argument("--json", type=Path, help="append the row to this file")
    asked = parser.parse_args()
    sizes = Sizes(asked.streams, asked.seconds, asked.warm_up, asked.requests)
    with tempfile.TemporaryDirectory() as work:
        row = measure(Path(work), sizes)
    found = faults(row)
    if asked.json:
        append_row(asked.json, {**row, "passed": not found})
    print("; ".join(found) or "nothing is left behind, and no other stream was disturbed")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
