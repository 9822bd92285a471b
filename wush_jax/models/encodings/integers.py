"""Whole numbers of few bits in words of 32: a dense stream of bits, the first number lowest."""

from __future__ import annotations

import numpy as np


def unpack(words: np.ndarray, bits: int, axis: int = -1) -> np.ndarray:
    """Return the numbers in int32 words along an axis, as uint8.

    Number i of b bits is in bits b i to b (i + 1) of the stream, over the borders of words.

    Args:
      words: int32.
      bits: of a number, 2, 3, 4 or 8.
      axis: along which words follow each other.

    >>> unpack(np.int32([[0x76543210]]), 4).tolist()
    [[0, 1, 2, 3, 4, 5, 6, 7]]
    """
    rows = np.ascontiguousarray(np.moveaxis(words, axis, -1)).astype("<i4", copy=False)
    octets = rows.view(np.uint8)
    if bits == 8:
        found = octets
    elif bits in (2, 4):
        parts = [(octets >> shift) & (2**bits - 1) for shift in range(0, 8, bits)]
        found = np.stack(parts, axis=-1).reshape(*octets.shape[:-1], -1)
    else:
        stream = np.unpackbits(octets, axis=-1, bitorder="little")
        count = stream.shape[-1] // bits
        groups = stream[..., : count * bits].reshape(*stream.shape[:-1], count, bits)
        found = np.packbits(groups, axis=-1, bitorder="little")[..., 0]
    return np.moveaxis(found, -1, axis)
