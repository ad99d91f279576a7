"""The house keeps its layers, and every rule bites."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.architecture.import_rules import violations

ROOT = Path(__file__).parents[2]


def planted(root: Path, path: str, text: str) -> list[str]:
    file = root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text + "\n", encoding="utf-8")
    return violations(root)


def test_house_keeps_its_rules() -> None:
    assert violations(ROOT) == []


@pytest.mark.parametrize(
    ("path", "text", "message"),
    [
        ("phi4/train/loop.py", "from phi4.stages.pretrain import step", "may not import stages"),
        ("phi4/engine/step.py", "import phi4.track.jsonl", "may not import track"),
        ("phi4/data/blend.py", "from phi4 import engine", "may not import engine"),
        ("phi4/data/blend.py", "from ..model import shape", "may not import model"),
        ("phi4/engine/a/b.py", "from ...cli import main", "may not import cli"),
        ("phi4/data/__init__.py", "from ..train import loop", "may not import train"),
        ("phi4/errors.py", "from phi4.config import Recipe", "may not import config"),
        ("phi4/__init__.py", "from phi4.config import Recipe", "phi4 may not import config"),
        ("phi4/data/x.py", "def f():\n    import phi4.engine", "x.py:2: data may not import"),
        ("phi4/data/x.py", "import importlib as i\ni.import_module('phi4.train')", "import train"),
        ("phi4/helpers/x.py", "", "room 'helpers' has no layer"),
        ("phi4/cli.py", "import phi4.helpers", "a room without a layer"),
        ("phi4/data/x.py", "import phi4_kernels", "data may not import phi4_kernels"),
        ("phi4/train/x.py", "from phi4_kernels.dispatch import f", "train may not import phi4_k"),
        ("kernels/phi4_kernels/op.py", "import phi4.errors", "may not import phi4"),
        ("kernels/phi4_kernels/op.py", "import einops", "may not import einops"),
        ("kernels/phi4_kernels/bench/providers/x.py", "import liger_kernel", "inside a function"),
        (
            "kernels/phi4_kernels/bench/providers/x.py",
            "def f():\n    import phi4.errors",
            "may not import phi4",
        ),
        ("phi4/train/x.py", "from megatron.core import mpu", "megatron is imported in phi4/engine"),
        ("phi4/cli.py", "import transformer_engine.pytorch", "transformer_engine is imported in"),
        ("phi4/track/console.py", "import mlflow", "mlflow is imported in phi4/track/mlflow.py"),
        ("phi4/engine/x.py", "import transformers", "transformers is imported in phi4/convert/"),
        ("phi4/data/x.py", "import torch.distributed as dist", "may not use torch.distributed"),
        ("phi4/model/x.py", "from torch import distributed", "may not use torch.distributed"),
        ("phi4/track/x.py", "import torch\ntorch.distributed.barrier()", "x.py:2: track may not"),
        (
            "kernels/phi4_kernels/loss/triton_impl.py",
            "import torch.distributed",
            "triton_impl.py may not use torch.distributed",
        ),
        ("phi4/rundir/x.py", "import phi4.track", "may not import track"),
        ("phi4/rundir/x.py", "import torch", "rundir may not import torch"),
        ("phi4/launch/x.py", "def f():\n    import torch", "launch may not import torch"),
        ("phi4/engine/x.py", "import os\nos.environ['A']", "os.environ is read in"),
        ("phi4/train/x.py", "import os\nos.getenv('A')", "os.getenv is read in"),
        ("phi4/config/x.py", "from os import environ", "os.environ is read in"),
        ("kernels/phi4_kernels/x.py", "import os\nos.environ", "os.environ is read in"),
    ],
)
def test_planted_violation_is_found(tmp_path: Path, path: str, text: str, message: str) -> None:
    found = planted(tmp_path, path, text)
    assert len(found) == 1
    assert message in found[0]
    assert found[0].startswith(path)


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("phi4/train/x.py", "from phi4.engine import step\nfrom phi4 import __version__"),
        ("phi4/engine/a.py", "from phi4.engine.b import c\nfrom . import d"),
        ("phi4/engine/a.py", "import megatron.core\nimport phi4_kernels\nimport torch.distributed"),
        ("phi4/engine/platform.py", "import os\nos.environ"),
        ("phi4/track/mlflow.py", "import mlflow"),
        ("phi4/data/a.py", "import numpy\nfrom phi4.config import Recipe"),
        ("kernels/phi4_kernels/a/op.py", "import torch.distributed\nfrom phi4_kernels import b"),
        ("kernels/phi4_kernels/bench/providers/a.py", "def f():\n    import liger_kernel"),
        ("kernels/phi4_kernels/testing/a.py", "import os\nos.environ"),
    ],
)
def test_allowed_import_is_not(tmp_path: Path, path: str, text: str) -> None:
    assert planted(tmp_path, path, text) == []


def test_import_of_both_packages_is_lean(tmp_path: Path) -> None:
    script = (
        "import sys, threading, phi4, phi4_kernels\n"
        "heavy = {'triton', 'transformer_engine', 'megatron', 'mlflow', 'transformers'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        "torch = sys.modules.get('torch')\n"
        "assert torch is None or not torch.cuda.is_initialized()\n"
        "assert torch is None or not torch.distributed.is_initialized()\n"
        "assert threading.active_count() == 1"
    )
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True)
