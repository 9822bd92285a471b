"""GGUF files (llama.cpp), read through the ``gguf`` package and decoded: a source to quantize.

The config is made of the file's metadata (`wush_jax.models.encodings.gguf_config`), tensors get
their names of Hugging Face's files, and Llama's queries and keys their order of rows: llama.cpp
has both halves of a rotated pair side by side. The tokenizer inside the file is not read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from wush_jax.models.encodings.encoded import EncodedWeight, Encoding
from wush_jax.models.encodings.gguf_config import config_of, rope_scaling
from wush_jax.storage.tensor_folder import Entry, TensorFolder, some

ENDING = ".gguf"
ENDS = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
LAYER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
FACTORS = "rope_freqs.weight"
EMBEDDING, FLOAT32 = "token_embd.weight", np.dtype(np.float32)


def gguf_path(path: str | Path) -> Path | None:
    """Return the GGUF file that a path means: itself, or the only one of a folder without others.

    Raises:
      ValueError: several files, or one part of several.
    """
    path = Path(path)
    found = [path] if path.suffix == ENDING else []
    if path.is_dir() and not any(path.glob("*.safetensors*")):
        found = sorted(path.glob(f"*{ENDING}"))
    if len(found) > 1:
        raise ValueError(f"{path} holds {len(found)} GGUF files; give one: {found[0]}, for example")
    if found and "-of-" in found[0].stem:
        raise ValueError(f"{found[0]} is a part of a file; join them with llama-gguf-split --merge")
    return found[0] if found else None


class GGUFFile(TensorFolder):
    """A GGUF file seen as a folder of its tensors' bytes; ``config`` is made of its metadata.

    Args:
      file: the file.

    Raises:
      ValueError: it is damaged, or the package is missing.
      NotImplementedError: an architecture or a type of numbers that is not read.
    """

    def __init__(self, file: Path):
        self.path = file
        reader = _reader(file)
        self.tensors = {tensor.name: tensor for tensor in reader.tensors}
        shapes = {n: tuple(int(d) for d in t.shape[::-1]) for n, t in self.tensors.items()}
        metadata = {n: f.contents() for n, f in reader.fields.items() if len(f.data) == 1}
        self.architecture = metadata.get("general.architecture")
        try:
            self.config = config_of(metadata, shapes)
            if FACTORS in self.tensors:
                scaling = rope_scaling(self.decoded(FACTORS), self.config)
                self.config["rope_scaling"] = scaling
        except (ValueError, NotImplementedError) as error:
            named = f"general.architecture={self.architecture!r}"
            raise type(error)(f"{file}: {error} ({named})") from error
        self.entries = {
            name: Entry(file, np.dtype(np.uint8), (int(t.n_bytes),), int(t.data_offset), (), None)
            for name, t in self.tensors.items()
        }
        self.shapes = shapes
        self._unread = set(self.entries)

    def decoded(self, name: str) -> np.ndarray:
        """Return a tensor's values, float32."""
        import gguf

        tensor = self.tensors[name]
        return gguf.dequantize(tensor.data, tensor.tensor_type).reshape(tensor.shape[::-1])


def _reader(file: Path) -> Any:
    """Return the package's reader, which looks beyond no end of the file."""
    try:
        import gguf
    except ImportError as error:
        raise ValueError(f"{file} needs the gguf package: pip install 'wush-jax[gguf]'") from error

    class Bounded(gguf.GGUFReader):
        def _get(self, offset: int, dtype: Any, count: Any = 1, override_order: Any = None) -> Any:
            size = int(count) * np.dtype(dtype).itemsize
            if not 0 <= int(offset) <= int(offset) + size <= len(self.data):
                raise ValueError(f"it ends before byte {int(offset) + size}")
            return super()._get(offset, dtype, count, override_order)

    try:
        return Bounded(file)
    except Exception as error:  # whatever a damaged header trips over
        raise ValueError(
            f"{file} cannot be read ({error!r}); it is damaged or no GGUF file: fetch it again"
        ) from error


@dataclass(frozen=True)
class _Rows:
    """What `EncodedWeight.read` returns: a decoded tensor, its rows in Hugging Face's order."""

    file: GGUFFile
    name: str
    heads: int | None

    def values(self) -> np.ndarray:
        found = self.file.decoded(self.name)
        if self.heads is None:
            return found
        pairs = found.reshape(self.heads, -1, 2, *found.shape[1:])
        return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(found.shape)


def their_name(name: str) -> str | None:
    """Return the name in Hugging Face's files of a tensor of a GGUF file, or None.

    >>> their_name("blk.3.ffn_gate.weight"), their_name("output_norm.weight")
    ('model.layers.3.mlp.gate_proj.weight', 'model.norm.weight')
    """
    module, _, kind = name.rpartition(".")
    first, _, rest = module.partition(".")
    number, _, part = rest.partition(".")
    if first == "blk" and part in LAYER and number.isdecimal():
        return f"model.layers.{number}.{LAYER[part]}.{kind}"
    return f"{ENDS[module]}.{kind}" if module in ENDS else None


def _weights(folder: TensorFolder) -> dict[str, EncodedWeight]:
    assert isinstance(folder, GGUFFile)
    names = {name: their_name(name) for name in folder.tensors if name != FACTORS}
    unknown = [name for name, theirs in names.items() if theirs is None]
    if unknown:
        raise NotImplementedError(
            f"{folder.path}: tensors {some(unknown)} have no place in the decoder; quantize the "
            "model's own folder"
        )
    kinds = {n: str(t.tensor_type.name) for n, t in folder.tensors.items()}
    faults = [f"{kind} of {name!r}" for name, kind in kinds.items() if not _decodes(folder, name)]
    if faults:
        raise NotImplementedError(
            f"{folder.path}: the gguf package does not decode {', '.join(sorted(faults))}; use a "
            "later version, or the model's own folder"
        )
    return {str(names[name]): _weight(folder, name) for name in names}


def _decodes(folder: GGUFFile, name: str) -> bool:
    import gguf

    tensor = folder.tensors[name]
    try:
        gguf.dequantize(tensor.data[:1], tensor.tensor_type)
    except NotImplementedError:
        return False
    except ValueError as error:
        raise ValueError(
            f"{folder.path}: tensor {name!r} is {tensor.tensor_type.name} "
            f"{folder.shapes[name]}, whose rows are no whole blocks ({error}); fetch it again"
        ) from error
    return True


def _weight(folder: GGUFFile, name: str) -> EncodedWeight:
    kind = str(folder.tensors[name].tensor_type.name)
    heads = None
    if folder.architecture == "llama":
        parts = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}
        key = parts.get(name.split(".")[-2])
        heads = None if key is None else folder.config[key]
    # All is exact in float32. The embedding's type is that in which a model keeps what stays plain.
    wide = name != EMBEDDING or kind == "F32"
    return EncodedWeight(
        shape=folder.shapes[name],
        dtype=FLOAT32 if wide else np.dtype(jnp.bfloat16),
        parts=(name,),
        element=kind,
        block=None,
        read=partial(_Rows, folder, name, heads),
    )


def _claims(config: Mapping[str, Any]) -> bool:
    return False  # known by the file itself, which `gguf_path` finds


ENCODING = Encoding(
    "gguf",
    _claims,
    _weights,
    skipped=(FACTORS,),
    written_by="llama.cpp, of architectures llama, qwen2 and qwen3; by gguf 0.19",
)
