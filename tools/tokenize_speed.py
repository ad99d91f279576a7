"""Throughput of `phi4 data tokenize` against bare tiktoken, megatron-core's builder and datatrove.

All take the same documents on the same cores and must find the same number of tokens. Bare tiktoken
gets them in memory and writes nothing; the others go from jsonl files to .bin/.idx pairs. Rounds
are interleaved, so what else runs on the machine meets all sides alike; tokens per CPU second are
free of it. datatrove runs in an environment of its own (see tools/tokenize_datatrove.py), if given.

    python tools/tokenize_speed.py --datatrove runs/datatrove/bin/python \
        --json benchmarks/data_tokenize.jsonl
"""

import argparse
import json
import multiprocessing
import os
import platform
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from itertools import chain
from pathlib import Path

import numpy as np
import tiktoken

from phi4.config import TokenizerConfig
from phi4.data.files.inputs import find_inputs
from phi4.data.tokenize.job import tokenize_parts
from phi4.data.tokenize.merge import merge_runs
from phi4.data.tokenize.plan import make_plan
from phi4.data.vocabulary.tokenizer import SPLIT_PATTERN, load_tokenizer

CONFIG = TokenizerConfig()
NUM_FILES = 8


@dataclass(frozen=True)
class Taken:
    """One run of one side."""

    tokens: int
    seconds: float
    cpu_seconds: float


Side = Callable[[], Taken]


def write_text(directory: Path, megabytes: int, characters: int) -> list[str]:
    """jsonl files of this Python's sources, repeated until they are large enough.

    Args:
        directory: directory of the files, of about equal size.
        megabytes: megabytes of text.
        characters: sources are cut into documents of this length; 0 does not cut.
    """
    files = sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py"))
    sources = [
        f.read_text("utf-8", errors="replace") for f in files if "site-packages" not in f.parts
    ]
    documents = [
        text[begin : begin + (characters or len(text))].replace("\0", "")
        for text in sources
        for begin in range(0, len(text), characters or max(1, len(text)))
    ]
    documents = [text for text in documents if text.strip()]
    sizes = np.cumsum([len(text) for text in documents])
    repeats, rest = divmod(megabytes << 20, int(sizes[-1]))
    texts = documents * repeats + documents[: int(np.searchsorted(sizes, rest))]
    for number in range(NUM_FILES):
        with (directory / f"{number}.jsonl").open("w") as stream:
            stream.writelines(
                json.dumps({"text": text}) + "\n" for text in texts[number::NUM_FILES]
            )
    return texts


def bare(texts: list[str], cores: int) -> int:
    """encode_ordinary_batch on threads, nothing written."""
    tokens = sum(map(len, _encoding().encode_ordinary_batch(texts, num_threads=cores)))
    return tokens + len(texts)  # the ends of documents, which the others write


def phi4(rows: Path, out: Path, cores: int) -> int:
    """`phi4 data tokenize`, shuffle, checksums and manifest included."""
    plan = make_plan(find_inputs([rows]), load_tokenizer(CONFIG).facts)
    tokenize_parts(plan, out, CONFIG, workers=cores, max_rejected=0, follow=lambda progress: None)
    return merge_runs(out).num_tokens


def megatron(rows: Path, out: Path, cores: int) -> int:
    """As megatron's preprocess_data.py does: a pool encodes lines, one process writes them."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{out}.bin", dtype=np.int32)
    tokens = 0
    lines = chain.from_iterable(path.open("rb") for path in sorted(rows.glob("*.jsonl")))
    with multiprocessing.get_context("fork").Pool(cores) as pool:
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


def timed(side: Callable[[], int]) -> Taken:
    """Run a side in this process and those it starts."""
    begun, used = time.perf_counter(), sum(os.times()[:4])
    tokens = side()
    return Taken(tokens, time.perf_counter() - begun, sum(os.times()[:4]) - used)


def datatrove(python: Path, rows: Path, out: Path, cores: int) -> Taken:
    """datatrove's reader and Megatron writer, without the start of their interpreter."""
    script = Path(__file__).with_name("tokenize_datatrove.py")
    options = {"rows": rows, "tokenizer": rows / "tokenizer.json", "out": out, "cores": cores}
    command = [python, script, *chain(*((f"--{key}", str(v)) for key, v in options.items()))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr.strip().splitlines()[-1])
    return Taken(**json.loads(done.stdout.splitlines()[-1]))


def datatrove_versions(python: Path) -> dict[str, str]:
    """Versions of datatrove and its tokenizers; ends this process where there is none."""
    names = ("datatrove", "tokenizers")
    code = f"from importlib.metadata import version as v; print(*map(v, {names}))"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{python} has no datatrove ({done.stderr.strip().splitlines()[-1]})")
    return dict(zip(names, done.stdout.split(), strict=True))


def main() -> None:
    """Measure and append one row per number of cores."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--megabytes", type=int, default=60)
    parser.add_argument("--characters", type=int, default=0, help="per document; 0: whole files")
    parser.add_argument("--cores", type=int, nargs="+", default=[1, os.cpu_count()])
    parser.add_argument("--datatrove", type=Path, help="interpreter of an environment that has it")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    versions = {name: version(name) for name in ("tiktoken", "megatron-core")}
    if options.datatrove:
        versions |= datatrove_versions(options.datatrove)
    with tempfile.TemporaryDirectory() as name:
        rows = Path(name) / "rows"
        rows.mkdir()
        texts = write_text(rows, options.megabytes, options.characters)
        if options.datatrove:
            # Imports torch, which the tokenizing processes, importing this module, must not.
            from phi4.convert.hf_tokenizer import fast_tokenizer

            fast_tokenizer(load_tokenizer(CONFIG)).save(str(rows / "tokenizer.json"))
        for cores in options.cores:
            measured = _measure(_sides(texts, rows, cores, options.datatrove), options.rounds)
            row = {"cores_used": cores, "megabytes": options.megabytes, "documents": len(texts)}
            row |= {**measured, "rounds": options.rounds, **_context(), **versions}
            print(json.dumps(row), flush=True)
            if options.json:
                with options.json.open("a") as stream:
                    stream.write(json.dumps(row) + "\n")


def _sides(texts: list[str], rows: Path, cores: int, python: Path | None) -> dict[str, Side]:
    out = rows.parent
    sides: dict[str, Side] = {
        "phi4": lambda: timed(lambda: phi4(rows, out / "phi4", cores)),
        "bare": lambda: timed(lambda: bare(texts, cores)),
        "megatron": lambda: timed(lambda: megatron(rows, out / "megatron", cores)),
    }
    if python:
        sides["datatrove"] = lambda: datatrove(python, rows, out / "datatrove", cores)
    return sides


def _measure(sides: dict[str, Side], rounds: int) -> dict[str, object]:
    names = list(sides)
    taken: dict[str, list[Taken]] = {name: [] for name in names}
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            taken[name].append(sides[name]())
    found = {name: {t.tokens for t in runs} for name, runs in taken.items()}
    if len(set().union(*found.values())) > 1:
        sys.exit(f"the sides disagree about the text: {found} tokens")
    wall = {name: np.array([t.tokens / t.seconds for t in runs]) for name, runs in taken.items()}
    cpu = {name: np.array([t.tokens / t.cpu_seconds for t in runs]) for name, runs in taken.items()}
    result: dict[str, object] = {"tokens": taken["phi4"][0].tokens}
    for name in names:
        result[f"{name}_tokens_per_second"] = round(float(np.median(wall[name])))
        result[f"{name}_tokens_per_cpu_second"] = round(float(np.median(cpu[name])))
    for other in names[1:]:
        result |= _ratio(f"phi4_over_{other}", wall["phi4"] / wall[other])
        result |= _ratio(f"phi4_over_{other}_cpu", cpu["phi4"] / cpu[other])
    return result


def _ratio(name: str, ratios: np.ndarray) -> dict[str, object]:
    """Median of the rounds' ratios and its 95% bootstrap interval."""
    drawn = np.random.default_rng(0).choice(ratios, (2000, ratios.size))
    low, high = np.quantile(np.median(drawn, axis=1), [0.025, 0.975])
    interval = [round(float(low), 3), round(float(high), 3)]
    return {name: round(float(np.median(ratios)), 3), f"{name}_95": interval}


def _context() -> dict[str, object]:
    commit = ["git", "rev-parse", "--short", "HEAD"]
    return {
        "load": round(os.getloadavg()[0], 1),
        "machine_cores": os.cpu_count(),
        "python": platform.python_version(),
        "commit": subprocess.run(
            commit, capture_output=True, text=True, check=False
        ).stdout.strip(),
    }


if __name__ == "__main__":
    main()
