"""The bed's alphabet: 96 characters and 4 special tokens, one id each.

Other characters are dropped, by `clean` here and by the tokenizer file alike, so a text and its token ids
have the same length. `encode` is the table look-up that the tokenizer computes, without loading one.
"""

from __future__ import annotations

import numpy as np

CHARACTERS = "\n" + "".join(map(chr, range(32, 127)))
SPECIAL = ("<pad>", "<eos>", "<unk>", "<mask>")
VOCABULARY: dict[str, int] = {token: id for id, token in enumerate((*CHARACTERS, *SPECIAL))}
PAD, EOS = VOCABULARY["<pad>"], VOCABULARY["<eos>"]

_KEPT = CHARACTERS.encode("ascii")
_DROPPED = bytes(set(range(256)) - set(_KEPT))
_ID_OF_BYTE = np.zeros(256, np.uint8)
_ID_OF_BYTE[np.frombuffer(_KEPT, np.uint8)] = np.arange(len(_KEPT), dtype=np.uint8)


def clean(text: str) -> str:
    """`text` without the characters that the alphabet lacks (carriage returns, tabs, accents, ...)."""
    return text.encode("ascii", "ignore").translate(None, _DROPPED).decode("ascii")


def encode(text: str) -> np.ndarray:
    """Token ids of a text, as uint8; characters outside the alphabet are dropped."""
    return _ID_OF_BYTE[np.frombuffer(clean(text).encode("ascii"), np.uint8)]
