"""The pretrain command: pretrain a small encoder on a task's own text."""
