"""Command: describes a task before training."""
