"""The exceptions that a caller can catch. Each message is one line: what is wrong, where, and what to do.

`PgfuncError` is the base class. The command line prints the message and exits with status 2. Messages name Python
arguments, such as `dtype=`; `with_options` replaces them by command-line options.
"""

import re

LONGEST = 1000  # characters of a message; it may quote a file, and the quotation may be a megabyte
# control characters of terminals, line breaks, characters that change the text direction, and surrogates
CONTROL_CHARACTERS = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def escape_controls(text: str, keep: str = "") -> str:
    """The text with all characters escaped that control a terminal or fake a line, except the characters in `keep`."""
    return CONTROL_CHARACTERS.sub(lambda match: match[0] if match[0] in keep else repr(match[0])[1:-1], text)


class PgfuncError(Exception):
    """The base class: an error in the input, a file or the machine.

    A message may quote a file or a name, so it is made safe to print: unprintable characters are escaped, and a long
    message loses its middle.
    """

    def __str__(self) -> str:
        return printable(super().__str__())


class CheckpointError(PgfuncError):
    """A checkpoint cannot be read, or does not match its configuration."""


class ImageError(PgfuncError, ValueError):
    """A picture cannot be read."""


class PromptError(PgfuncError, ValueError):
    """No prompt can be made from these images and texts, or the prompt does not fit the model."""


class TokenError(PgfuncError, IndexError):
    """A token id is outside the vocabulary."""


class CacheFullError(PgfuncError, IndexError):
    """A row of a cache has too few free slots for the new tokens."""


class DataError(PgfuncError, ValueError):
    """A line of a data set cannot be used."""


class SettingError(PgfuncError, ValueError):
    """A setting, an option or an output path cannot be used, or a package that it needs is missing."""


class NumericalError(PgfuncError, ArithmeticError):
    """Numbers are nan or infinite, or too large for their dtype."""


class DeviceError(PgfuncError, RuntimeError):
    """A device does not exist on this machine, or cannot do what was asked."""


def printable(message: str) -> str:
    """The message as one line of at most `LONGEST` characters, with unprintable characters escaped."""
    if not message.isprintable():
        message = "".join(c if c.isprintable() else repr(c)[1:-1] for c in message)
    half = (LONGEST - len(" ... ")) // 2
    return message if len(message) <= LONGEST else f"{message[:half]} ... {message[-half:]}"


def with_options(message: str) -> str:
    """The message with Python arguments, such as `max_new_tokens=`, written as options: `--max-new-tokens`."""
    return re.sub(r"(?<![\w.=-])([a-z]\w*)=(?=[\s,;.)]|$)", lambda match: "--" + match[1].replace("_", "-"), message)


def first_line(error: Exception) -> str:
    """The first line of a library's error message, or the name of its type if the message is empty."""
    return str(error).partition("\n")[0] or type(error).__name__
