"""Command: pretrains a small encoder."""
