#!/usr/bin/env bash
# The stages of post-training in other layouts, on four CPU processes: fine-tuning on conversations,
# then preferences of single tokens, then preferences of whole answers, each from what came before.
# What they teach is planted; post_training.sh makes a model better at something.
# Eight minutes on 2 cores, less after `make demo`. A second start resumes where the first one
# ended; what is finished stays as it is.
#
#   examples/post_training_layouts.sh                 # after `make demo` or `make setup`
#   examples/post_training_layouts.sh run.steps=2     # overrides for all of its recipes
set -euo pipefail
cd "$(dirname "$0")/.."
PATH="$PWD/.venv/bin:$PATH"
recipes=examples/recipes

# The corpus and the base model: those of `make demo` where it has run to its end.
[ -e runs/demo/data/corpus.json ] && [ -e runs/demo/data/pivots.bin ] || phi4 data demo
[ -e runs/demo/run/checkpoints/step_0000140 ] || phi4 train "$recipes/tiny_pretrain.toml" "$@"

phi4 train "$recipes/tiny_sft.toml" "$@"

# First round: which of two tokens comes next. The reference is the fine-tuned model.
phi4 dpo cache-ref "$recipes/tiny_dpo_pivotal.toml" "$@"
phi4 train "$recipes/tiny_dpo_pivotal.toml" "$@"

# Second round: which of two answers is better. Its reference is the model of the first round, so it
# has a cache and a run of its own in addition to those of the recipe.
second=(
    run.init_from=runs/demo/dpo_pivotal
    run.dir=runs/demo/dpo_second
    data.reference_cache=runs/demo/dpo_second_reference
)
phi4 dpo cache-ref "$recipes/tiny_dpo.toml" "${second[@]}" "$@"
phi4 train "$recipes/tiny_dpo.toml" "${second[@]}" "$@"

phi4 generate runs/demo/dpo_second --max-tokens 100 --chat 'Write the function `guess_all_extensions`.'
