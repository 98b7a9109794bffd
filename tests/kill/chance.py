"""Random kills that can be repeated.

XTRANSFER_KILL_ROUNDS is the number of rounds, 1 by default. XTRANSFER_KILL_SEED repeats the kills of a failed test.
"""

import os
import random
import secrets
from collections.abc import Callable

from tests.helpers.interruption import Interruption

ROUNDS = int(os.environ.get("XTRANSFER_KILL_ROUNDS", "1"))
SEED = int(os.environ.get("XTRANSFER_KILL_SEED", secrets.randbelow(2**32)))

_LONGEST_DELAY = 0.3  # seconds: less than most stages take
_LAST = 4  # the operations before an output gets its name, and just after it
_TRIES = 5


class Kills:
    """The kills of one round, and their story for a test that fails.

    Args:
      name: different for each round and each test.
      run: runs a command with an interruption, and returns its exit status.
      clear: removes everything that the command has written.
    """

    def __init__(self, name: str, run: Callable[[Interruption], int], clear: Callable[[], None]):
        self._random, self._run, self._clear = random.Random(f"{SEED}/{name}"), run, clear
        self.story = f"XTRANSFER_KILL_SEED={SEED}, {name}"

    def kill(self, stage: str, operations: int) -> None:
        """Start the command and kill it in a stage that has this number of operations; half of all with a delay.

        A process may end before its delay does. Then another one starts afresh, and the last one has no delay.
        """
        for tries_left in reversed(range(_TRIES)):
            first = self._random.choice([1, max(1, operations - _LAST)])
            number = self._random.randint(first, operations)
            delay = self._random.choice([0.0, self._random.uniform(0, _LONGEST_DELAY)])
            kill = Interruption(stage, number, delay if tries_left else 0.0)
            status = self._run(kill)
            self.story += f"\n{kill}: {status}"
            assert status in (-9, 0), self.story
            if status:
                return
            self._clear()
        raise AssertionError(f"{self.story}\nno process was killed in the stage {stage}")
