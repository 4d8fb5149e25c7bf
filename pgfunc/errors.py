"""The exceptions a caller can catch. Each message is one line: what is wrong, where, and what to do.

`PgfuncError` is the root. The command line prints the message and exits with status 2; nothing else in the package
turns an error into text. What a message says to give is an argument of Python, as in `dtype=`; `with_options` names it
as the command line does.
"""

import re

LONGEST = 1000  # characters of a message; what a file says of itself may be a megabyte
# what a terminal obeys, breaks a line, or turns the direction of the rest of it; and halves of characters
COMMANDS = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def harmless(text: str, keep: str = "") -> str:
    """Text to be shown, in which nothing commands a terminal or forges a line: such characters, but for those to keep,
    are escaped."""
    return COMMANDS.sub(lambda found: found[0] if found[0] in keep else repr(found[0])[1:-1], text)


class PgfuncError(Exception):
    """Anything that pgfunc reports about its input, its files or its machine.

    What a message quotes of a file or a name cannot break its line, command a terminal or fill it: characters that do
    not print are escaped, and a long message loses its middle.
    """

    def __str__(self) -> str:
        return printable(super().__str__())


class CheckpointError(PgfuncError):
    """A checkpoint that cannot be read, or does not fit its configuration."""


class ImageError(PgfuncError, ValueError):
    """A picture that cannot be read."""


class PromptError(PgfuncError, ValueError):
    """A prompt that cannot be made from the given images and text, or does not fit the model."""


class TokenError(PgfuncError, IndexError):
    """A token id that no row of the vocabulary has."""


class CacheFullError(PgfuncError, IndexError):
    """More tokens than a row of a cache has room for."""


class DataError(PgfuncError, ValueError):
    """A line of a data set that cannot be used."""


class SettingError(PgfuncError, ValueError):
    """A setting outside its range, such as a temperature or top-p."""


class NumericalError(PgfuncError, ArithmeticError):
    """A computation that left the range of its numbers."""


class DeviceError(PgfuncError, RuntimeError):
    """A device that is not there."""


def printable(said: str) -> str:
    """A message as one line of bounded length, without characters that command a terminal."""
    said = said if said.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in said)
    half = (LONGEST - len(" ... ")) // 2
    return said if len(said) <= LONGEST else f"{said[:half]} ... {said[-half:]}"


def with_options(message: str) -> str:
    """A message in which arguments of Python, `max_new_tokens=`, are options of the command line, --max-new-tokens."""
    return re.sub(r"(?<![\w.=-])([a-z]\w*)=(?=[\s,;.)]|$)", lambda said: "--" + said[1].replace("_", "-"), message)


def first_line(error: Exception) -> str:
    """What a library's error says, for quoting in a message of one line."""
    return str(error).partition("\n")[0] or type(error).__name__
