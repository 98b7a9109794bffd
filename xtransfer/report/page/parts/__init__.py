"""The parts of the page, a file each: every `build` takes a `Source` and returns markup, or raises MissingSource."""
