"""`phi4`, but a training run is rolled back once: python -m tools.tracking_run STEP train ...

The step is undone as if a hook of the user's had asked for it.
"""

import sys

from phi4.cli import main
from phi4.train import session
from phi4.train.hooks import CONTINUE, Decision, Hook, Progress, RollBack


class RollBackOnce(Hook):
    """Goes back from one step, the first time that it is done.

    Args:
        step: 0 for never.
    """

    def __init__(self, step: int) -> None:
        self._step = step

    def act(self, progress: Progress) -> Decision:
        """Roll back three steps, that is to the checkpoint before them."""
        is_due = progress.step == self._step and progress.state.roll_backs == 0
        return RollBack(3, "the proof asks for it") if is_due else CONTINUE


if __name__ == "__main__":
    step = int(sys.argv[1])
    session.OWN_HOOKS = (*session.OWN_HOOKS, lambda context: [RollBackOnce(step)])
    main(sys.argv[2:])
