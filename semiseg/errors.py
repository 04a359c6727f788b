"""What is said to the user: bad input, on which the command line exits with code 2, and notices."""


class UserError(Exception):
    """Bad input. The message names file, place, value and the allowed ones."""


class UserNotice(UserWarning):
    """What the user should know of input that is taken all the same: a sentence, as a warning."""
