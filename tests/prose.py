"""What the tests of the README and the notes share: the pages, their fenced blocks, links and commands."""

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
FOLDER = ROOT / "examples" / "notes"
INDEX = FOLDER / "README.md"
NOTES = sorted(path for path in FOLDER.glob("*.md") if path != INDEX)
PAGES = [README, INDEX, *NOTES]


class Fence(NamedTuple):
    """A fenced block: the language after its backticks, its text, and the number of lines above that text."""

    language: str
    body: str
    line: int


def fences(text: str) -> list[Fence]:
    """The fenced blocks, in order; a block without a language has ""."""
    matches = re.finditer(r"^```(\w*)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    return [Fence(match[1], match[2], text.count("\n", 0, match.start(2))) for match in matches]


def blocks(page: Path, language: str) -> list[str]:
    """The text of the page's blocks in one language, in order."""
    return [fence.body for fence in fences(page.read_text()) if fence.language == language]


def commands(page: Path) -> list[str]:
    """The `pgfunc` lines of the page's shell blocks, without their comments."""
    lines = [line.split("  #")[0].strip() for block in blocks(page, "sh") for line in block.splitlines()]
    return [line for line in lines if line.startswith("pgfunc ")]


def links(page: Path) -> list[str]:
    """The links of a page to files, each once."""
    return sorted(set(re.findall(r"\]\(([^)#:]+)\)", page.read_text())))
