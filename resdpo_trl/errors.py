"""Errors that a user can fix, a run that has nothing to do, and text from elsewhere that is safe to show."""


class UserError(Exception):
    """Bad input: a flag, a file, a row. The message is one line that names the place and the fix.

    The recipes print it to stderr without a traceback and exit with status 2.
    """


class NothingToDo(Exception):
    """What was asked for is there already. The recipes print the message and exit with status 0."""


def printable(text: str, kept: str = "") -> str:
    """Text of a file, a model or a flag without control characters, which a terminal would obey, and without marks that
    turn its direction; `kept` are left in."""
    return "".join(character if character.isprintable() or character in kept else "�" for character in text)
