"""xtransfer: a monolingual teacher helps a multilingual student to classify other languages zero-shot."""

__version__ = "0.1.0"
