"""The file names of a run directory, defined only here.

RUN/
  config.toml            the recipe of the newest attempt
  metrics.jsonl          one line per step
  undone.jsonl           lines that a rollback or a resume cut off metrics.jsonl
  mlflow.json            this run's MLflow run, its parent, and the store
  about/0000001.json     metadata of every attempt: commit, user, layout, kernels, data
  system/node_0.jsonl    samples of every machine: CPU, memory, disk, network, GPUs
  ledger.jsonl           what the data ledger counted, where a blend is weighed by loss tokens
  roll_back.json         where the newest rollback resumed, and which data it skipped
  reference.json         the reference model that a preference run began with
  selected.json          success of its checkpoints on held-out questions, and the best one
  selection/             the answers that selected.json is about
  start_gate.json        what the checks before the first step found, or that they were skipped
  slurm/                 scripts, outputs and attempts of the jobs that `phi4 launch` submitted
  stop                   created by a user: the run saves and ends; removed then
  save_now               created by a user: the run saves and continues; removed afterwards
  attempts/0000001.json  every start of the run, and who owns it now
  checkpoints/bad.jsonl  checkpoints after which training turned NaN
  kernels.jsonl          what the kernels' qualification at the run's starts found
  checkpoints.jsonl      outcome of every save: scheduled, durable, failed or refused; and of
                         its replica: replicated or not_replicated
  checkpoints/latest     the name of the newest checkpoint
  checkpoints/step_0000100/{manifest.json, recipe.toml, state.json, ...}
"""

CONFIG_FILE = "config.toml"
METRICS_FILE = "metrics.jsonl"
UNDONE_FILE = "undone.jsonl"
MLFLOW_IDS_FILE = "mlflow.json"
ABOUT_DIR = "about"
SYSTEM_DIR = "system"
LEDGER_FILE = "ledger.jsonl"
ROLL_BACK_FILE = "roll_back.json"
REFERENCE_FILE = "reference.json"
SELECTED_FILE = "selected.json"
SELECTION_DIR = "selection"
GATE_FILE = "start_gate.json"
SLURM_DIR = "slurm"
STOP_FILE = "stop"
SAVE_NOW_FILE = "save_now"
ATTEMPTS_DIR = "attempts"
CHECKPOINTS_DIR = "checkpoints"
BAD_CHECKPOINTS_FILE = "bad.jsonl"
SAVES_FILE = "checkpoints.jsonl"
KERNELS_FILE = "kernels.jsonl"
LATEST_FILE = "latest"
MANIFEST_FILE = "manifest.json"
RECIPE_FILE = "recipe.toml"
STATE_FILE = "state.json"
