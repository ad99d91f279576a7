"""A rank that compiles nothing does not import torch's compiler."""

import subprocess
import sys

import torch

from phi4.engine.deferred_compile import deferred_compile


def test_function_is_compiled_once_at_its_first_call(monkeypatch):
    compiled = []

    def compile_now(function):
        compiled.append(function.__name__)
        return function

    monkeypatch.setattr(torch, "compile", compile_now)
    with deferred_compile():

        @torch.compile
        def add(a, b=0):
            return a + b

    assert not compiled
    assert (add(1, b=2), add(3), add.__name__) == (3, 3, "add")
    assert compiled == ["add"]
    assert torch.compile is compile_now


def test_training_imports_no_compiler():
    script = (
        "import sys, phi4.launch.worker, phi4.train.session, phi4.stages.pretrain\n"
        "assert not {'torch._dynamo', 'torch._inductor'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
