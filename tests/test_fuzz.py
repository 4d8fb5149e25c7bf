"""Any file is read as promised or refused in one line that names it, within limits on time and memory.

The readers and the law, `attempt`, are in `readers.py`.
"""

import io
import json
import resource
import signal
import struct
import zipfile
from base64 import b64encode
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import EpsImagePlugin, Image
from readers import READERS, Reader, attempt, write_others
from small import BOX, CODES, EXAMPLE, MODES, VALUES, joined, json_paths, members, picture_file, replaced, split, zipped

from pgfunc.checkpoint.bigvision import EMBED
from pgfunc.errors import LONGEST, PgfuncError

pytestmark = pytest.mark.filterwarnings("ignore:.*image format is deprecated")  # Pillow still reads it

SECONDS = 5
MEMORY = 128 * 2**20
MAX_PIXELS = 2**21  # of the largest picture decoded here, for speed; Pillow's own limit is 43 times that


class HangError(BaseException):
    """A reader took too long. It is not an Exception, so that no reader mistakes it for a fault of the file."""


def peak() -> int:
    """The peak memory of this process in bytes; on Linux, since the previous call."""
    status, clear = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not clear.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    # not ru_maxrss, which starts at the memory of the parent process
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
    clear.write_text("5")
    return int(line.split()[1]) * 1024


@contextmanager
def bounded(seconds: float = SECONDS, memory: int = MEMORY) -> Iterator[None]:
    """Fail if the block takes longer, or more memory."""

    def stop(*_: object) -> None:
        raise HangError(f"longer than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    peak()
    start = peak()
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    used = peak() - start
    assert used < memory, f"{used / 2**20:.0f} MiB"


@pytest.fixture(scope="module", autouse=True)
def _small_pictures():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Image, "MAX_IMAGE_PIXELS", MAX_PIXELS)
        yield


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """A folder for each reader, with its other files."""
    folders = {name: tmp_path_factory.mktemp(name) for name in READERS}
    for name, reader in READERS.items():
        write_others(reader, folders[name])
    return folders


def read(name: str, folders: dict[str, Path], content: bytes) -> str:
    """The message with which the reader refuses the bytes, or "", within the limits."""
    with bounded():
        return attempt(READERS[name], content, folders[name])


def is_json(content: bytes) -> bool:
    try:
        return isinstance(json.loads(content), dict)
    except ValueError:
        return False


JSON = [name for name, reader in READERS.items() if is_json(reader.seeds[0])]
MAPPED = [name for name, reader in READERS.items() if reader.file.endswith(".safetensors") and reader.pack is bytes]
ZIPPED = ["npz", "npz-weights"]
BROKEN = {"config": 1, "npz": 1, "npz-published": 0, "masks": 0}  # index of the seed that is refused


# --- damage


class ByteEdit(NamedTuple):
    """Replace some bytes by others."""

    start: float  # an index, or a fraction of the length
    drop: int
    insert: bytes


edits = st.lists(
    st.builds(
        ByteEdit, st.integers(0, 80) | st.floats(0, 1), st.sampled_from([0, 1, 2, 8, 10**6]), st.binary(max_size=9)
    ),
    min_size=1,
    max_size=4,
)


def edited(content: bytes, edits: list[ByteEdit]) -> bytes:
    for edit in edits:
        start = edit.start if isinstance(edit.start, int) else int(edit.start * len(content))
        content = content[:start] + edit.insert + content[start + edit.drop :]
    return content


numbers = st.integers() | st.floats() | st.sampled_from([2**31, 2**63, 10**30])
anything = st.recursive(
    st.sampled_from(VALUES) | numbers | st.text(max_size=8),
    lambda parts: st.lists(parts, max_size=3) | st.dictionaries(st.text(max_size=5), parts, max_size=3),
    max_leaves=5,
)
indices = st.integers(0, 10**4)


def changed(value: object, index: int, new: object) -> object:
    """The JSON value with one of its inner values replaced; the index wraps around."""
    paths = json_paths(value)
    return replaced(value, paths[index % len(paths)], new)


# --- tests


def raises(error: Exception) -> Reader:
    """A reader that raises this error."""

    def read(path: Path) -> None:
        raise error

    return Reader("file", read, ())


@pytest.mark.parametrize("error", [ValueError("x"), PgfuncError("file: nowhere"), RecursionError()], ids=repr)
def test_attempt_detects_a_broken_law(error, tmp_path):
    with pytest.raises((AssertionError, ValueError, RecursionError)):
        attempt(raises(error), b"", tmp_path)
    assert attempt(raises(PgfuncError(f"{tmp_path}: is wrong")), b"", tmp_path).endswith("is wrong")


def loop_forever() -> None:
    """Loop forever, and suppress every Exception."""
    while True:
        with suppress(Exception):
            sum(range(1000))


def test_the_limits_detect_a_hang_and_wasted_memory():
    with pytest.raises(HangError), bounded(seconds=0.05):
        loop_forever()
    with pytest.raises(AssertionError, match="MiB"), bounded(memory=2**24):
        np.ones(2**23)


@example("x" * 1003)
@given(st.text(st.characters(codec=None), max_size=3000))
def test_any_message_is_one_line_of_bounded_length(text):
    message = str(PgfuncError(text))
    assert message.isprintable()
    assert len(message) <= LONGEST
    assert message == text or not text.isprintable() or len(text) > len(message)


@pytest.mark.parametrize("name", READERS)
def test_valid_files_are_read(name, folders):
    refused = [bool(read(name, folders, seed)) for seed in READERS[name].seeds]
    if name == "picture":
        assert refused == [seed.startswith(b"%!PS") for seed in READERS[name].seeds]
    else:
        assert refused == [i == BROKEN.get(name) for i in range(len(refused))]


@pytest.mark.parametrize("name", READERS)
@given(seed=indices, edits=edits)
def test_damaged_bytes_are_read_or_refused(name, folders, seed, edits):
    seeds = READERS[name].seeds
    read(name, folders, edited(seeds[seed % len(seeds)], edits))


@pytest.mark.parametrize("name", JSON)
@given(seed=indices, index=indices, new=anything)
def test_a_json_file_with_one_value_replaced_is_read_or_refused(name, folders, seed, index, new):
    seeds = READERS[name].seeds
    value = json.loads(seeds[seed % len(seeds)])
    read(name, folders, json.dumps(changed(value, index, new)).encode())


@pytest.mark.parametrize("name", JSON)
@given(value=anything, duplicate=st.booleans())
def test_any_json_and_duplicate_keys_are_read_or_refused(name, folders, value, duplicate):
    content = READERS[name].seeds[0]
    key = next(iter(json.loads(content)))
    with_duplicate = b"{" + json.dumps({key: value}).encode()[1:-1] + b"," + content.lstrip()[1:]
    read(name, folders, with_duplicate if duplicate else json.dumps(value).encode())


@pytest.mark.parametrize("name", MAPPED)
@given(index=indices, new=anything)
def test_a_safetensors_header_with_one_value_replaced_is_read_or_refused(name, folders, index, new):
    header, data = split(READERS[name].seeds[0])
    read(name, folders, joined(json.dumps(changed(json.loads(header), index, new)).encode(), data))


sizes = st.integers(0, 3) | st.sampled_from([2**31, 2**32, 2**62, 2**63, 2**64 - 1])
DTYPES = {"BOOL": 8, "F4": 4, "F8_E4M3": 8, "F8_E5M2": 8, "I8": 8, "U8": 8, "I16": 16, "F16": 16, "BF16": 16, "F32": 32,
          "C64": 64, "F64": 64}  # fmt: skip


@given(st.lists(st.tuples(st.sampled_from(sorted(DTYPES)), st.lists(sizes, max_size=4)), max_size=3))
def test_safetensors_of_any_dtypes_and_shapes_are_read_or_refused(folders, arrays):
    """The header covers the data exactly, as the format requires, unless that would be more than 10,000 bytes."""
    header, end = {}, 0
    for i, (dtype, shape) in enumerate(arrays):
        start, end = end, end + min(DTYPES[dtype] * int(np.prod(shape, dtype=object)) // 8, 10**4)
        header[str(i)] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    read("safetensors", folders, joined(json.dumps(header).encode(), bytes(end)))


literals = st.sampled_from(
    ["'<f4'", "'|V2'", "'>f8'", "'<f2'", "'|O'", "'<U9999999'", "[('a', '<f4')]", "'|V2000000000'", "True", "None",
     "()", "(1,)", "(2, 3)", "(-1,)", "(True,)", "(0, 4611686018427387904)", "(99999999999,)", "(10**9,)", "(3, -3)",
     "'\\n'", "1e999", "((((((((1,),),),),),),),)", "[" * 300, "b'a'", "__import__('os')"]
)  # fmt: skip


@pytest.mark.parametrize("name", ["npy-header", *ZIPPED])
@given(
    member=indices,
    descr=literals,
    order=literals,
    shape=literals,
    valid=st.sampled_from([(), (0,), (1,), (0, 1), (2,)]),
)
def test_any_npy_header_is_read_or_refused(name, folders, member, descr, order, shape, valid):
    parts = [part if i not in valid else valid_part for i, (part, valid_part) in enumerate(
        zip((descr, order, shape), ("'<f4'", "False", "(2, 3)"), strict=True))]  # fmt: skip
    header = "{{'descr': {}, 'fortran_order': {}, 'shape': {}}}".format(*parts).encode()
    if name == "npy-header":
        read(name, folders, header)
    elif contents := members(READERS[name].seeds[0]):
        i = member % len(contents)
        array = b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header + bytes(24)
        read(name, folders, zipped([*contents[:i], (contents[i][0], array), *contents[i + 1 :]]))


@pytest.mark.filterwarnings("ignore:Duplicate name:UserWarning")
@pytest.mark.parametrize("name", ZIPPED)
@given(member=indices, other=st.sampled_from(["a.npy", "a", "../a.npy", "\n.npy", "params/x.npy", "x" * 5000 + ".npy"]),
       keep=st.booleans(), bare=st.booleans())  # fmt: skip
def test_npz_members_of_any_name_are_read_or_refused(name, folders, member, other, keep, bare):
    """One member gets a copy under another name, or only that name; or a member without a suffix is added beside it."""
    contents = members(READERS[name].seeds[0])
    i = member % len(contents)
    other = contents[i][0].removesuffix(".npy") if bare else other
    added = (other, b"not an array" if bare else contents[i][1])
    read(name, folders, zipped([*(contents if keep or bare else contents[:i] + contents[i + 1 :]), added]))


@pytest.mark.filterwarnings("ignore:IM image format:DeprecationWarning")
@given(st.sampled_from(sorted(Image.SAVE.keys() & Image.OPEN.keys())), st.sampled_from(MODES), st.integers(1, 90),
       st.integers(1, 90), edits)  # fmt: skip
def test_pictures_of_any_mode_and_size_are_read_or_refused(folders, format, mode, width, height, edits):
    content = picture_file(format, mode, width, height)
    message = read("picture", folders, content) if content else ""
    assert bool(message) == content.startswith(b"%!PS")
    read("picture", folders, edited(content, edits))


words = st.sampled_from([BOX, CODES, BOX + CODES, "<loc1024>", "<loc0001>", "<seg128>", ";", " ", "<loc", "\ud800"])


@pytest.mark.parametrize("name", ["boxes", "mask-codes"])
@given(parts=st.lists(words | st.text(max_size=4)))
def test_any_text_with_location_tokens_and_mask_codes_is_parsed(name, folders, parts):
    assert not read(name, folders, "".join(parts).encode(errors="surrogatepass"))


@given(
    st.lists(anything | st.fixed_dictionaries({key: anything | st.just(EXAMPLE[key]) for key in EXAMPLE}), max_size=3)
)
def test_lines_of_any_json_are_read_or_refused(folders, lines):
    read("examples", folders, "\n".join(map(json.dumps, lines)).encode())


# --- inputs that fuzzing has found, or would take long to find


def at(name: str, *path: str, new: object, seed: int = 0) -> bytes:
    """A reader's valid JSON file with the value at one path replaced."""
    return json.dumps(replaced(json.loads(READERS[name].seeds[seed]), path, new)).encode()


def vocabulary(seed: int, **model: object) -> bytes:
    return at("tokenizer", "model", new=json.loads(READERS["tokenizer"].seeds[seed])["model"] | model, seed=seed)


NPZ_MEMBERS = members(READERS["npz-weights"].seeds[0])
NPY_HEADER = b"{'descr': '<f4', 'fortran_order': False, 'shape': (40000000,)}"
NPY = b"\x93NUMPY\1\0" + struct.pack("<H", len(NPY_HEADER)) + NPY_HEADER
HUGE = b"{'descr': '<f4', 'fortran_order': False, 'shape': (%d, 2)}" % (10**30)
LONG = bytes(160 * 2**20)


def compressed(content: bytes) -> bytes:
    """A `.npz` of one compressed member; zeros shrink to a thousandth."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr("a.npy", content)
    return file.getvalue()


def with_rules(part: str, *rules: object, **fields: object) -> bytes:
    """A tokenizer with these rules, and with an added token to which they are applied when the file is read."""
    tokenizer = json.loads(READERS["tokenizer"].seeds[0])
    key = {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers", "decoder": "decoders"}[part]
    tokenizer["added_tokens"].append({"id": 40, "content": "a\n", "single_word": False, "lstrip": False,
                                      "rstrip": False, "normalized": True, "special": False})  # fmt: skip
    return json.dumps(tokenizer | {part: {"type": "Sequence", key: rules}} | fields).encode()


def replace_rule(pattern: object, content: str) -> dict[str, object]:
    return {"type": "Replace", "pattern": pattern, "content": content}


def charsmap(replacement: bytes) -> dict[str, str]:
    """SentencePiece's normalization table with an empty trie."""
    return {"type": "Precompiled", "precompiled_charsmap": b64encode(struct.pack("<I", 0) + replacement).decode()}


TWICE = replace_rule({"String": "\n"}, "\n\n")
GROWING = {
    "rules that double a newline": with_rules("normalizer", *[TWICE] * 30),
    "rules within rules": with_rules("normalizer", *[{"type": "Sequence", "normalizers": [TWICE] * 10}] * 3),
    "patterns that match the empty string": with_rules("normalizer", *[replace_rule({"Regex": "x*"}, "-")] * 30),
    "the empty string": with_rules("normalizer", *[replace_rule({"String": ""}, "-")] * 30),
    "two rules that insert a long text": with_rules("normalizer", *[replace_rule({"String": "a"}, "a" * 20_000)] * 2),
    "bytes as letters, repeatedly": with_rules("normalizer", *[{"type": "ByteLevel"}] * 30),
    "bytes before tokens": with_rules("pre_tokenizer", *[
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}] * 30),
    "decoders that double": with_rules("decoder", *[replace_rule({"String": "a"}, "aa")] * 30),
    "tables": with_rules("normalizer", *[charsmap(b"a" * 100 + b"\0")] * 9),
    "two tables of long texts": with_rules("normalizer", *[charsmap(b"a" * 20_000 + b"\0")] * 2),
    "names with escapes": with_rules("normalizer", *[TWICE] * 30).replace(b"Replace", rb"\u0052eplace"),
}  # fmt: skip
REGRESSIONS = {
    "a thousand million layers": ("config", at("config", "text_config", "num_hidden_layers", new=10**9),
                                  "num_hidden_layers is 1000000000, expected a whole number from 1 to 1000"),
    "a shape that no tensor has": ("config", at("config", "text_config", "head_dim", new=10**30), "head_dim is 10000"),
    "a norm that divides by nan": ("config", at("config", "text_config", "rms_norm_eps", new=float("nan")),
                                   "rms_norm_eps is nan, expected a number above 0"),
    "an eos id that is not a token": ("config", at("config", "eos_token_id", new=12), "expected ids below"),
    "a text in place of a part": ("config", at("config", "text_config", new="a"), "text_config is 'a', expected an"),
    "two lines": ("config", at("config", "text_config", "model_type", new="a\nb"), r"model_type is a\nb, expected"),
    "a megabyte": ("config", at("config", "model_type", new="x" * 10**6), "x ... x"),
    "a shard's name that is too long": ("index", at("index", "weight_map", new={"a": "x" * 300}), "missing, though"),
    "an empty array of a size that no tensor has": (
        "safetensors", joined(b'{"a":{"dtype":"F32","shape":[0,9223372036854775808],"data_offsets":[0,0]}}', b""),
        "a cannot be read"),
    "a number of rows beyond int64": ("npz-published", zipped([(
        f"params/{EMBED}.npy", b"\x93NUMPY\1\0" + struct.pack("<H", len(HUGE)) + HUGE)]), "is missing"),
    "a member without suffix beside its array": ("npz-weights", zipped([
        *NPZ_MEMBERS, (NPZ_MEMBERS[0][0].removesuffix(".npy"), b"a")]), ""),
    "an id that the tokenizers package would count up to": ("tokenizer", vocabulary(0, vocab={"\n": 0, "<unk>": 2**31}),
                                           "has a token of id 2147483648"),
    "an unk_token that is not in the vocabulary": ("tokenizer", vocabulary(1, unk_token="x"), ""),
    "a rank beyond int64": ("adapter", at("adapter", "r", new=10**30), "r is 1000000"),
    "a rank of true": ("adapter", at("adapter", "r", new=True), "not a LoRA adapter"),
    "a scale that is not finite": ("adapter", at("adapter", "lora_alpha", new=float("inf")), "lora_alpha is inf"),
    "a state of other parameters": ("run-state", joined(b'{"__metadata__":%s}' % json.dumps(
        json.loads(split(READERS["run-state"].seeds[0])[0])["__metadata__"]).encode(), b""), "is missing, or not as"),
    "a state of a size that no tensor has": (
        "run-state", joined(b'{"a":{"dtype":"F32","shape":[0,9223372036854775808],"data_offsets":[0,0]}}', b""),
        "not the state of a run"),
    "a state of a list": ("run-state", joined(b'{"__metadata__":{"job":"[]"}}', b""), "not the state of a run"),
    "a log that is not text": ("run-log", b"\xff\n", "not the log of a run"),
    "a log of numbers": ("run-log", b'{"step": 1, "loss": 1}\n7\n', ":2: step, loss or valid is no number"),
    "a deeply nested log": ("run-log", b"[" * 10**5 + b"\n", "not the log of a run"),
    "a long header, compressed": (
        "npz", compressed(b"\x93NUMPY\2\0" + struct.pack("<I", len(LONG)) + LONG), "array header"),
    "zeros, compressed": ("npz", compressed(NPY + LONG), "expands to more than 100 times its size"),
    "an array longer than its member": ("npz", zipped([("a.npy", NPY + bytes(64))]), "is shorter than its header says"),
    "a header that is too large": ("safetensors", struct.pack("<Q", 2**24) + b"{" + b" " * 2**24, "its header has"),
    "a config of megabytes": ("config", b"[" + b"[]," * 2**21 + b"0]", "bytes, expected at most 4,194,304"),
    "67 million patches": ("config", at("config", "vision_config", new=json.loads(READERS["config"].seeds[0])[
        "vision_config"] | {"image_size": 4096, "patch_size": 1}), "make 16777216 patches, expected 1 to 16384"),
    "a patch larger than the picture": ("config", at("config", "vision_config", "patch_size", new=9), "make 0 patches"),
    "an image of 67 million pixels": ("siglip-config", at("siglip-config", "vision_config", "image_size", new=2**13),
                              "image_size is 8192, expected a whole number from 1 to 4096"),
    "compiled-code information that is a number": ("made-for", b"7", "no code there"),
    "compiled-code information that is deeply nested": ("made-for", b"[" * 10**5, "no code there"),
    **{case: ("tokenizer", content, "its rules make a text up to") for case, content in GROWING.items()},
}  # fmt: skip


@pytest.mark.parametrize("case", REGRESSIONS)
def test_inputs_that_broke_a_reader_are_read_or_refused(case, folders):
    name, content, expected = REGRESSIONS[case]
    message = read(name, folders, content)
    assert expected in message
    assert expected or not message


def test_no_program_is_started_to_read_a_picture(folders, monkeypatch):
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *arguments, **options: pytest.fail("it may never end"))
    assert "PostScript is a program" in read("picture", folders, picture_file("EPS", "RGB", 9, 9))


@pytest.mark.parametrize(
    "format_and_mode", ["GIF P", "PNG RGBA", "PNG I;16", "TIFF I", "TIFF F", "JPEG CMYK", "WEBP RGB"]
)
def test_a_picture_takes_at_most_16_bytes_a_pixel(format_and_mode, folders):
    """For the largest picture that Pillow opens, 89 million pixels, that is 1.4 GB; a small GIF may claim that size."""
    format, mode = format_and_mode.split(maxsplit=1)
    options = {"transparency": 0} if format == "GIF" else {}
    file = io.BytesIO()
    Image.new(mode, (1400, 1400)).save(file, format, **options)
    with bounded(memory=16 * 1400 * 1400 + 2**23):
        assert not attempt(READERS["picture"], file.getvalue(), folders["picture"])
