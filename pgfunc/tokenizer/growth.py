"""An upper bound on how many times longer the rules of a `tokenizer.json` make a text.

Thirty rules that each double a letter would fill any memory. The `tokenizers` package applies the rules to added tokens
while it reads a file, so the bound is computed before that.
"""

import base64
import json
import re
from math import prod
from typing import Any

MAX_FACTOR = 1000  # a text of some kilobytes then becomes some megabytes
# Gemma's file of 30 MB has two rules that replace text; only a file with more is parsed here, and so read twice
RULE, TABLE = re.compile(r'"type"\s*:\s*"(?:Replace|ByteLevel|NFK?[CD])"'), "precompiled_charsmap"
LONG = re.compile(r'"content"\s*:\s*"(?:[^"\\]|\\.){33}')
ESCAPED = re.compile(r"\\u00[2-7]")  # an escape for a letter that needs none: it can hide the name of a rule

BYTES_PER_BYTE = {"ByteLevel": 2, "NFC": 3, "NFD": 4, "NFKC": 11, "NFKD": 11}


def factor(text: str) -> int:
    """The factor, at most, by which the rules in the text of a `tokenizer.json` make a text longer.

    Returns 1 without parsing if the file has too few rules for a large factor.
    """
    few = len(RULE.findall(text)) <= 2 and TABLE not in text
    if few and not LONG.search(text) and not ESCAPED.search(text):
        return 1
    raw = json.loads(text)
    return prod(rule_factor(raw.get(part)) for part in ("normalizer", "pre_tokenizer", "decoder"))


def rule_factor(rule: Any) -> int:
    """The factor of one rule, or of a sequence of rules."""
    if not isinstance(rule, dict):
        return 1
    kind, inner = rule.get("type"), [part for value in rule.values() if isinstance(value, list) for part in value]
    if kind == "Sequence":
        return prod(map(rule_factor, inner))
    if kind == "Replace":
        return replacement_factor(rule.get("pattern"), _bytes(rule.get("content")))
    if kind == "Precompiled":
        return table_factor(str(rule.get(TABLE)))
    return BYTES_PER_BYTE.get(str(kind), 1)


def replacement_factor(pattern: Any, content: int) -> int:
    """The factor of replacing a pattern by `content` bytes. Regular expressions, and "", may match between letters."""
    literal = _bytes(pattern.get("String")) if isinstance(pattern, dict) else 0
    return max(1, -(-content // literal)) if literal else 1 + content


def table_factor(charsmap: str) -> int:
    """The factor of SentencePiece's table: the length of its longest replacement.

    The table is the size of a trie, the trie, and all replacements, each followed by a zero byte.
    """
    try:
        table = base64.b64decode(charsmap)
    except ValueError:  # the package reports it when it reads the file
        return 1
    return max(map(len, table[4 + int.from_bytes(table[:4], "little") :].split(b"\0")), default=1)


def _bytes(text: Any) -> int:
    return len(text.encode(errors="surrogatepass")) if isinstance(text, str) else 0
