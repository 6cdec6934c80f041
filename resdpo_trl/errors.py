"""The one kind of error that a user can mend."""


class UserError(Exception):
    """Bad input: a flag, a file, a row. The message is one line that names the place and the mend.

    The recipes print it to stderr without a traceback and exit with status 2.
    """
