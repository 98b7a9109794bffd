"""The training of one model: its state, its step, its loop, its optimizer, its checkpoints."""
