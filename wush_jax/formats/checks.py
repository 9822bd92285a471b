"""What the numbers that come in must be, said at the call."""

from __future__ import annotations

from typing import Any


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
