"""The encoder, its checkpoints, and the compiled forward."""
