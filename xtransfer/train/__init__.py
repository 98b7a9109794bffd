"""Training of one model: inputs, steps, loop, optimizer, and checkpoints."""
