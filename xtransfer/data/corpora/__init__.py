"""Published corpora, one file each, and their shared parts: archives, downloads, and TFDS."""
