"""The one exception for bad input: its message is a sentence for the user; the command line exits with code 2."""


class UserError(Exception):
    """Bad input. The message names file, place, value and the allowed ones."""
