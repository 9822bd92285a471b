"""``transform_config`` of compressed-tensors: which rotation inputs go through, by name only.

A scheme of type "hadamard" means Sylvester's matrix / sqrt(d), d its ``head_dim``, applied to each
block of d inputs. Schemes that act on weights alone are in the weights already.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from wush_jax.transforms.linalg import hadamard_numpy

LARGEST = 1024
NAMES = "a Hadamard matrix of a power of two for all blocks"


def matrix(d: int) -> np.ndarray:
    """Return the (d, d) matrix that a scheme means, float32."""
    return np.asarray(hadamard_numpy(d), np.float32)


def check_size(d: int) -> None:
    """Raise NotImplementedError for a size that no block has here."""
    if d < 1 or d & (d - 1) or d > LARGEST:
        raise NotImplementedError(f"a Hadamard transform of size {d}; only powers of two to 1024")


def block_of(name: str, transform: Any, layout: str) -> tuple[int | None, float]:
    """Return the block size d of a layer's transform and its ratio to the exact matrix.

    Args:
      name: of the layer.
      transform: T_X, (d, d) or (K/d, d, d), or None.
      layout: for the message.

    Raises:
      ValueError: another transform than the identity or Sylvester's, in all blocks.

    >>> block_of("up", matrix(4), "c"), block_of("up", None, "c")
    ((4, 1.0), (None, 1.0))
    """
    if transform is None:
        return None, 1.0
    values = np.asarray(transform).astype(np.float32)
    d = values.shape[-1]
    if 1 < d <= LARGEST and d & (d - 1) == 0:
        exact = matrix(d)
        ratio = values.reshape(-1)[0] / exact[0, 0]
        if (values == values.reshape(-1)[0] * np.sign(exact)).all() and abs(ratio - 1) < 2**-8:
            return d, float(ratio)
    raise ValueError(
        f"layout={layout!r} has no room for the transform of {name}: it knows the identity and "
        f"{NAMES}; keep layout='wush' or 'fp_quant', or quantize with transform='hadamard'"
    )


def to_json(block: int | None, ignored: list[str]) -> dict[str, Any]:
    """Return the ``transform_config`` of one Hadamard matrix in front of all layers."""
    if block is None:
        return {}
    common = {"targets": ["Linear"], "ignore": ignored}
    apply = [
        {**common, "location": "input", "inverse": False},
        {**common, "location": "weight_input", "inverse": True},
    ]
    scheme = {
        "type": "hadamard",
        "apply": apply,
        "randomize": False,
        "requires_grad": False,
        "head_dim": block,
        "precision": "torch.float32",
    }
    return {"config_groups": {"input": scheme}}


def block_from(config: Any) -> int | None:
    """Return the block size in a ``transform_config``: None without one, 0 for all of K.

    Raises:
      ValueError: a config of another form.
      NotImplementedError: a transform at run time that is not one Hadamard matrix of all inputs.

    >>> block_from(to_json(32, [])), block_from({})
    (32, None)
    """
    if not config:
        return None
    try:
        online = [
            scheme
            for scheme in config["config_groups"].values()
            if {a["location"] for a in scheme["apply"]} - {"weight_input", "weight_output"}
        ]
        places = [(a["location"], a["targets"]) for s in online for a in s["apply"]]
        simple = len(online) <= 1 and not any(
            s["type"] != "hadamard" or s.get("randomize") for s in online
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"transform_config is damaged ({error!r}); fetch it again") from error
    wanted = [("input", ["Linear"]), ("weight_input", ["Linear"])]
    if not simple or any(place not in wanted for place in places):
        raise NotImplementedError(f"transform_config={config!r}"[:300] + f"; only {NAMES}")
    if not online:
        return None
    d = online[0].get("head_dim")
    if d is not None and (type(d) is not int or not 0 < d <= LARGEST or math.log2(d) % 1):
        raise NotImplementedError(f"head_dim={str(d)[:40]}; only {NAMES}, up to {LARGEST}")
    return 0 if d is None else d
