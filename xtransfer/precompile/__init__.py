"""The precompile command: compile an experiment's steps for a TPU topology, without a TPU."""
