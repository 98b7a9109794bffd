"""Counters of the examples and tokens that a model has processed."""

from dataclasses import dataclass


@dataclass
class Work:
    """What a model has processed since it was created.

    Attributes:
      examples: the number of examples.
      real: the number of their tokens.
      slots: the number of token positions in their batches, with padding.
    """

    examples: int = 0
    real: float = 0.0
    slots: int = 0

    def add(self, examples: int, real: float, slots: int) -> None:
        """Count one batch."""
        self.examples += examples
        self.real += real
        self.slots += slots

    def since(self, before: "Work") -> "Work":
        """Return the work that was added after `before`, a copy of this counter."""
        return Work(self.examples - before.examples, self.real - before.real, self.slots - before.slots)
