"""``transform_config`` of compressed-tensors: which matrix each layer's inputs go through.

A scheme has a name, a type, a size d (``head_dim``) and the layers that it is for. Of a layer that
a scheme ``s`` is for, the files hold ``<layer>.s_input.weight`` (d, d) = sqrt(d) T_X^T; readers
divide by sqrt(d) and multiply each block of d inputs with it from the right. Types: "hadamard",
where the matrix is Sylvester's (entries of 1 and -1; some readers compute it, others take it from
the files), and "random-hadamard", where any matrix stands in the files. (Of "random-matrix"
compressed-tensors 0.20 and vLLM disagree about sqrt(d): it is refused.) Schemes that act on
weights alone are in the weights already.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from wush_jax.checkpoints.layouts import layout as shared
from wush_jax.checkpoints.layouts.faults import Faults
from wush_jax.storage.tensor_folder import TensorFolder
from wush_jax.transforms.linalg import hadamard_numpy

LARGEST = 1024
NAMES = "a Hadamard matrix of a power of two, or any one matrix in the files, for all blocks"
TYPES = ("hadamard", "random-hadamard")


@dataclass(frozen=True)
class Scheme:
    """One transform of inputs at run time.

    Attributes:
      name: in the config, and before ``_input.weight`` in the files.
      kind: one of `TYPES`.
      block: d; None for all of K.
      targets: names of layers; empty for all quantized layers but the ignored.
      ignored: names of layers that are left out.
    """

    name: str
    kind: str
    block: int | None
    targets: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()

    def covers(self, layer: str) -> bool:
        """Whether a layer's inputs go through it."""
        return (not self.targets or layer in self.targets) and layer not in self.ignored

    def size(self, k: int) -> int:
        """Return d for K inputs.

        Raises:
          NotImplementedError: a size that no block has here.
        """
        d = k if self.block is None else self.block
        if d < 1 or d > LARGEST or k % d or (self.kind == "hadamard" and d & (d - 1)):
            raise NotImplementedError(f"a {self.kind} transform of size {d}, K = {k}; only {NAMES}")
        return d

    def read(self, folder: TensorFolder, layer: str, k: int) -> np.ndarray:
        """Return T_X (d, d) of a layer, float32; what the files hold is what counts."""
        d = self.size(k)
        key = f"{layer}.{self.name}_input.weight"
        if self.kind == "hadamard" and key not in folder.entries:
            return matrix(d)
        stored = folder.read(key, [jnp.bfloat16, np.float32, np.float16], [(d, d)])
        found = np.asarray(stored, np.float64)
        if not np.isfinite(found).all():
            raise ValueError(f"{folder.path}: tensor {key!r} has values that are not finite")
        if self.kind == "hadamard":
            if (found != np.sign(matrix(d))).any():
                raise ValueError(
                    f"{folder.path}: tensor {key!r} is not Sylvester's matrix of 1 and -1, as its "
                    "type 'hadamard' says; fetch it again, or write it with 'random-hadamard'"
                )
            return matrix(d)
        return np.ascontiguousarray((found / math.sqrt(d)).T.astype(np.float32))


def matrix(d: int) -> np.ndarray:
    """Return Sylvester's (d, d) matrix / sqrt(d), float32."""
    return np.asarray(hadamard_numpy(d), np.float32)


def ratio_to_hadamard(values: np.ndarray) -> float | None:
    """Return c where a matrix (d, d) is c times Sylvester's, c within 2^-8 of 1; None elsewhere.

    >>> ratio_to_hadamard(matrix(4)), ratio_to_hadamard(np.eye(4, dtype=np.float32))
    (1.0, None)
    """
    d = values.shape[-1]
    if not 1 < d <= LARGEST or d & (d - 1):
        return None
    exact = matrix(d)
    ratio = float(values.reshape(-1)[0] / exact[0, 0])
    same = (values == values.reshape(-1)[0] * np.sign(exact)).all()
    return ratio if same and abs(ratio - 1) < 2**-8 else None


def one_matrix(name: str, transform: Any, faults: Faults) -> np.ndarray | None:
    """Return the one matrix T_X (d, d) of all of a layer's blocks, float32; None without any.

    Blocks with matrices of their own are noted; the first of them is returned.
    """
    if transform is None:
        return None
    values = np.asarray(transform).astype(np.float32)
    if values.ndim == 3 and (values != values[0]).any():
        faults.add(
            "has no room for the transform of {layer}, a matrix of its own for each block: it "
            f"knows the identity and {NAMES}; keep layout='wush' or 'fp_quant', or quantize with "
            "transform='hadamard', or with shared_blocks=True",
            name,
        )
    return values if values.ndim == 2 else values[0]


def written(
    transforms: Mapping[str, np.ndarray | None], ignored: list[str]
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Return the tensors and the ``transform_config`` of layers' matrices T_X (d, d).

    Layers with the same matrix share a scheme.
    """
    groups: dict[bytes, list[str]] = {}
    for name, values in transforms.items():
        if values is not None:
            groups.setdefault(shared.digest(values), []).append(name)
    tensors: dict[str, np.ndarray] = {}
    schemes: dict[str, Any] = {}
    for index, names in enumerate(groups.values()):
        values = transforms[names[0]]
        assert values is not None
        d = len(values)
        everywhere = len(names) == len(transforms)
        key = "input" if everywhere else f"site{index}"
        kind = "random-hadamard" if ratio_to_hadamard(values) is None else "hadamard"
        stored = np.ascontiguousarray(values.T.astype(np.float64) * math.sqrt(d))
        # The entries of a Hadamard matrix, and bfloat16 times 4 or 8, are bfloat16.
        kept = np.sign(stored) if kind == "hadamard" else stored.astype(np.float32)
        exact = (kept.astype(jnp.bfloat16).astype(np.float64) == kept).all()
        kept = kept.astype(jnp.bfloat16 if exact else np.float32)
        tensors |= {f"{name}.{key}_input.weight": kept for name in names}
        schemes[key] = _scheme(kind, d, ["Linear"] if everywhere else names, ignored)
    return tensors, {"config_groups": schemes} if schemes else {}


def _scheme(kind: str, d: int, targets: list[str], ignored: list[str]) -> dict[str, Any]:
    common = {"targets": targets, "ignore": ignored if targets == ["Linear"] else []}
    return {
        "type": kind,
        "apply": [
            {**common, "location": "input", "inverse": False},
            {**common, "location": "weight_input", "inverse": True},
        ],
        "randomize": False,
        "requires_grad": False,
        "head_dim": d,
        "precision": "torch.float32",
    }


def schemes_from(config: Any) -> list[Scheme]:
    """Return the transforms of inputs in a ``transform_config``.

    Raises:
      ValueError: a config of another form.
      NotImplementedError: a transform at run time that is not one matrix for all blocks of inputs.

    >>> tensors, config = written({"up": matrix(4)}, ["lm_head"])
    >>> schemes_from(config)
    [Scheme(name='input', kind='hadamard', block=4, targets=(), ignored=('lm_head',))]
    >>> schemes_from({})
    []
    """
    if not config:
        return []
    try:
        online = {
            name: scheme
            for name, scheme in config["config_groups"].items()
            if {a["location"] for a in scheme["apply"]} - {"weight_input", "weight_output"}
        }
        return [_read_scheme(name, scheme) for name, scheme in online.items()]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"transform_config is damaged ({error!r}); fetch it again") from error


def _read_scheme(name: str, scheme: Mapping[str, Any]) -> Scheme:
    d, kind = scheme.get("head_dim"), scheme["type"]
    (args, *more) = [a for a in scheme["apply"] if a["location"] not in ("weight_input",)]
    targets, ignored = (
        [names] if isinstance(names, str) else names
        for names in (args["targets"], args.get("ignore", []))
    )
    lacking = {
        f"type={kind!r}": kind not in TYPES,
        "randomize": bool(scheme.get("randomize")),
        f"location={args['location']!r}": bool(more) or args["location"] != "input",
        "inverse": bool(args.get("inverse")),
        f"head_dim={str(d)[:40]}": d is not None
        and (type(d) is not int or not 0 < d <= LARGEST or (kind == "hadamard" and d & (d - 1))),
        f"targets={str(targets)[:80]}": any(":" in t for t in [*targets, *ignored])
        or ("Linear" in targets and targets != ["Linear"]),
    }
    if any(lacking.values()):
        points = ", ".join(point for point, bad in lacking.items() if bad)
        raise NotImplementedError(
            f"transform_config, scheme {name!r}: {points}; only {NAMES}, layers by name"
        )
    named = () if targets == ["Linear"] else tuple(targets)
    return Scheme(name, kind, d, named, tuple(ignored))


def scheme_of(schemes: list[Scheme], layer: str) -> Scheme | None:
    """Return the scheme of a layer's inputs; NotImplementedError where there are several."""
    found = [scheme for scheme in schemes if scheme.covers(layer)]
    if len(found) > 1:
        raise NotImplementedError(f"layer {layer!r} has {len(found)} transforms; only one is read")
    return found[0] if found else None
