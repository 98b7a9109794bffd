"""Published corpora, one file each, and what they share: archives, downloads, and TFDS."""
