"""Tokenization and its cache on disk."""
