"""A workdir and its finished runs: find a run, select its checkpoint, and open its classifier."""
