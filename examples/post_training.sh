#!/usr/bin/env bash
# Phi-4's post-training in miniature: a base model of arithmetic modulo 10, fine-tuning on the best of
# its own answers, preferences of the tokens that decide whether an answer is right, preferences of
# whole answers. `phi4 demo --post-training` runs the same commands and draws a table of what each
# stage is worth. A second start resumes where the first one ended.
#
#   examples/post_training.sh                 # after `make setup`; 2 cores, 20 minutes at most
#   examples/post_training.sh run.steps=2     # overrides for all of its recipes
set -euo pipefail
cd "$(dirname "$0")/.."
PATH="$PWD/.venv/bin:$PATH"
recipes=examples/recipes
out=runs/reasoning
data=$out/data
ranks=--ranks=$data/bpe.tiktoken
room=(--max-tokens=24 --cache-tokens=65536)

# draw MODEL QUESTIONS ANSWERS ...: answers of a model to a set of questions.
draw() {
    phi4 answers draw "$1" --questions=$data/"$2".jsonl --out=$out/answers/"$3".jsonl "${@:4}" \
        "${room[@]}"
}

# measure MODEL NAME ...: how many of the test questions are answered right.
measure() {
    draw "$1" test "test_$2" --n=8 "${@:3}"
    phi4 answers score $out/answers/"test_$2".jsonl --oracle=exact
}

# best RUN: the checkpoint that answers the questions for choosing best, into $model. A loss does
# not say where to stop.
best() {
    local said
    said=$(phi4 pts select "$1" --questions=$data/stop.jsonl --oracle=exact --n=8 "${room[@]}")
    echo "$said"
    model=${said##*$'\n'}
}

# prefer ROWS NAME RECIPE ...: direct preference optimisation of $model on rows of preferences.
prefer() {
    phi4 data pairs "$1" --out=$data/"$2" "$ranks" --row-tokens=256 --overwrite
    phi4 dpo cache-ref $recipes/"$3".toml run.init_from="$model" "${@:4}"
    phi4 train $recipes/"$3".toml run.init_from="$model" "${@:4}"
}

# The base model: documents of a writer who often takes a sum before a product.
phi4 data reasoning --out=$data
phi4 train $recipes/reasoning_pretrain.toml "$@"
measure $out/base base

# Fine-tuning on right ones of its own answers.
draw $out/base sft base_sft --n=8
phi4 data best-of --answers=$out/answers/base_sft.jsonl --oracle=exact \
    --out=$data/best_of.jsonl "$ranks"
phi4 data tokenize $data/best_of.jsonl --out=$data/best_of "$ranks" --overwrite
phi4 train $recipes/reasoning_sft.toml run.init_from=$out/base "$@"
best $out/sft
measure "$model" sft --chat

# First round: of two tokens the better one, where search has found that it decides.
phi4 pts search "$model" --questions=$data/search.jsonl --oracle=exact --out=$out/search \
    "${room[@]}"
phi4 pts pairs $out/search --out=$data/pivots.jsonl
prefer $data/pivots.jsonl pivots reasoning_dpo_pivotal "$@"
best $out/dpo_pivotal
measure "$model" dpo_1 --chat

# Second round: of two answers the right one. The judge is the oracle; a model is one as well.
draw "$model" judge judged --n=8 --chat
phi4 judge pairs --answers=$out/answers/judged.jsonl --judge=oracle:exact --out=$out/judged \
    pairs.same_model=true pairs.max_per_prompt=6
prefer $out/judged/overall.jsonl judged reasoning_dpo_judge "$@"
best $out/dpo_judge
measure "$model" dpo_1_2 --chat

echo "talk to it: phi4 chat $model    (for example 3+5+5*2=, then /reset)"
