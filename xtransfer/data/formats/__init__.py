"""File formats: bytes in, rows with file and line out."""
