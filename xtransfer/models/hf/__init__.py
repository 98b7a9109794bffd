"""Hugging Face checkpoints: configs, weights, tokenizers, and the hub."""
