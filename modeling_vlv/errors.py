"""Errors that the user can correct."""


class UserError(Exception):
    """`main` prints the message on standard error and returns exit code 2."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type if it has none."""
    return str(error).split("\n", maxsplit=1)[0] or type(error).__name__
