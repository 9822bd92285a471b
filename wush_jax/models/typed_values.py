"""Values of a config, typed: everything that is wrong with them is found before any is used."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

LARGEST = 2**31  # of any size


class TypedValues:
    """Named values with defaults for missing ones; what is wrong is noted, and told at the end.

    Args:
        given: what the file holds.
        defaults: of the keys that may be missing.
        said: what is put before names where they are told.

    Attributes:
        faults: what no reader could make sense of.
        lacking: what asks for mathematics that we do not have.
        unknown: keys whose values are no good; what was returned for them means nothing.

    >>> values = TypedValues({"heads": 0, "act": "gelu"}, {"bias": False})
    >>> values.size("heads"), values.flag("bias"), values.need("act", "silu")
    (1, False, None)
    >>> values.check()
    Traceback (most recent call last):
    ValueError: heads = 0, expected a positive whole number; act = 'gelu' is not supported: ...
    """

    def __init__(self, given: Mapping[str, Any], defaults: Mapping[str, Any], said: str = ""):
        self.given, self.defaults, self.said = dict(given), dict(defaults), said
        self.faults: list[str] = []
        self.lacking: list[str] = []
        self.unknown: set[str] = set()

    @property
    def faulty(self) -> bool:
        """Whether anything was noted."""
        return bool(self.faults or self.lacking)

    def size(self, name: str, *, optional: bool = False, limit: int = LARGEST) -> Any:
        """Return a positive whole number below a limit; 1 where it is none."""

        def good(value: Any) -> bool:
            return type(value) is int and 0 < value < limit

        wanted = "a positive whole number" + ("" if limit == LARGEST else f" below {limit}")
        return self._take(name, good, wanted, 1, optional)

    def number(self, name: str, *, optional: bool = False, zero: bool = False) -> Any:
        """Return a positive finite number, or zero where that is allowed; 1 where it is none."""

        def good(value: Any) -> bool:
            if type(value) not in (int, float) or abs(value) > 1e30:
                return False
            return math.isfinite(value) and (value > 0 or (zero and value == 0))

        value = self._take(name, good, "a positive number", 1.0, optional)
        return value if value is None else float(value)

    def flag(self, name: str) -> bool:
        """Return a boolean."""
        return self._take(name, lambda v: type(v) is bool, "true or false", False, False)

    def text(self, name: str) -> str:
        """Return a string."""
        return self._take(name, lambda v: type(v) is str, "a name", "", False)

    def table(self, name: str) -> Mapping[str, Any]:
        """Return an object, empty where there is none."""
        return self._take(name, lambda v: isinstance(v, Mapping), "an object", {}, True) or {}

    def names(self, name: str) -> tuple[str, ...] | None:
        """Return a list of strings, or None where there is none."""

        def good(value: Any) -> bool:
            return isinstance(value, (list, tuple)) and all(type(x) is str for x in value)

        found = self._take(name, good, "a list of names", (), True)
        return None if found is None else tuple(found)

    def numbers(self, name: str) -> tuple[int, ...]:
        """Return a list of whole numbers, none of them negative; empty where there is none."""

        def good(value: Any) -> bool:
            return isinstance(value, (list, tuple)) and all(
                type(x) is int and x >= 0 for x in value
            )

        return tuple(self._take(name, good, "a list of whole numbers", (), True) or ())

    def need(self, name: str, *allowed: Any) -> None:
        """Note it where a value that is there is none of those that we can compute."""
        value = self.given.get(name, self.defaults.get(name, allowed[0]))
        if not any(type(value) is type(good) and value == good for good in allowed):
            self.lack(f"{self.said}{name} = {_short(value)}", "is not supported")

    def lack(self, what: str, why: str) -> None:
        """Note mathematics that we do not have."""
        self.lacking.append(f"{what} {why}")

    def merge(self, other: TypedValues) -> None:
        """Take over what was noted elsewhere."""
        self.faults += other.faults
        self.lacking += other.lacking
        self.unknown |= other.unknown

    def check(self) -> None:
        """Tell everything that was noted.

        Raises:
            ValueError: if there are faults.
            NotImplementedError: if there is nothing but mathematics that we do not have.
        """
        text = "; ".join(dict.fromkeys(self.faults + self.lacking))
        if self.faults:
            raise ValueError(text + ": mend the file or fetch it again")
        if self.lacking:
            raise NotImplementedError(f"{text}: docs/quantize-a-model.md lists what is supported")

    def _take(self, name: str, good: Any, wanted: str, otherwise: Any, optional: bool) -> Any:
        missing = name not in self.given and name not in self.defaults
        value = self.given.get(name, self.defaults.get(name))
        if optional and value is None:
            return None
        if missing or not good(value):
            found = "is missing" if missing else f"= {_short(value)}"
            self.faults.append(f"{self.said}{name} {found}, expected {wanted}")
            self.unknown.add(name)
            return otherwise
        return value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
