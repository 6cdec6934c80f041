"""Exceptions that the recipes report without a traceback, and sanitizing of untrusted text."""


class UserError(Exception):
    """Invalid input, such as a flag, a file or a row. The message is one line that names the place and the fix.

    The recipes print it to stderr without a traceback and exit with status 2.
    """


class NothingToDo(Exception):
    """The requested result already exists. The recipes print the message and exit with status 0."""


def printable(text: str, kept: str = "") -> str:
    """Replace the non-printable characters of untrusted text by �, except those in `kept`.
    They may control the terminal or change the direction of the text."""
    return "".join(character if character.isprintable() or character in kept else "�" for character in text)
