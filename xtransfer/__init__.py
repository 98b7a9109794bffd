"""xtransfer: a monolingual teacher helps a multilingual student classify other languages zero-shot."""

import sys

from xtransfer import startup

__version__ = "0.1.0"

if startup.is_command(sys.orig_argv, __name__):
    startup.prepare()
