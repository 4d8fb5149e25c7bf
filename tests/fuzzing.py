"""A coverage-guided search for bytes that break the law of `readers.py`; run by hand, not by pytest.

    pip install atheris
    python tests/fuzzing.py                                      # lists the readers
    python tests/fuzzing.py config -max_total_time=600           # takes libFuzzer's options

Bytes that break the law are written to `crash-...` in the working folder, with the traceback on standard error;
`python tests/fuzzing.py config crash-...` runs them again. Inputs that increase coverage are kept only in memory; give
a folder after the reader's name to save them. This package, Pillow, zipfile and numpy's reader are instrumented.
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
    from readers import READERS, attempt, write_others
    from small import VALUES, json_paths, replaced

LIMITS = ["-timeout=10", "-rss_limit_mb=2048"]  # beyond them a small file hangs a reader, or wastes memory


def mutated(content: bytes, size: int, seed: int) -> bytes:
    """The bytes as libFuzzer mutates them; half of the time, and if they are JSON, with one value replaced instead."""
    generator = random.Random(seed)
    if generator.random() < 0.5:
        return atheris.Mutate(content, size)
    try:
        value = json.loads(content)
        path, new = generator.choice(json_paths(value)), generator.choice(VALUES)
        mutant = json.dumps(replaced(value, path, new)).encode()
    except (ValueError, RecursionError):
        return atheris.Mutate(content, size)
    return mutant[:size]


def main() -> None:
    """Search from the reader's valid files, until one breaks the law or the time is over."""
    if len(sys.argv) < 2 or sys.argv[1] not in READERS:
        sys.exit(f"name one of {', '.join(READERS)}")
    reader = READERS[sys.argv[1]]
    with tempfile.TemporaryDirectory() as temporary:
        folder, seeds = Path(temporary, "files"), Path(temporary, "seeds")
        for each in (folder, seeds):
            each.mkdir()
        write_others(reader, folder)
        for number, content in enumerate(reader.seeds):
            (seeds / str(number)).write_bytes(content)
        arguments = sys.argv[2:]
        # libFuzzer saves inputs to the first folder and only reads the others; with a file it needs no folder
        folders = [] if any(Path(argument).is_file() for argument in arguments) else [str(seeds)]

        def read(content: bytes) -> None:
            attempt(reader, content, folder)

        atheris.Setup([sys.argv[0], *LIMITS, *arguments, *folders], read, custom_mutator=mutated)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
