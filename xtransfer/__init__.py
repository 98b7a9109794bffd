"""xtransfer: a monolingual teacher helps a multilingual student classify other languages zero-shot."""

__version__ = "0.1.0"
