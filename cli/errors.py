"""What goes wrong through no fault of the program."""


class UserError(Exception):
    """Printed as one line on standard error; the exit code is 2."""
