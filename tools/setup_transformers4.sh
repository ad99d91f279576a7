#!/usr/bin/env bash
# Builds .venv-tf4: transformers 4.57 over the packages of .venv, for the tests of conversion.
exec "$(dirname "$0")/setup_beside.sh" tf4 '
import phi4, torch, transformers
assert transformers.__version__.startswith("4.57."), transformers.__version__' \
    -c constraints/cpu.txt 'transformers>=4.57,<4.58'
