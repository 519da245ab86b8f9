"""Errors that the user can correct."""


class UserError(Exception):
    """`main` prints the message on standard error and returns exit code 2."""
