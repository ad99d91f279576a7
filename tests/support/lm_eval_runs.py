"""lm-eval's scores by two of its back-ends: `python lm_eval_runs.py JOB.json RESULT.json`.

Runs in .venv-lm-eval, so it imports nothing of phi4. The job names a Hugging Face directory and a
server of the same model; `hf` reads the one and `local-completions` asks the other.
"""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "TOKENIZERS_PARALLELISM": "false"}

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.huggingface import HFLM
from lm_eval.models.openai_completions import LocalCompletionsAPI


def instances(kind: str, rows: Sequence[Sequence[Any]]) -> list[Instance]:
    """Requests as lm-eval's tasks make them."""
    return [
        Instance(request_type=kind, doc={}, arguments=tuple(row), idx=0, metadata=("task", i, 1))
        for i, row in enumerate(rows)
    ]


def scores(model: TemplateLM, job: dict[str, Any]) -> dict[str, Any]:
    """What a back-end makes of the job."""
    encoded = [(None, context, continuation) for context, continuation in job["encoded"]]
    return {
        "pairs": model.loglikelihood(instances("loglikelihood", job["pairs"])),
        "alone": model.loglikelihood(instances("loglikelihood", job["alone"])),
        "encoded": model._loglikelihood_tokens(encoded),
        "rolling": model.loglikelihood_rolling(
            instances("loglikelihood_rolling", [[text] for text in job["rolling"]])
        ),
        "generated": model.generate_until(instances("generate_until", job["generated"])),
    }


def main() -> None:
    """Command line."""
    torch.set_num_threads(1)
    job_path, result_path = map(Path, sys.argv[1:])
    job = json.loads(job_path.read_text())
    hf = HFLM(pretrained=job["model"], dtype="float32", device="cpu", batch_size=8)
    found = {"hf": scores(hf, job)}
    for name, settings in job["servers"].items():
        server = LocalCompletionsAPI(
            model=job["name"],
            base_url=job["url"],
            tokenizer=job["model"],
            tokenizer_backend="huggingface",
            max_length=hf.max_length,
            max_retries=1,
            **settings,
        )
        found[name] = scores(server, job)
    result_path.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
