"""Throughput of `phi4 data tokenize` beside bare tiktoken and megatron-core's builder.

All three take the same documents on the same cores. Bare tiktoken gets them in memory and writes
nothing; the other two go from a jsonl file to a .bin/.idx pair. Rounds are interleaved, so what
else runs on the machine meets all sides alike; tokens per CPU second are free of it.

    python tools/tokenize_speed.py --rounds 5 --json benchmarks/data_tokenize.jsonl
"""

import argparse
import json
import multiprocessing
import os
import platform
import resource
import subprocess
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path

import numpy as np
import tiktoken

from phi4.config import TokenizerConfig
from phi4.data.token_merge import merge_runs
from phi4.data.token_plan import make_plan
from phi4.data.tokenize import tokenize_parts
from phi4.data.tokenizer import SPLIT_PATTERN, load_tokenizer

CONFIG = TokenizerConfig()


def write_text(path: Path, megabytes: int) -> list[str]:
    """A jsonl file of this Python's sources, repeated until it is large enough."""
    files = sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py"))
    texts, size = [], 0
    while size < megabytes << 20:
        for file in files:
            text = file.read_text(encoding="utf-8", errors="replace").replace("\0", "")
            if "site-packages" in file.parts or not text.strip():
                continue
            texts.append(text)
            size += len(text)
            if size >= megabytes << 20:
                break
    with path.open("w") as stream:
        stream.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    return texts


def bare(texts: list[str], cores: int) -> int:
    """encode_ordinary_batch on threads, nothing written."""
    return sum(map(len, _encoding().encode_ordinary_batch(texts, num_threads=cores)))


def ours(rows: Path, out: Path, cores: int) -> int:
    """`phi4 data tokenize`, shuffle, checksums and manifest included."""
    plan = make_plan([rows], load_tokenizer(CONFIG).facts, part_bytes=16 << 20)
    tokenize_parts(plan, out, CONFIG, workers=cores, max_rejected=0, follow=lambda progress: None)
    return merge_runs(out).num_tokens


def megatron(rows: Path, out: Path, cores: int) -> int:
    """As megatron's preprocess_data.py does: a pool encodes lines, one process writes them."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{out}.bin", dtype=np.int32)
    tokens = 0
    with rows.open("rb") as lines, multiprocessing.get_context("fork").Pool(cores) as pool:
        for ids in pool.imap(_megatron_line, lines, 32):
            builder.add_document(ids, [len(ids)])
            tokens += len(ids)
    builder.finalize(f"{out}.idx")
    return tokens


def _megatron_line(line: bytes) -> list[int]:
    encoding = _encoding()
    return [*encoding.encode_ordinary(json.loads(line)["text"]), 100_257]


@lru_cache(maxsize=1)
def _encoding() -> tiktoken.Encoding:
    tokenizer = load_tokenizer(CONFIG)
    return tiktoken.Encoding(
        "bare",
        pat_str=SPLIT_PATTERN,
        mergeable_ranks=tokenizer.mergeable_ranks,
        special_tokens=tokenizer.special_tokens,
    )


def main() -> None:
    """Measure and append one row per number of cores."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--megabytes", type=int, default=100)
    parser.add_argument("--cores", type=int, nargs="+", default=[1, os.cpu_count()])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    _encoding()
    with tempfile.TemporaryDirectory() as directory:
        rows = Path(directory) / "rows.jsonl"
        texts = write_text(rows, options.megabytes)
        for cores in options.cores:
            sides = {
                "bare": lambda cores=cores: bare(texts, cores),
                "phi4": lambda cores=cores: ours(rows, Path(directory) / "ours", cores),
                "megatron": lambda cores=cores: megatron(rows, Path(directory) / "theirs", cores),
            }
            row = {"cores_used": cores, "megabytes": options.megabytes, **_measure(sides, options)}
            print(json.dumps(row))
            if options.json:
                with options.json.open("a") as stream:
                    stream.write(json.dumps(row) + "\n")


def _measure(sides: dict[str, Callable[[], int]], options: argparse.Namespace) -> dict:
    rates: dict[str, list[float]] = {name: [] for name in sides}
    cpu: dict[str, list[float]] = {name: [] for name in sides}
    names = list(sides)
    for number in range(options.rounds):
        for name in names[number % 3 :] + names[: number % 3]:
            begun, used = time.perf_counter(), _cpu_seconds()
            tokens = sides[name]()
            rates[name].append(tokens / (time.perf_counter() - begun))
            cpu[name].append(tokens / (_cpu_seconds() - used))
    result: dict[str, object] = {}
    for name in names:
        result[f"{name}_tokens_per_second"] = round(float(np.median(rates[name])))
        result[f"{name}_tokens_per_cpu_second"] = round(float(np.median(cpu[name])))
    for other in ("bare", "megatron"):
        result |= dict(_ratios(f"phi4_over_{other}", rates["phi4"], rates[other]))
        result |= dict(_ratios(f"phi4_over_{other}_cpu", cpu["phi4"], cpu[other]))
    commit = ["git", "rev-parse", "--short", "HEAD"]
    return {
        **result,
        "rounds": options.rounds,
        "load": round(os.getloadavg()[0], 1),
        "machine_cores": os.cpu_count(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("tiktoken", "megatron-core")},
        "commit": subprocess.run(
            commit, capture_output=True, text=True, check=False
        ).stdout.strip(),
    }


def _ratios(name: str, ours_: list[float], others: list[float]) -> Iterator[tuple[str, object]]:
    """Median of the rounds' ratios and its 95% bootstrap interval."""
    ratios = np.array(ours_) / np.array(others)
    drawn = np.random.default_rng(0).choice(ratios, (2000, ratios.size))
    low, high = np.quantile(np.median(drawn, axis=1), [0.025, 0.975])
    yield name, round(float(np.median(ratios)), 3)
    yield f"{name}_95", [round(float(low), 3), round(float(high), 3)]


def _cpu_seconds() -> float:
    """Of this process and the finished ones it started."""
    kinds = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    usage = [resource.getrusage(kind) for kind in kinds]
    return sum(u.ru_utime + u.ru_stime for u in usage)


if __name__ == "__main__":
    main()
