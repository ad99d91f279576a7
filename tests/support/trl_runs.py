"""What trl's trainers make of given weights and data: `python trl_runs.py JOB.json RESULT.json`.

Runs in .venv-trl, so it imports nothing of phi4. The settings are those under which trl computes in
fp32, in the given order, without truncation, and logs every step.
"""

import json
import os
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "TOKENIZERS_PARALLELISM": "false"}

import datasets
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import Phi3ForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

# The spaces separate words, which are the tokens.
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ ' <im_start> ' + m['role'] + ' <im_sep> ' }}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + ' <im_end> ' }}"
    "{% endgeneration %}{% else %}{{ m['content'] + ' <im_end> ' }}{% endif %}{% endfor %}"
)
SETTINGS = {
    "bf16": False,
    "fp16": False,
    "gradient_checkpointing": False,
    "train_sampling_strategy": "sequential",
    "lr_scheduler_type": "constant",
    "warmup_steps": 0,
    "weight_decay": 0.0,
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "adam_epsilon": 1e-8,
    "optim": "adamw_torch",
    "max_grad_norm": 1.0,
    "max_length": None,
    "logging_steps": 1,
    "use_cpu": True,
    "report_to": [],
    "save_strategy": "no",
    "disable_tqdm": True,
    "seed": 0,
}
LOGGED = ("logps/chosen", "logps/rejected", "rewards/chosen", "rewards/rejected", "rewards/margins")


def tokenizer_of(words: dict[str, int]) -> PreTrainedTokenizerFast:
    """One token per word."""
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"eos_token": "<im_end>", "pad_token": "<pad>", "unk_token": "<unk>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    fast.chat_template = CHAT_TEMPLATE
    return fast


def run(job: dict[str, Any], settings: dict[str, Any], directory: str) -> dict[str, Any]:
    """Per step loss, gradient norm before clipping and metrics; the reference's log-probs."""
    is_dpo = "pairs" in settings
    rows = settings.pop("pairs" if is_dpo else "conversations")
    make_config, make_trainer = (DPOConfig, DPOTrainer) if is_dpo else (SFTConfig, SFTTrainer)
    own = {"precompute_ref_log_probs": True} if is_dpo else {"assistant_only_loss": True}
    trainer = make_trainer(
        model=Phi3ForCausalLM.from_pretrained(job["model"], dtype=torch.float32),
        args=make_config(output_dir=directory, **SETTINGS, **job["settings"], **own, **settings),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer_of(job["words"]),
    )
    trainer.train()
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    found = {name: [step[name] for step in steps] for name in ("loss", "grad_norm")}
    if is_dpo:
        found |= {name: [step[name] for step in steps] for name in LOGGED}
        sides = ("ref_chosen_logps", "ref_rejected_logps")
        found["reference"] = [[row[side] for side in sides] for row in trainer.train_dataset]
    return found


def main() -> None:
    """Command line."""
    torch.set_num_threads(1)
    job_path, result_path = map(Path, sys.argv[1:])
    job = json.loads(job_path.read_text())
    with TemporaryDirectory() as directory:
        found = {name: run(job, case, directory) for name, case in job["cases"].items()}
    result_path.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
