"""The parity command: compare an encoder with the same model in transformers, layer by layer."""
