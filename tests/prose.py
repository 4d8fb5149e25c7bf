"""What the tests of README and notes share: the fenced blocks of a Markdown text."""

import re
from typing import NamedTuple


class Fence(NamedTuple):
    """A fenced block: the word after its backticks, what it holds, and how many lines of the text stand above that."""

    language: str
    body: str
    line: int


def fences(text: str) -> list[Fence]:
    """The fenced blocks, in order; one without a language has ""."""
    found = re.finditer(r"^```(\w*)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    return [Fence(each[1], each[2], text.count("\n", 0, each.start(2))) for each in found]
