"""Floor 2: how knowledge moves from the teacher to the student."""
