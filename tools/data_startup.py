"""Start-up of the data stream at 10T tokens and at many documents, and the loader's throughput.

Every case runs in a process of its own and counts from after its imports: seconds to the first
batch, CPU seconds next to them, peak resident memory above them. Token files are sparse where their
content is not read, so 10T tokens need no disk; the .idx of what is read holds real length draws.
megatron-core's builder runs on the same machine at 20B tokens.

    python tools/data_startup.py --json benchmarks/data_startup.jsonl
    python tools/data_startup.py --case throughput
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from phi4.config import DataConfig, SourceConfig
from phi4.data.files.index_format import index_bytes
from phi4.data.files.manifest import ShardManifest, encode_manifest, manifest_path
from phi4.data.files.token_writer import TokenFileWriter
from phi4.data.stream.loader import Loader
from phi4.data.vocabulary.tokenizer import TokenizerFacts

FACTS = TokenizerFacts(vocab_size=100_352, eod_id=100_257, pad_id=100_349, fingerprint="0" * 64)
BLEND = {"web": 0.15, "rewrites": 0.15, "synthetic": 0.4, "code": 0.2, "acquired": 0.1}
NUM_SHARDS, SHARD_TOKENS, MEAN_TOKENS = 800, 2_500_000_000, 1000
ROWS = {"global_batch_size": 5760, "micro_batch_size": 1, "dp_rank": 3, "dp_size": 720}
THROUGHPUT_SHARDS, THROUGHPUT_TOKENS = 16, 16_000_000


def write_lengths(num_documents: int, seed: int) -> np.ndarray:
    """Exponential length draws of mean 1,000, [num_documents] int32."""
    draws = np.random.default_rng(seed).exponential(MEAN_TOKENS, num_documents)
    return np.maximum(1, draws).astype(np.int32)


def write_sparse(prefix: str, lengths: np.ndarray) -> None:
    """A pair whose .idx is real and whose .bin is a hole."""
    num_tokens = int(lengths.sum(dtype=np.int64))
    Path(f"{prefix}.idx").write_bytes(index_bytes(lengths))
    Path(f"{prefix}.bin").touch()
    os.truncate(f"{prefix}.bin", 4 * num_tokens)
    _write_manifest(prefix, lengths.size, num_tokens)


def write_blend(root: Path) -> None:
    """5 sources x 800 shards of 2.5B tokens, one real .idx under the name of each."""
    for name in BLEND:
        (root / name).mkdir(parents=True, exist_ok=True)
        for shard in range(NUM_SHARDS):
            prefix = f"{root}/{name}/{shard:04}"
            Path(f"{prefix}.bin").touch()
            os.truncate(f"{prefix}.bin", 4 * SHARD_TOKENS)
            _write_manifest(prefix, SHARD_TOKENS // MEAN_TOKENS, SHARD_TOKENS)
    lengths = write_lengths(SHARD_TOKENS // MEAN_TOKENS, seed=1).astype(np.float64)
    lengths = np.maximum(1, lengths * (SHARD_TOKENS / lengths.sum()) - 1).astype(np.int32)
    lengths[-1] += SHARD_TOKENS - int(lengths.sum(dtype=np.int64))
    index = index_bytes(lengths)
    first = Path(f"{root}/any.idx")
    first.write_bytes(index)
    # Any shard may be read, and each name is opened on its own.
    for name in BLEND:
        for shard in range(NUM_SHARDS):
            link = Path(f"{root}/{name}/{shard:04}.idx")
            link.unlink(missing_ok=True)
            os.link(first, link)


def write_dense(root: Path) -> None:
    """Shards of random ids for the throughput case."""
    rng = np.random.default_rng(2)
    root.mkdir(parents=True, exist_ok=True)
    for shard in range(THROUGHPUT_SHARDS):
        lengths = write_lengths(THROUGHPUT_TOKENS // MEAN_TOKENS, shard)
        tokens = rng.integers(0, 100_256, int(lengths.sum()), dtype=np.int32)
        tokens[np.cumsum(lengths) - 1] = FACTS.eod_id
        with TokenFileWriter(root / f"{shard:02}", FACTS) as writer:
            writer.add_many(tokens, lengths.tolist())


def _write_manifest(prefix: str, num_documents: int, num_tokens: int) -> None:
    manifest = ShardManifest(
        tokenizer_fingerprint=FACTS.fingerprint,
        vocab_size=FACTS.vocab_size,
        num_documents=num_documents,
        num_tokens=num_tokens,
        bin_sha256="0" * 64,
        idx_sha256="0" * 64,
    )
    manifest_path(prefix).write_bytes(encode_manifest(manifest))


def first_batch(sources: dict[str, tuple[str, float]]) -> None:
    """What a rank does before its first step."""
    Loader(_config(sources), FACTS, seed=1).next_step(**ROWS)


def throughput(root: Path, seconds: float = 5.0) -> dict[str, float]:
    """Tokens per second of one process, batches built, from page cache."""
    loader = Loader(_config({"s": (f"{root}/*", 1.0)}), FACTS, seed=1)
    size = {"global_batch_size": 64, "micro_batch_size": 4, "dp_rank": 0, "dp_size": 1}
    for _ in range(THROUGHPUT_SHARDS * THROUGHPUT_TOKENS // (64 * 4096)):
        loader.next_step(**size)  # an epoch: every page is in the cache
    wall, cpu, steps = time.perf_counter(), time.process_time(), []
    while time.perf_counter() - wall < seconds:
        begun = time.perf_counter()
        loader.next_step(**size)
        steps.append(time.perf_counter() - begun)
    tokens = 64 * 4096
    return {
        "tokens_per_second": tokens * len(steps) / (time.perf_counter() - wall),
        "tokens_per_second_median_step": tokens / float(np.median(steps)),
        "tokens_per_cpu_second": tokens * len(steps) / (time.process_time() - cpu),
    }


def megatron_builder(prefix: str, cache: Path) -> None:
    """megatron-core's GPT dataset of one source, to the first sample, cache included."""
    from megatron.core.datasets.blended_megatron_dataset_builder import (
        BlendedMegatronDatasetBuilder,
    )
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    class Tokenizer:
        eod, pad, unique_identifiers = FACTS.eod_id, FACTS.pad_id, {"name": "ids"}
        vocab_size = FACTS.vocab_size

    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=4096,
        blend=([prefix], None),
        split="1,0,0",
        path_to_cache=str(cache),
        tokenizer=Tokenizer(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=True,
        create_attention_mask=False,
    )
    sizes = [20_000_000_000 // 4096 - 1, 0, 0]
    meter = Meter()
    built = BlendedMegatronDatasetBuilder(GPTDataset, sizes, lambda: True, config).build()
    assert built[0][0]["tokens"].shape == (4096,)
    meter.tell(cache_mb=sum(f.stat().st_size for f in cache.rglob("*") if f.is_file()) / 1e6)


def _config(sources: dict[str, tuple[str, float]]) -> DataConfig:
    blend = tuple(SourceConfig(name=n, path=p, weight=w) for n, (p, w) in sources.items())
    return DataConfig(sources=blend)


class Meter:
    """Seconds, CPU seconds and peak resident memory from here on."""

    def __init__(self) -> None:
        # 5 makes the present size the peak; the kernel's own count would hold that of the imports.
        Path("/proc/self/clear_refs").write_text("5")
        self._resident_mb = self._status("VmRSS")
        self._begun, self._used = time.perf_counter(), time.process_time()

    def tell(self, **more: float) -> None:
        """Print the numbers as JSON."""
        found = {
            "seconds": time.perf_counter() - self._begun,
            "cpu_seconds": time.process_time() - self._used,
            "resident_mb": self._status("VmHWM") - self._resident_mb,
        }
        print(json.dumps({**found, **more}))

    @staticmethod
    def _status(key: str) -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith(key)).split()[1]) / 1024


def _run_here(root: Path, name: str) -> None:
    """Run one case in this process and print its numbers."""
    if name == "throughput":
        print(json.dumps(throughput(root / "dense")))
    elif name.startswith("megatron"):
        megatron_builder(f"{root}/documents/20m", root / "cache")
    else:
        meter = Meter()
        if name.startswith("blend"):
            first_batch({n: (f"{root}/blend/{n}/*", w) for n, w in BLEND.items()})
        else:
            first_batch({"s": (f"{root}/documents/{name.partition('-')[2]}m", 1.0)})
        meter.tell()


CASES = {
    "blend-first": "10T tokens, 5 x 800 shards, first start ever: writes the source manifests",
    "blend": "10T tokens, 5 x 800 shards",
    "documents-2": "one source of 2M documents",
    "documents-20": "one source of 20M documents (20B tokens)",
    "documents-40": "one source of 40M documents",
    "megatron": "megatron-core's builder, the same 20M documents, no cache yet",
    "throughput": "loader of one process, 256M tokens in page cache",
}


def main() -> None:
    """Write the files that are missing, run the cases, append their rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dir", type=Path, default=Path("runs/data_startup"))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--case", choices=CASES, nargs="+", default=list(CASES))
    parser.add_argument("--here", choices=CASES, help="one case, in this process")
    options = parser.parse_args()
    if options.here:
        _run_here(options.dir, options.here)
        return
    for name in options.case:
        _prepare(options.dir, name)
        row = {"case": name, "what": CASES[name], **_medians(options.dir, name, options.repeats)}
        row |= _context()
        print(json.dumps(row), flush=True)
        if options.json:
            with options.json.open("a") as stream:
                stream.write(json.dumps(row) + "\n")


def _prepare(root: Path, name: str) -> None:
    """The files of a case, unless they were written before."""
    kind = {"throughput": "dense"}.get(name, "blend" if "blend" in name else "documents")
    if (root / kind / "done").exists():
        return
    (root / kind).mkdir(parents=True, exist_ok=True)
    if kind == "dense":
        write_dense(root / kind)
    elif kind == "blend":
        write_blend(root / kind)
    else:
        for millions in (2, 20, 40):
            lengths = write_lengths(millions * 10**6, seed=millions)
            write_sparse(f"{root}/{kind}/{millions}m", lengths)
    (root / kind / "done").touch()


def _medians(root: Path, name: str, repeats: int) -> dict[str, float]:
    """Return the case in processes of its own; the median of every number."""
    results = []
    for _ in range(repeats):
        if name == "blend-first":
            for kept in (root / "blend").glob("*/*.source.json"):
                kept.unlink()
        shutil.rmtree(root / "cache", ignore_errors=True)
        command = [sys.executable, __file__, "--dir", str(root), "--here", name]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        results.append(json.loads(output.splitlines()[-1]))
    medians = {key: sorted(r[key] for r in results)[repeats // 2] for key in results[0]}
    return {**medians, "repeats": repeats}


def _context() -> dict[str, object]:
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    return {
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "commit": commit,
    }


if __name__ == "__main__":
    main()
