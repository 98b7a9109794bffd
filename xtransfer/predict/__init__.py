"""The predict command: label text with a trained classifier."""
