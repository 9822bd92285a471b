"""Paths of layers as people read them: many that differ in a number are one name."""

from __future__ import annotations

from collections.abc import Iterable


def pattern_of(path: str) -> str:
    """Return a path without its numbers: the same for layers at different depths.

    >>> pattern_of("layers.12.mlp.up_proj")
    'layers.#.mlp.up_proj'
    """
    return ".".join("#" if part.isdecimal() else part for part in path.split("."))


def joint_name(paths: Iterable[str]) -> str:
    """Return one name for paths of one pattern, with the numbers that stand in each place.

    >>> joint_name(["layers.0.q", "layers.1.q", "layers.2.q", "layers.4.q"])
    'layers.0-2,4.q'
    """
    columns = zip(*(path.split(".") for path in paths), strict=True)
    return ".".join(_spans(column) if column[0].isdecimal() else column[0] for column in columns)


def _spans(numbers: Iterable[str]) -> str:
    spans: list[list[int]] = []
    for number in sorted(set(map(int, numbers))):
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ",".join(f"{a}" if a == b else f"{a}-{b}" for a, b in spans)


def grouped_paths(paths: Iterable[str]) -> list[str]:
    """Return joint names, in the order of their first paths.

    >>> grouped_paths(["layers.0.q", "layers.0.k", "layers.1.q", "lm_head"])
    ['layers.0-1.q', 'layers.0.k', 'lm_head']
    """
    groups: dict[str, list[str]] = {}
    for path in paths:
        groups.setdefault(pattern_of(path), []).append(path)
    return [joint_name(group) for group in groups.values()]


def depth(path: str) -> list[int]:
    """Return the numbers in a path, by which layers are put in the order of the model.

    >>> sorted(["layers.10.q", "layers.2.q"], key=depth)
    ['layers.2.q', 'layers.10.q']
    """
    return [int(part) for part in path.split(".") if part.isdecimal()]
