"""Four domains of real text that come with every Python: what a model of the bed can be good at by degrees.

    source   standard-library modules (code)
    docs     the language reference that `help()` shows (English)
    tables   the `encodings` modules (long, regular tables)
    names    names of Unicode characters, 64 code points to a document

Each is split 90/10 by document, the same way on every machine with the same Python: documents are ordered by
a hash of their names, those that fit into a tenth of the characters are held out, and each of these joins the
smaller of the two halves, calibration and test. Nothing held out is ever trained on. A document's text
changes with the Python version, so caches are keyed by it.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import sys
import sysconfig
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from weightsmith.errors import InputError, SystemFault, nearest
from weightsmith.testbed.alphabet import clean

Split = Literal["train", "calibration", "test"]
SPLITS: tuple[Split, ...] = ("train", "calibration", "test")
HELD_OUT = 0.1  # fraction of a domain's characters, at most

# Named ranges whose names are a code point in letters: tens of thousands of lines that differ by a number.
_NUMBERED = (
    "CJK UNIFIED IDEOGRAPH-",
    "CJK COMPATIBILITY IDEOGRAPH-",
    "HANGUL SYLLABLE ",
    "VARIATION SELECTOR-",
)


def documents(domain: str, split: Split) -> tuple[str, ...]:
    """The documents of one split of a domain, in a fixed order, in the bed's alphabet.

    Raises:
        InputError: no such domain or split; names the nearest.
        SystemFault: this Python was installed without the files that the domain is made of.
    """
    if domain not in _READERS:
        raise InputError(f"no domain `{domain}`{nearest(domain, _READERS)}; known: {', '.join(_READERS)}")
    if split not in SPLITS:
        raise InputError(f"no split `{split}`{nearest(split, SPLITS)}; known: {', '.join(SPLITS)}")
    return _split(domain)[split]


def text(domain: str, split: Split) -> str:
    """All documents of a split as one text, a blank line between them. Raises as `documents`."""
    return "\n\n".join(documents(domain, split))


def passages(domain: str, split: Split, characters: int) -> tuple[str, ...]:
    """About `characters` characters of a split: pieces of 1,000 at equal distances, so all of it is seen.

    Raises as `documents`; a split with fewer characters is returned whole.
    """
    whole, length = text(domain, split), 1000
    if len(whole) <= characters:
        return (whole,)
    count = max(1, characters // length)
    step = (len(whole) - length) // max(1, count - 1)
    return tuple(whole[i * step : i * step + min(length, characters)] for i in range(count))


@functools.cache
def _split(domain: str) -> dict[Split, tuple[str, ...]]:
    # One document per text: `help()` has the same page under several topics, and they must not part.
    name_of = {clean(body): name for name, body in reversed(_READERS[domain]().items())}
    files = {name: body for body, name in name_of.items()}
    total = sum(map(len, files.values()))
    if not total:
        raise SystemFault(f"testbed domain `{domain}`: this Python has none of the files it is made of")
    parts: dict[Split, list[str]] = {"train": [], "calibration": [], "test": []}
    size: dict[Split, int] = dict.fromkeys(parts, 0)
    for name in sorted(files, key=lambda name: hashlib.blake2b(f"{domain}/{name}".encode()).digest()):
        half: Split = "calibration" if size["calibration"] < size["test"] else "test"
        # The second condition keeps one long document from making a lopsided pair of halves.
        room = HELD_OUT * total - size["calibration"] - size["test"]
        fits = len(files[name]) <= min(room, HELD_OUT * total / 2 - size[half])
        part: Split = half if fits else "train"
        parts[part].append(files[name])
        size[part] += len(files[name])
    return {split: tuple(texts) for split, texts in parts.items()}


def _source() -> dict[str, str]:
    folder = Path(sysconfig.get_path("stdlib"))
    # `stdlib_module_names` leaves out what a distribution or an installer put beside the library.
    return {
        file.stem: file.read_text(encoding="utf-8")
        for file in sorted(folder.glob("*.py"))
        if file.stem in sys.stdlib_module_names
    }


def _docs() -> dict[str, str]:
    if importlib.util.find_spec("pydoc_data.topics") is None:
        return {}
    from pydoc_data.topics import topics

    return topics


def _tables() -> dict[str, str]:
    folder = Path(sysconfig.get_path("stdlib")) / "encodings"
    return {file.stem: file.read_text(encoding="utf-8") for file in sorted(folder.glob("*.py"))}


def _names() -> dict[str, str]:
    blocks: dict[str, list[str]] = {}
    for point in range(0x20000):  # the planes above hold numbered ideographs
        name = unicodedata.name(chr(point), "")
        if name and not name.startswith(_NUMBERED):
            blocks.setdefault(f"{point // 64:05x}", []).append(name)
    return {block: "\n".join(names) + "\n" for block, names in blocks.items()}


_READERS: dict[str, Callable[[], dict[str, str]]] = {
    "source": _source,
    "docs": _docs,
    "tables": _tables,
    "names": _names,
}
DOMAINS: tuple[str, ...] = tuple(_READERS)
