"""How many times longer the rules of a `tokenizer.json` can make a text: thirty that double a letter fill any memory.

The `tokenizers` package applies them to added tokens while it reads the file, so this is asked before.
"""

import base64
import json
import re
from math import prod
from typing import Any

MOST = 1000  # times: a text of some kilobytes then becomes some megabytes
# Gemma's file of 30 MB has two rules that replace something; only one with more is read twice, to ask it
RULE, TABLE = re.compile(r'"type"\s*:\s*"(?:Replace|ByteLevel|NFK?[CD])"'), "precompiled_charsmap"
LONG = re.compile(r'"content"\s*:\s*"(?:[^"\\]|\\.){33}')
ESCAPED = re.compile(r"\\u00[2-7]")  # a letter that needs no escape: a name in disguise

LARGEST = {"ByteLevel": 2, "NFC": 3, "NFD": 4, "NFKC": 11, "NFKD": 11}  # bytes for a byte


def of_file(text: str) -> int:
    """The factor by which the text of a `tokenizer.json` makes texts longer, at most; 1 where it is plainly small."""
    few = len(RULE.findall(text)) <= 2 and TABLE not in text
    if few and not LONG.search(text) and not ESCAPED.search(text):
        return 1
    raw = json.loads(text)
    return prod(of_rule(raw.get(part)) for part in ("normalizer", "pre_tokenizer", "decoder"))


def of_rule(rule: Any) -> int:
    """The factor of a rule, or of several after one another."""
    if not isinstance(rule, dict):
        return 1
    kind, inner = rule.get("type"), [part for value in rule.values() if isinstance(value, list) for part in value]
    if kind == "Sequence":
        return prod(map(of_rule, inner))
    if kind == "Replace":
        return of_replacement(rule.get("pattern"), _bytes(rule.get("content")))
    if kind == "Precompiled":
        return of_table(str(rule.get(TABLE)))
    return LARGEST.get(str(kind), 1)


def of_replacement(pattern: Any, content: int) -> int:
    """The factor of a text in place of another; a regular expression, or nothing, is found between letters too."""
    literal = _bytes(pattern.get("String")) if isinstance(pattern, dict) else 0
    return max(1, -(-content // literal)) if literal else 1 + content


def of_table(charsmap: str) -> int:
    """The factor of SentencePiece's table: the size of a trie, the trie, and all replacements, a zero after each."""
    try:
        table = base64.b64decode(charsmap)
    except ValueError:  # which the package will name
        return 1
    return max(map(len, table[4 + int.from_bytes(table[:4], "little") :].split(b"\0")), default=1)


def _bytes(text: Any) -> int:
    return len(text.encode(errors="surrogatepass")) if isinstance(text, str) else 0
