"""Encoders in Flax NNX, with attention, dropout, and inference. Nothing here knows a Hugging Face name, except `hf`."""
