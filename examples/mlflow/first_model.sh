#!/usr/bin/env bash
# From nothing to a registered model, as docs/tutorials/mlflow.md tells it: an MLflow server, the same
# recipe at two learning rates, their comparison, and the better one as a version of a model.
#
#   examples/mlflow/first_model.sh                # after `make setup`; 3 minutes on 2 cores
#   PORT=5001 examples/mlflow/first_model.sh      # where port 5000 is taken
#   examples/mlflow/first_model.sh run.steps=20   # overrides for both runs
set -euo pipefail
cd "$(dirname "$0")/../.."
PATH="$PWD/.venv/bin:$PATH"
out=runs/first_model
recipe=examples/recipes/tiny_sweep.toml
mkdir -p $out

[ -f runs/demo/data/corpus.json ] || phi4 data demo

# --- A server. Every MLflow client is told of it by these two variables; so is phi4.
export MLFLOW_TRACKING_URI=http://127.0.0.1:${PORT:-5000} MLFLOW_EXPERIMENT_NAME=first_model
mlflow server --host 127.0.0.1 --port "${PORT:-5000}" --backend-store-uri sqlite:///$out/mlflow.db \
    --artifacts-destination $out/artifacts >$out/server.log 2>&1 &
server=$!
trap 'kill $server' EXIT
for ((tries = 0; tries < 120; tries++)); do
    (exec 3<>"/dev/tcp/127.0.0.1/${PORT:-5000}") 2>/dev/null && break
    kill -0 $server || { cat $out/server.log >&2; exit 1; }
    sleep 1
done

# --- Two runs. A second start of this script resumes them, and changes nothing if they are finished.
for rate in 1e-2 1e-3; do
    phi4 train $recipe run.dir=$out/rate_$rate tracking.mlflow=true optim.learning_rate=$rate \
        optim.min_learning_rate=1e-4 evaluation.every=20 "$@"
done

# --- Training does not wait long for a server. This sends what a slow one has not taken yet.
phi4 track settle $out/rate_1e-2 $out/rate_1e-3

# --- What they say: side by side in the terminal, as a page, and through MLflow's own client.
phi4 track compare $out/rate_1e-2 $out/rate_1e-3
phi4 report $out/rate_1e-2 $out/rate_1e-3 --out $out/report.html
python examples/mlflow/read_runs.py

# --- The better one as a version of the model `tiny-phi4`, in a form that transformers opens.
[ -d $out/hf ] || phi4 convert to-hf $out/rate_1e-2 $out/hf
phi4 convert register $out/rate_1e-2 $out/hf tiny-phi4

echo "the server ends with this script; to look at it again:"
echo "  .venv/bin/mlflow server --backend-store-uri sqlite:///$out/mlflow.db --artifacts-destination $out/artifacts"
