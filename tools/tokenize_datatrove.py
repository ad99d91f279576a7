"""datatrove's Megatron writer on some rows, for `tools/tokenize_speed.py`.

Runs in an environment with datatrove and tokenizers, and without phi4: datatrove is no dependency.

    python -m venv runs/datatrove && runs/datatrove/bin/pip install datatrove tokenizers orjson
"""

import argparse
import json
import os
import shutil
import sys
import time
from pathlib import Path


def run(rows: Path, tokenizer: Path, out: Path, cores: int) -> dict[str, object]:
    """Tokenize every .jsonl of a directory, one task per core; counts from after the imports."""
    # One thread per process: the workers are what fills the cores.
    os.environ["RAYON_NUM_THREADS"] = "1"
    try:
        from datatrove.executor import LocalPipelineExecutor
        from datatrove.pipeline.readers import JsonlReader
        from datatrove.pipeline.tokens import MegatronDocumentTokenizer
        from loguru import logger
    except ImportError as error:
        sys.exit(f"{sys.executable} cannot run datatrove ({error}); see {__file__}")
    logger.remove()
    shutil.rmtree(out, ignore_errors=True)
    steps = [
        JsonlReader(str(rows), glob_pattern="*.jsonl"),
        # A batch of this size keeps the encodings of all workers within memory.
        MegatronDocumentTokenizer(
            str(out / "tokens"), tokenizer_name_or_path=str(tokenizer), batch_size=1000
        ),
    ]
    executor = LocalPipelineExecutor(
        pipeline=steps,
        tasks=cores,
        workers=cores,
        logging_dir=str(out / "logs"),
        start_method="fork",
    )
    begun, used = time.perf_counter(), sum(os.times()[:4])
    executor.run()
    return {
        "seconds": time.perf_counter() - begun,
        "cpu_seconds": sum(os.times()[:4]) - used,
        "tokens": sum(file.stat().st_size for file in (out / "tokens").glob("*.bin")) // 4,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cores", type=int, required=True)
    print(json.dumps(run(**vars(parser.parse_args()))))
