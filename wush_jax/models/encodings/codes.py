"""Weights as other libraries store them: codes with scales, zero points and an order of inputs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from wush_jax.storage.json_file import CONFIG
from wush_jax.storage.tensor_folder import TensorFolder


def raw(folder: TensorFolder, name: str) -> np.ndarray:
    """Return a tensor whose header was checked before."""
    entry = folder.entries[name]
    return folder.read(name, [entry.dtype], [entry.shape])


@dataclass(frozen=True)
class Codes:
    """A weight (N, K), or a stack (E, N, K), as it is stored: ``w = (code - zero) * scale``.

    Attributes:
      codes: (..., N, K) whole numbers, or 8-bit floats.
      scales: (..., R, G), of blocks of ``block`` rows and columns; the last ones may be smaller.
      block: rows and columns that share a scale.
      zeros: as ``scales``, subtracted from codes; None for none.
      columns: (K,) the place among G of each column's scale; None where blocks are in order.
    """

    codes: np.ndarray
    scales: np.ndarray
    block: tuple[int, int]
    zeros: np.ndarray | None = None
    columns: np.ndarray | None = None

    def values(self) -> np.ndarray:
        """Return the weight, float32: codes and zeros are exact in it, the product rounds once.

        >>> Codes(np.int8([[1, 2], [3, 4]]), np.float16([[0.5], [2]]), (1, 2)).values().tolist()
        [[0.5, 1.0], [6.0, 8.0]]
        """
        return self.differences() * self._each(self.scales)

    def differences(self) -> np.ndarray:
        """Return ``code - zero``, float32.

        >>> Codes(np.int8([[1, 2]]), np.float16([[0.5]]), (1, 2), np.int8([[1]])).differences()
        array([[0., 1.]], dtype=float32)
        """
        values = self.codes.astype(np.float32)
        return values if self.zeros is None else values - self._each(self.zeros)

    def _each(self, blocks: np.ndarray) -> np.ndarray:
        """One value a block as (..., N, K) or (..., 1, K), float32."""
        n, k = self.codes.shape[-2:]
        columns = np.arange(k) // self.block[1] if self.columns is None else self.columns
        wide = blocks.astype(np.float32)[..., columns]
        return wide if self.block[0] >= n else wide[..., np.arange(n) // self.block[0], :]


def group_order(
    folder: TensorFolder, name: str, group: int, *, reordered: bool, remedy: str
) -> np.ndarray | None:
    """Return the group of each input from a tensor of groups; None where they are in order.

    Args:
      folder: where it is.
      name: of the tensor.
      group: inputs of a group.
      reordered: whether the config says that inputs have an order of their own.
      remedy: what to write into the config where it does not.

    Raises:
      ValueError: an order that the config does not know of, or groups that do not exist.
    """
    found = raw(folder, name)
    in_order = np.arange(len(found)) // group
    if (found == in_order).all():
        return None
    if not reordered:
        raise ValueError(
            f"{folder.path}: {name!r} has an order of its own, of which {CONFIG} says nothing; "
            f"write {remedy} into quantization_config"
        )
    if found.min() < 0 or found.max() > in_order[-1]:
        raise ValueError(
            f"{folder.path}: {name!r} names groups beyond 0 to {in_order[-1]}; fetch it again"
        )
    return found


def centred(
    folder: TensorFolder,
    name: str,
    codes: np.ndarray,
    zeros: np.ndarray,
    half: int,
    said: tuple[str, str],
) -> np.ndarray:
    """Return codes from 0 up as signed ones, of a config that says that all zeros are the middle.

    Args:
      folder: for the message.
      name: of the tensor of zeros.
      codes: from 0 up.
      zeros: of the groups.
      half: the middle.
      said: the field and its value, and what to write in its place.

    Raises:
      ValueError: other zeros.
    """
    if (zeros != half).any():
        field, remedy = said
        raise ValueError(
            f"{folder.path}: {field}, but {name!r} has zero points other than {half}; {remedy}"
        )
    return codes.astype(np.int16) - half
