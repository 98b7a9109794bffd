"""The one exception that a person is meant to read."""


class UserError(Exception):
    """Something the user can mend: one line that names the thing and says what to do.

    The binaries print it without a stack trace and exit with status 1 (see `xtransfer.cli`).
    Anything else that is raised is a defect of the program and keeps its trace.
    """
