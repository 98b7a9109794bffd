"""Command: compiles an experiment's steps for a TPU topology, without a TPU."""
