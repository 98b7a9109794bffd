"""The export command: write a trained classifier as a Hugging Face directory with a model card."""
