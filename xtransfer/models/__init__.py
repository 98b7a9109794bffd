"""Encoders in Flax NNX, with attention, dropout, and inference. Only `hf` knows Hugging Face names."""
