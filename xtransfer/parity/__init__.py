"""Command: compares a checkpoint with the same model in transformers, layer by layer."""
