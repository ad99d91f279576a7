"""Write down what Transformer Engine's functions take, from its own published sources.

    git clone https://github.com/NVIDIA/TransformerEngine
    python tools/te_signatures.py TransformerEngine

The table (tests/support/te_stand_in/signatures.json) holds names of functions and parameters by
version, no code. The stand-in of the tests refuses whatever it does not list.
"""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

VERSIONS = ("2.9", "2.10", "2.11")
TABLE = Path(__file__).parents[1] / "tests/support/te_stand_in/signatures.json"
_RECIPES = "transformer_engine/common/recipe/__init__.py"
_BASE = "transformer_engine/pytorch/module/base.py"
_QUANTIZATION = "transformer_engine/pytorch/quantization.py"
_UTILS = "transformer_engine/pytorch/tensor/utils.py"
NAMES = {
    "DelayedScaling": _RECIPES,
    "Float8CurrentScaling": _RECIPES,
    "Float8BlockScaling": _RECIPES,
    "Linear.__init__": "transformer_engine/pytorch/module/linear.py",
    "Linear.forward": "transformer_engine/pytorch/module/linear.py",
    "TransformerEngineBaseModule.init_fp8_meta_tensors": _BASE,
    "TransformerEngineBaseModule.get_extra_state": _BASE,
    "TransformerEngineBaseModule.set_extra_state": _BASE,
    "get_dummy_wgrad": _BASE,
    "fp8_autocast": _QUANTIZATION,
    "fp8_model_init": _QUANTIZATION,
    "DelayedScalingRecipeState": _QUANTIZATION,
    "FP8GlobalStateManager.is_fp8_enabled": _QUANTIZATION,
    "FP8GlobalStateManager.is_fp8_available": _QUANTIZATION,
    "FP8GlobalStateManager.is_fp8_block_scaling_available": _QUANTIZATION,
    "FP8GlobalStateManager.reduce_and_update_fp8_tensors": _QUANTIZATION,
    "FP8GlobalStateManager.reset": _QUANTIZATION,
    "checkpoint": "transformer_engine/pytorch/distributed.py",
    "replace_raw_data": _UTILS,
    "cast_master_weights_to_fp8": _UTILS,
    "post_all_gather_processing": _UTILS,
}
"""What megatron-core or the engine calls when FP8 is Transformer Engine's, and in which file."""


def parameters(node: ast.FunctionDef | ast.ClassDef) -> list[str]:
    """Names in order, those with a default followed by `=`; the fields of a class."""
    if isinstance(node, ast.ClassDef):
        fields = [entry for entry in node.body if isinstance(entry, ast.AnnAssign)]
        return [f"{entry.target.id}{'=' if entry.value else ''}" for entry in fields]
    arguments = node.args
    plain = [*arguments.posonlyargs, *arguments.args]
    without = len(plain) - len(arguments.defaults)
    found = [f"{one.arg}{'=' if at >= without else ''}" for at, one in enumerate(plain)]
    if arguments.vararg or arguments.kwonlyargs:
        found.append(f"*{arguments.vararg.arg if arguments.vararg else ''}")
    pairs = zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    found += [f"{one.arg}{'=' if default else ''}" for one, default in pairs]
    if arguments.kwarg:
        found += [f"{name}=" for name in _taken_out(node, arguments.kwarg.arg)]
        found.append(f"**{arguments.kwarg.arg}")
    return [name for name in found if name not in ("self", "cls")]


def _taken_out(node: ast.FunctionDef, kwargs: str) -> Iterator[str]:
    """Keywords that a function takes out of its `**kwargs` by name."""
    for call in ast.walk(node):
        match call:
            case ast.Call(
                func=ast.Attribute(value=ast.Name(id=owner), attr="pop"),
                args=[ast.Constant(value=str(name)), *_],
            ) if owner == kwargs:
                yield name


def found_in(tree: ast.Module, name: str) -> list[str] | None:
    """The parameters of a function, a method or a class with fields; None where it is missing."""
    body, node = tree.body, None
    for part in name.split("."):
        named = (one for one in body if getattr(one, "name", None) == part)
        node = next(named, None)
        if node is None:
            return None
        body = node.body
    return parameters(node)


def table(repository: Path) -> dict[str, list[dict[str, object]]]:
    """By name: each form that it has, and in which versions."""
    forms: dict[str, list[dict[str, object]]] = {name: [] for name in NAMES}
    for version in VERSIONS:
        for name, path in NAMES.items():
            show = ("git", "-C", str(repository), "show", f"v{version}:{path}")
            source = subprocess.run(show, check=True, capture_output=True, text=True).stdout
            found = found_in(ast.parse(source), name)
            if found is None:
                continue
            same = next((form for form in forms[name] if form["parameters"] == found), None)
            if same is None:
                forms[name].append({"versions": [version], "parameters": found})
            else:
                same["versions"].append(version)
    return forms


if __name__ == "__main__":
    TABLE.write_text(json.dumps(table(Path(sys.argv[1])), indent=1) + "\n")
