"""Random directions that are computed again whenever they are needed, from what they are for.

Every number is a function of the seed, the parameter's name, the step and its place. Nothing is stored, no
generator has a state to save, and neither the order of parameters nor the user's own random numbers matter.

short vectors   Philox4x32-10 over a counter (Salmon et al., SC 2011), made Gaussian by Box and Muller, for
                all parameters of a step in one go: the same on every device.
whole tensors   torch's generator on the tensor's own device, seeded by a hash: CPU and GPU draw others.
                Torch takes 32 bits of a seed on a CPU, so in a long run two tensors of two steps may get the
                same numbers, which harms nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

_LOW = np.uint64(0xFFFFFFFF)
_HIGH = np.uint64(32)
_MULTIPLIERS = np.array([0xD2511F53, 0xCD9E8D57], dtype=np.uint64)[:, None]
_WEYL = np.array([0x9E3779B9, 0xBB67AE85], dtype=np.uint64)[:, None]


def hashed(*parts: object) -> int:
    """64 bits that stand for `parts`."""
    words = "\0".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(words, digest_size=8).digest(), "little")


def generator(device: torch.device, *parts: object) -> torch.Generator:
    """A generator on `device` that begins where `parts` say."""
    made = torch.Generator(device)
    made.manual_seed(hashed(*parts))
    return made


def philox(counter: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Philox4x32-10: (4, N) words of 32 bits from counters (4, N) and keys (2, N), all as uint64."""
    left, right = counter[0::2].copy(), counter[1::2].copy()  # words 0 and 2, words 1 and 3
    key = key.copy()
    for number in range(10):
        if number:
            key = (key + _WEYL) & _LOW
        product = left * _MULTIPLIERS
        # New words 0 and 2: the high half of the other product, the odd word, the key.
        left = (product[::-1] >> _HIGH) ^ right ^ key
        right = (product & _LOW)[::-1]
    return np.stack([left[0], right[0], left[1], right[1]])


class ShortNormals:
    """Gaussian numbers for a list of vectors, in any step.

    Args:
        names: One for each vector.
        sizes: Length of each.
        seed: The run's.
    """

    def __init__(self, names: Sequence[str], sizes: Sequence[int], seed: int) -> None:
        blocks = [-(-size // 4) for size in sizes]
        keys = np.array([hashed("vector", seed, name) for name in names], dtype=np.uint64)
        spread = np.repeat(keys, blocks)
        self._key = np.stack([spread & _LOW, spread >> _HIGH])
        self._place = np.concatenate([np.arange(count, dtype=np.uint64) for count in blocks] or [keys])
        starts = 4 * np.cumsum([0, *blocks])[:-1]
        wanted = [np.arange(start, start + size) for start, size in zip(starts, sizes, strict=True)]
        self._wanted = np.concatenate(wanted) if wanted else np.zeros(0, dtype=np.int64)
        self._sizes = list(sizes)

    def __call__(self, step: int) -> list[Tensor]:
        """The vectors of a step, float32 on the CPU."""
        counter = np.zeros((4, len(self._place)), dtype=np.uint64)
        counter[0] = self._place
        counter[1] = np.uint64(step) & _LOW
        counter[2] = np.uint64(step) >> _HIGH
        words = philox(counter, self._key).astype(np.float64)
        radius = np.sqrt(-2.0 * np.log((words[0::2] + 1.0) / 2.0**32))
        angle = words[1::2] * (2.0 * np.pi / 2.0**32)
        pairs = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=-1)  # (2, N, 2)
        numbers = pairs.transpose(1, 0, 2).reshape(-1)[self._wanted].astype(np.float32)
        return list(torch.from_numpy(numbers).split(self._sizes))


class StepVectors:
    """Short vectors of a step for all matrices, drawn together and brought to their devices together.

    Args:
        names: One for each matrix.
        sizes: Length of each vector.
        devices: Where each is wanted.
        seed: The run's.
    """

    def __init__(
        self, names: Sequence[str], sizes: Sequence[int], devices: Sequence[torch.device], seed: int
    ) -> None:
        self._draw = ShortNormals(names, sizes, seed)
        self._sizes, self._devices = list(sizes), list(devices)
        self._step = -1
        self._vectors: list[Tensor] = []

    def of(self, place: int) -> Callable[[int], Tensor]:
        """The vector of one matrix, for any step."""
        return lambda step: self._at(step)[place]

    def _at(self, step: int) -> list[Tensor]:
        if step != self._step:
            vectors = self._draw(step)
            if any(device.type != "cpu" for device in self._devices):
                flat = torch.cat(vectors)
                moved = {device: flat.to(device).split(self._sizes) for device in set(self._devices)}
                vectors = [moved[device][place] for place, device in enumerate(self._devices)]
            self._step, self._vectors = step, vectors
        return self._vectors
