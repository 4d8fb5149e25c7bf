"""The tokens that the files beside a `tokenizer.json` define, which transformers adds when it reads a folder.

tokenizer_config.json lists them with their properties. Older folders have special_tokens_map.json and added_tokens.json
instead. Source: transformers `tokenization_utils_base.py` and `tokenization_utils_tokenizers.py`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from pgfunc.errors import CheckpointError
from pgfunc.files.jsonfile import read_json

CONFIG, MAP, ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
NAMED = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
PROPERTIES = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")


def declared(folder: Path, present: Mapping[int, AddedToken]) -> list[AddedToken]:
    """What to add to a tokenizer that has the tokens `present`: those that it lacks, or has with other properties.

    Raises CheckpointError for a file that is not of that form.
    """
    config = object_in(folder / CONFIG)
    try:
        if "added_tokens_decoder" in config:
            listed = {int(id): as_token(token) for id, token in config["added_tokens_decoder"].items()}
            special = special_tokens(config)
        else:
            special = special_tokens(config | object_in(folder / MAP))
            names = {token.content for token in special}
            old = {id: AddedToken(name, special=name in names) for name, id in object_in(folder / ADDED).items()}
            listed = old | dict(present)
        ordered = [listed[id] for id in sorted(listed)]
    except (TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{folder / CONFIG}, or {MAP} or {ADDED} beside it: {error}") from error
    known = {repr(token) for token in present.values()}
    new = [token for token in ordered if repr(token) not in known]
    names = {token.content for token in (*present.values(), *new)}
    return new + [token for token in special if token.content not in names]


def special_tokens(config: Mapping[str, Any]) -> list[AddedToken]:
    """The tokens that have a role, such as `bos_token`, and those that are only special."""
    own = [name for name, value in config.items() if name.endswith("_token") and isinstance(value, str)]
    more = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    values = [config.get(name) for name in (*NAMED, *own)]
    values += more.values() if isinstance(more, dict) else more
    return [as_token(value, special=True) for value in values if value]


def as_token(value: Any, special: bool = False) -> AddedToken:
    """A token that is given by its text, or with its properties."""
    if isinstance(value, str):
        return AddedToken(value, special=special)
    return AddedToken(**{"special": special, **{name: value[name] for name in PROPERTIES if name in value}})


def object_in(path: Path) -> dict[str, Any]:
    """The object in a JSON file; an empty one where there is no file."""
    return read_json(path) if path.exists() else {}
