#!/usr/bin/env bash
# Builds .venv-trl: trl over the packages of .venv, for the comparison of SFT and DPO with it.
# Everything else that trl needs is in .venv.
exec "$(dirname "$0")/setup_beside.sh" trl '
import torch, transformers, trl
from trl import DPOTrainer, SFTTrainer
assert trl.__version__ == "1.16.0", trl.__version__' --no-deps -r constraints/trl.txt
