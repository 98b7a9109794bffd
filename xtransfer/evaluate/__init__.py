"""The evaluate command: score the checkpoints of an experiment, as they land or at its end, or any classifier."""
