"""The tokens that other files in the folder of a `tokenizer.json` define. transformers adds them to the tokenizer.

`tokenizer_config.json` lists them with their properties. Older folders have `special_tokens_map.json` and
`added_tokens.json` instead. Source: transformers `tokenization_utils_base.py` and `tokenization_utils_tokenizers.py`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from pgfunc.errors import CheckpointError
from pgfunc.files.jsonfile import read_json

CONFIG, MAP, ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
ROLES = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
PROPERTIES = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")


def tokens_to_add(folder: Path, present: Mapping[int, AddedToken]) -> list[AddedToken]:
    """The tokens that a folder defines and a tokenizer lacks, or has with other properties.

    present: the tokens that the tokenizer has, by id. Raises CheckpointError for a file with another structure.
    """
    config = object_in(folder / CONFIG)
    try:
        if "added_tokens_decoder" in config:
            listed = {int(id): as_token(token) for id, token in config["added_tokens_decoder"].items()}
            special = special_tokens(config)
        else:
            special = special_tokens(config | object_in(folder / MAP))
            names = {token.content for token in special}
            added = {id: AddedToken(name, special=name in names) for name, id in object_in(folder / ADDED).items()}
            listed = added | dict(present)
        ordered = [listed[id] for id in sorted(listed)]
    except (TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{folder / CONFIG}, or {MAP} or {ADDED} beside it: {error}") from error
    known = {repr(token) for token in present.values()}
    new = [token for token in ordered if repr(token) not in known]
    names = {token.content for token in (*present.values(), *new)}
    return new + [token for token in special if token.content not in names]


def special_tokens(config: Mapping[str, Any]) -> list[AddedToken]:
    """The tokens that have a role, such as `bos_token`, and the other special tokens."""
    roles = [name for name, value in config.items() if name.endswith("_token") and isinstance(value, str)]
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    values = [config.get(name) for name in (*ROLES, *roles)]
    values += extra.values() if isinstance(extra, dict) else extra
    return [as_token(value, special=True) for value in values if value]


def as_token(value: Any, special: bool = False) -> AddedToken:
    """The token that a JSON value describes: its text alone, or an object with its properties."""
    if isinstance(value, str):
        return AddedToken(value, special=special)
    return AddedToken(**{"special": special, **{name: value[name] for name in PROPERTIES if name in value}})


def object_in(path: Path) -> dict[str, Any]:
    """The object in a JSON file, or an empty dict if there is no file."""
    return read_json(path) if path.exists() else {}
