#!/usr/bin/env bash
# Builds .venv-lm-eval: lm-eval over the packages of .venv, for the scores that it gives `phi4 serve`.
# Everything else that lm-eval imports for this is in .venv.
exec "$(dirname "$0")/setup_beside.sh" lm-eval '
import importlib.metadata
from lm_eval.models.huggingface import HFLM
from lm_eval.models.openai_completions import LocalCompletionsAPI
version = importlib.metadata.version("lm_eval")
assert version == "0.4.13", version' --no-deps -r constraints/lm_eval.txt
