"""The one exception that means "the input is wrong, not the program".

Its message is one sentence that names what is wrong and what to do about it; the command line prints it and exits with 2.
"""


class InputError(ValueError):
    """Something the caller gave cannot be used as it is."""


def first_line(error: BaseException) -> str:
    """The first line of an error's text, for a sentence that quotes it; its class if it has no text."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
