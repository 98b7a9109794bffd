"""Floor 4: scoring checkpoints, choosing among them, comparing objectives."""
