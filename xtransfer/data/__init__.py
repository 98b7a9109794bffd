"""Tasks, text, packed batches and the input pipeline."""
