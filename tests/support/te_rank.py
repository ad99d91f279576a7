"""A rank of `te_runs`: a process in which the stand-in passes for Transformer Engine on a GPU."""

import importlib
import pickle
import sys
import warnings
from pathlib import Path
from unittest import mock

import torch

from tests.support.rank_process import OUR_MODULES


def main(directory: Path, rank: int) -> None:
    """Make the call that the test wrote down, and write down what it returned."""
    module, name, args, _ = pickle.loads((directory / "call").read_bytes())
    # As in other tests; what megatron-core imports by an old name is its own affair.
    warnings.filterwarnings("error", module=OUR_MODULES)
    with mock.patch.object(torch.cuda, "is_available", return_value=True):
        import phi4.engine  # noqa: F401
    from phi4.engine import engine

    engine.check_backend = lambda precision, platform: None
    value = getattr(importlib.import_module(module), name)(rank, *args)
    (directory / str(rank)).write_bytes(pickle.dumps(value))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
