"""What other libraries decode of our files, and we of theirs: the rows of a table in files.md.

`python tests/support/interop.py` prints the rows of the libraries that are installed here.
"""

import json
import math
import re
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import their_folders
from encoded_folders import DYNAMIC
from layout_tools import DERIVED, ROUND_175, model

import wush_jax as wush
from wush_jax.checkpoints import interchange
from wush_jax.formats import NVFP4
from wush_jax.models.encodings import open_folder

HERE = "this library"
# Names of distributions, where they are not those of the libraries.
DISTRIBUTIONS = {"ModelOpt": "nvidia-modelopt", "AutoAWQ": "autoawq", "GPTQModel": "gptqmodel"}


@dataclass(frozen=True)
class Row:
    """One way from a library to another.

    Attributes:
      layout: of the files.
      weights: in words.
      writer: library that writes, `HERE` for ours.
      reader: library that reads, `HERE` for ours.
      both: from a folder to the weights that we decode, and those that the library does, by name.
    """

    layout: str
    weights: str
    writer: str
    reader: str
    both: Callable[[Path], tuple[dict[str, Any], dict[str, Any]]] = field(compare=False)

    @property
    def library(self):
        return self.reader if self.writer == HERE else self.writer

    @property
    def version(self):
        """Of the other library; None where it is not installed."""
        try:
            return version(DISTRIBUTIONS.get(self.library, self.library))
        except PackageNotFoundError:
            return None

    def line(self, folder):
        """The row, with the versions that ran."""
        names = [n if n == HERE else f"{n} {self.version}" for n in (self.writer, self.reader)]
        cells = [f"`{self.layout}`", self.weights, *names, agreement(*self.both(folder))]
        return f"| {' | '.join(cells)} |"


def agreement(ours, theirs):
    """How decoded weights agree: equal, to the type of one of both, or the largest difference."""
    assert set(ours) == set(theirs)
    assert ours
    for kind, said in ((np.float32, "equal"), (jnp.bfloat16, BFLOAT), (np.float16, HALF)):
        if all(np.array_equal(ours[n].astype(kind), theirs[n].astype(kind)) for n in ours):
            return said
    worst = max(np.max(np.abs(ours[n] - theirs[n]) / scale(theirs[n])) for n in ours)
    return f"within 2^{math.ceil(math.log2(worst))} of a value"


BFLOAT, HALF = "equal in bfloat16", "equal in float16"


def scale(values):
    return np.where(values == 0, 1, np.abs(values))


def ours(folder, names):
    """The weights that we decode: of packed layers, and of others in float32."""
    packed, opened, found = interchange.read_layers(folder), open_folder(folder), {}
    for name in names:
        layer = name.removesuffix(".weight")
        if layer in packed:
            found[name] = np.asarray(wush.dequantize(packed[layer].weight))
        else:
            found[name] = opened.read(name, [np.float32], [opened.entries[name].shape])
    return found


def theirs(writer, **options):
    """A row's function of a folder that another library writes."""

    def both(folder):
        wanted = writer(folder, **options)
        return ours(folder, wanted), wanted

    return both


def exported(layout, **options):
    """A row's function of a folder that we write and compressed-tensors reads."""

    def both(folder):
        from compressed_tensors.compressors import BaseCompressor
        from compressed_tensors.quantization import QuantizationConfig
        from safetensors.torch import load_file

        interchange.export(folder, model(**options), layout, rotated=True)
        config = json.loads((folder / "config.json").read_text())["quantization_config"]
        config = QuantizationConfig(**config)
        compressor = BaseCompressor.get_value_from_registry(layout)
        stored, found = load_file(folder / "model.safetensors"), {}
        for name in ("up", "gate"):
            parts = {k.removeprefix(f"{name}."): v for k, v in stored.items()}
            scheme = config.config_groups["group_0"]
            found[f"{name}.weight"] = compressor.decompress(parts, scheme)["weight"].float().numpy()
        return ours(folder, found), found

    return both


INT, FLOAT = {"type": "int"}, {"type": "float", "num_bits": 8}
GROUPS = {"strategy": "group", "group_size": 32}
CT = "compressed-tensors"
FP4 = {"num_bits": 4, "type": "float", "symmetric": True}
NV_WEIGHTS = FP4 | {"strategy": "tensor_group", "group_size": 16, "scale_dtype": "float8_e4m3fn"}
MX_WEIGHTS = FP4 | {"strategy": "group", "group_size": 32, "scale_dtype": "uint8"}

OTHERS: tuple[tuple[str, str, str, Callable, dict], ...] = tuple(
    (layout, weights, CT, their_folders.compressed_tensors, options)
    for layout, weights, options in (
        ("nvfp4-pack-quantized", "NVFP4", NV_WEIGHTS),
        ("mxfp4-pack-quantized", "MXFP4", MX_WEIGHTS),
        ("pack-quantized", "int4, groups of 32", INT | GROUPS | {"num_bits": 4}),
        (
            "pack-quantized",
            "int4, groups of 32, zero points",
            INT | GROUPS | {"num_bits": 4, "symmetric": False},
        ),
        ("pack-quantized", "int4, a scale a row", INT | {"num_bits": 4, "strategy": "channel"}),
        (
            "pack-quantized",
            "int4, a scale a row, zero points",
            INT | {"num_bits": 4, "strategy": "channel", "symmetric": False},
        ),
        ("pack-quantized", "int8, groups of 32", INT | GROUPS | {"num_bits": 8}),
        ("float-quantized", "e4m3, a scale a row", FLOAT | {"strategy": "channel"}),
        ("float-quantized", "e4m3, one scale", FLOAT | {"strategy": "tensor"}),
        (
            "float-quantized",
            "e4m3, blocks of 32 x 32",
            FLOAT | {"strategy": "block", "block_structure": [32, 32]},
        ),
        (
            "int-quantized",
            "int8, a scale a row, zero points",
            INT
            | {"num_bits": 8, "strategy": "channel", "symmetric": False}
            | {"inputs": {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True}},
        ),
    )
)
STACK = "model.layers.0.mlp.experts.gate_up_proj"
OTHERS += (
    *(
        ("fp8", weights, "transformers", their_folders.finegrained_fp8, options)
        for weights, options in (
            ("e4m3, blocks of 32 x 32", {}),
            ("e4m3, powers of two of 32 x 32", {"scale_fmt": "ue8m0"}),
            ("e4m3, one scale", {"block": None}),
            ("e4m3, a stack of experts", {"stack": STACK}),
        )
    ),
    *(
        ("gptq", weights, "GPTQModel", their_folders.gptq_model, options)
        for weights, options in (
            ("int4, groups of 32", {}),
            ("int4, zero points, version 1", {"sym": False}),
            ("int4, zero points, version 2", {"sym": False, "format": "gptq_v2"}),
            ("int4, inputs reordered", {"desc_act": True}),
            ("overrides by module (`dynamic`)", {"dynamic": DYNAMIC}),
        )
    ),
    ("awq", 'int4, "gemm"', "AutoAWQ", their_folders.auto_awq, {}),
    ("awq", 'int4, "gemv"', "AutoAWQ", their_folders.auto_awq, {"version": "gemv"}),
    (
        "modelopt-fp8",
        "e4m3, one scale",
        "ModelOpt",
        their_folders.modelopt,
        {"config": "FP8_DEFAULT_CFG"},
    ),
    ("modelopt", "NVFP4", "ModelOpt", their_folders.modelopt, {"config": "NVFP4_DEFAULT_CFG"}),
)
OURS = (
    ("nvfp4-pack-quantized", "NVFP4", {"fmt": NVFP4, "kind": "identity"}),
    ("nvfp4-pack-quantized", "NVFP4, Hadamard", {"fmt": DERIVED, "kind": "hadamard", "d": 16}),
    (
        "nvfp4-pack-quantized",
        "NVFP4, one WUSH matrix",
        {"fmt": NVFP4, "kind": "shared", "d": 16},
    ),
    ("mxfp4-pack-quantized", "MXFP4", {"fmt": ROUND_175, "kind": "identity"}),
    ("mxfp4-pack-quantized", "MXFP4, Hadamard", {"fmt": ROUND_175, "kind": "hadamard", "d": 64}),
)
ROWS = (
    *(Row(layout, w, HERE, CT, exported(layout, **options)) for layout, w, options in OURS),
    *(Row(layout, w, library, HERE, theirs(f, **o)) for layout, w, library, f, o in OTHERS),
)


def without_versions(text):
    """Text without the numbers behind libraries' names."""
    names = "|".join(sorted({row.library for row in ROWS}))
    return re.sub(rf"({names}) [\w.]+", r"\1", text)


def main():
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as work:
        for number, row in enumerate(ROWS):
            if row.version is not None and row.library in (sys.argv[1:] or [row.library]):
                print(row.line(Path(work) / str(number)), flush=True)


if __name__ == "__main__":
    main()
