"""Command: labels text with a trained classifier."""
