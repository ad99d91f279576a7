"""How trl's DPOTrainer encodes rows: `python trl_tokens.py TOKENIZER_DIR ROWS.jsonl RESULT.json`.

Runs in .venv-trl, so it imports nothing of phi4.
"""

import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import datasets
from transformers import AutoTokenizer, Phi3Config, Phi3ForCausalLM
from trl import DPOConfig, DPOTrainer
from trl_runs import SETTINGS

COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")


def main() -> None:
    """Command line."""
    directory, rows_path, result_path = map(Path, sys.argv[1:])
    tokenizer = AutoTokenizer.from_pretrained(directory)
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1}
    model = Phi3ForCausalLM(
        Phi3Config(
            vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, pad_token_id=0, **sizes
        )
    )
    rows = [json.loads(line) for line in rows_path.read_text().splitlines()]
    texts = [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in rows]
    with TemporaryDirectory() as scratch:
        trainer = DPOTrainer(
            model=model,
            args=DPOConfig(output_dir=scratch, precompute_ref_log_probs=True, **SETTINGS),
            train_dataset=datasets.Dataset.from_list(texts),
            processing_class=tokenizer,
        )
    found = [{name: row[name] for name in COLUMNS} for row in trainer.train_dataset]
    result_path.write_text(json.dumps({"eos": tokenizer.eos_token_id, "rows": found}))


if __name__ == "__main__":
    main()
