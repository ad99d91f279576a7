"""`phi4 kernels qualify` where only torch and Triton are installed.

python -m phi4_kernels.qualification [--op OP] [--again] [--seconds 60]
"""

import argparse
import sys

import torch

from phi4_kernels import registry
from phi4_kernels.qualification import LIMIT_SECONDS, qualify
from phi4_kernels.qualification.gpu import GpuProver


def main() -> int:
    """Qualify; 1 when a kernel is red, 2 without a GPU."""
    options = argparse.ArgumentParser(prog="python -m phi4_kernels.qualification")
    options.add_argument("--op", choices=registry.OPS, action="append", help="may be repeated")
    options.add_argument("--again", action="store_true", help="also what is proven here already")
    options.add_argument(
        "--seconds", type=float, default=LIMIT_SECONDS, help="for all ops together"
    )
    chosen = options.parse_args()
    if not torch.cuda.is_available():
        print("torch finds no CUDA device: there is nothing to qualify")
        return 2
    prover = GpuProver(torch.device("cuda", torch.cuda.current_device()))
    ops = tuple(chosen.op or registry.OPS)
    done = qualify(prover, ops=ops, again=chosen.again, limit_seconds=chosen.seconds)
    print(f"{prover.machine.device}: {done.seconds:.1f} s")
    for found in done.findings:
        print(found.describe())
    if done.problem is not None:
        print(f"not kept for later runs: {done.problem}")
    return int(any(found.verdict == "red" for found in done.findings))


if __name__ == "__main__":
    sys.exit(main())
