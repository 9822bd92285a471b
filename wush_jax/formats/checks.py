"""What the numbers that come in must be, said at the call."""

from __future__ import annotations

import os
from collections.abc import Sequence
from numbers import Integral, Real
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


def check_kind(kind: Any, remedy: str, **values: Any) -> None:
    """Raise ValueError unless all values are of a class.

    >>> check_kind(str, "text", name=3)
    Traceback (most recent call last):
    ...
    ValueError: name is a int, 3; give text
    """
    for name, value in values.items():
        if not isinstance(value, kind):
            raise ValueError(f"{name} is a {type(value).__name__}, {value!r:.60}; give {remedy}")


def check_number(**values: Any) -> None:
    """Raise ValueError unless all values are real numbers of Python or numpy, no truth values.

    >>> check_number(damping=None)
    Traceback (most recent call last):
    ...
    ValueError: damping=None; give a number
    """
    for name, value in values.items():
        if not isinstance(value, Real) or isinstance(value, bool):
            raise ValueError(f"{name}={value!r:.60}; give a number")


def check_size(**values: Any) -> None:
    """Raise ValueError unless all values are whole numbers above zero.

    >>> check_size(d=0)
    Traceback (most recent call last):
    ...
    ValueError: d=0; give a whole number, at least 1
    """
    for name, value in values.items():
        if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name}={value!r:.60}; give a whole number, at least 1")


def check_choice(choices: Sequence[str], **values: Any) -> None:
    """Raise ValueError unless all values are among the choices.

    >>> check_choice(("rtn", "gptq"), solver="awq")
    Traceback (most recent call last):
    ...
    ValueError: solver='awq' is unknown; choose one of rtn, gptq
    """
    for name, value in values.items():
        if not isinstance(value, str) or value not in choices:
            told = ", ".join(choices)
            raise ValueError(f"{name}={value!r:.60} is unknown; choose one of {told}")


def check_dtype(**values: Any) -> None:
    """Raise ValueError unless all values are types of floating-point numbers.

    >>> check_dtype(dtype=jnp.bfloat16)
    >>> check_dtype(dtype="x")
    Traceback (most recent call last):
    ...
    ValueError: dtype='x' is no type of floating-point numbers; give jnp.float32 or the like
    """
    for name, value in values.items():
        try:
            known = value is not None and jnp.issubdtype(jnp.dtype(value), jnp.floating)
        except (TypeError, ValueError):
            known = False
        if not known:
            raise ValueError(
                f"{name}={value!r:.60} is no type of floating-point numbers; give jnp.float32 or "
                "the like"
            )


def check_path(**values: Any) -> None:
    """Raise ValueError unless all values are paths, or text.

    >>> check_path(path=b"model")
    Traceback (most recent call last):
    ...
    ValueError: path is a bytes, b'model'; give a path, as text or pathlib.Path
    """
    check_kind((str, os.PathLike), "a path, as text or pathlib.Path", **values)


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
