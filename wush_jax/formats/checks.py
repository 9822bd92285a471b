"""What the numbers that come in must be, said at the call."""

from __future__ import annotations

from numbers import Integral
from typing import Any

import jax.numpy as jnp


def refuse_tensors(**arrays: Any) -> None:
    """Raise ValueError for arrays of another framework, with what makes numpy arrays of them.

    >>> refuse_tensors(x=None, w=1.0)
    """
    foreign = [name for name, x in arrays.items() if type(x).__module__.split(".")[0] == "torch"]
    if foreign:
        remedy = ", ".join(f"{name}.detach().float().numpy()" for name in foreign)
        raise ValueError(
            f"{' and '.join(foreign)}: a torch tensor; pass a numpy array, {remedy} (from a GPU "
            "with .cpu() before .numpy())"
        )


def check_arrays(**arrays: Any) -> None:
    """Raise ValueError unless all are arrays of real numbers, of numpy or JAX, traced or not.

    >>> check_arrays(x=jnp.ones(2))
    >>> check_arrays(x=[1.0])
    Traceback (most recent call last):
    ...
    ValueError: x is a list; give an array of real numbers, such as numpy.float32(x)
    """
    refuse_tensors(**arrays)
    for name, x in arrays.items():
        if not (hasattr(x, "dtype") and hasattr(x, "ndim")):
            kind = type(x).__name__
            raise ValueError(
                f"{name} is a {kind}; give an array of real numbers, such as numpy.float32({name})"
            )
        real = jnp.issubdtype(x.dtype, jnp.number) or x.dtype == bool
        if not real or jnp.issubdtype(x.dtype, jnp.complexfloating):
            raise ValueError(f"{name} has dtype {x.dtype}; give an array of real numbers")


def check_kind(kind: type, remedy: str, **values: Any) -> None:
    """Raise ValueError unless all values are of a class.

    >>> check_kind(str, "text", name=3)
    Traceback (most recent call last):
    ...
    ValueError: name is a int, 3; give text
    """
    for name, value in values.items():
        if not isinstance(value, kind):
            raise ValueError(f"{name} is a {type(value).__name__}, {value!r:.60}; give {remedy}")


def check_whole(**values: Any) -> None:
    """Raise ValueError unless all values are whole numbers, and no truth values.

    >>> check_whole(rows="8")
    Traceback (most recent call last):
    ...
    ValueError: rows='8'; give a whole number
    """
    for name, value in values.items():
        if not isinstance(value, Integral) or isinstance(value, bool):
            raise ValueError(f"{name}={value!r:.60}; give a whole number")
