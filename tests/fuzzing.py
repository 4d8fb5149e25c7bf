"""A search by coverage for bytes that break the law of `readers.py`; run by hand, not by pytest.

    pip install atheris
    python tests/fuzzing.py                                      # the names
    python tests/fuzzing.py config -max_total_time=600           # options are libFuzzer's

Bytes that break the law are written to `crash-...` in the working folder, with the traceback on standard error;
`python tests/fuzzing.py config crash-...` reads them again. Inputs that took the search further are kept in memory
alone; give a folder behind the name to keep them. Instrumented are this package, Pillow, zipfile and numpy's reader.
"""

import json
import random
import sys
import tempfile
from pathlib import Path

try:
    import atheris
except ImportError:
    sys.exit("fuzzing needs atheris: pip install atheris")

with atheris.instrument_imports(include=["pgfunc", "PIL", "zipfile", "numpy.lib"], enable_loader_override=False):
    from readers import READERS, attempt, lay
    from small import VALUES, replaced, within

LIMITS = ["-timeout=10", "-rss_limit_mb=2048"]  # a hang, or memory that a small file does not need, is a finding


def mutated(given: bytes, size: int, seed: int) -> bytes:
    """The bytes changed as libFuzzer does it, or, where they are JSON, often in one value."""
    chosen = random.Random(seed)
    if chosen.random() < 0.5:
        return atheris.Mutate(given, size)
    try:
        value = json.loads(given)
        changed = json.dumps(replaced(value, chosen.choice(within(value)), chosen.choice(VALUES))).encode()
    except (ValueError, RecursionError):
        return atheris.Mutate(given, size)
    return changed[:size]


def main() -> None:
    """Search from the reader's whole files, until a finding or the end of the time."""
    if len(sys.argv) < 2 or sys.argv[1] not in READERS:
        sys.exit(f"name one of {', '.join(READERS)}")
    reader = READERS[sys.argv[1]]
    with tempfile.TemporaryDirectory() as place:
        folder, whole = Path(place, "files"), Path(place, "whole")
        for each in (folder, whole):
            each.mkdir()
        lay(reader, folder)
        for number, content in enumerate(reader.seeds):
            (whole / str(number)).write_bytes(content)
        given = sys.argv[2:]
        # libFuzzer adds what it finds to the first folder, and only reads the others; for a file it needs none
        folders = [] if any(Path(word).is_file() for word in given) else [str(whole)]

        def read(found: bytes) -> None:
            attempt(reader, found, folder)

        atheris.Setup([sys.argv[0], *LIMITS, *given, *folders], read, custom_mutator=mutated)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
