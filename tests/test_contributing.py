"""CONTRIBUTING names files that exist, and commands that are there to run."""

import re
from pathlib import Path

import pytest
from prose import fences

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / ".github/CONTRIBUTING.md").read_text()
COMMANDS = "\n".join(fence.body for fence in fences(TEXT) if fence.language == "sh")


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\(([^)#:]+)", TEXT))))
def test_links_lead_to_files(link):
    assert (ROOT / ".github" / link).exists()


@pytest.mark.parametrize("path", sorted(set(re.findall(r"\btests/test_\w+\.py|\btests/check_\w+\.py|\.ci/\w+", TEXT))))
def test_named_files_exist(path):
    assert (ROOT / path).is_file()


@pytest.mark.parametrize("name", sorted(set(re.findall(r"(?<=[ /])(?:compiled/)?test_\w+\.py", COMMANDS))))
def test_files_in_commands_exist(name):
    assert (ROOT / "tests" / name).is_file()


def test_every_hypothesis_profile_is_listed():
    profiles = re.findall(r'register_profile\("(\w+)"', (ROOT / "tests/conftest.py").read_text())
    assert profiles == ["dev", "ci", "deep", "mutants"]
    assert all(f"| `{profile}`" in TEXT for profile in profiles)
