"""The describe command: describe a task and its tokens before training."""
