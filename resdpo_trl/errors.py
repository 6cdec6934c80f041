"""The one kind of error that a user can mend, and what is no error at all."""


class UserError(Exception):
    """Bad input: a flag, a file, a row. The message is one line that names the place and the mend.

    The recipes print it to stderr without a traceback and exit with status 2.
    """


class NothingToDo(Exception):
    """What was asked for is there already. The recipes print the message and exit with status 0."""
