"""Weights of a :class:`Llama` under Hugging Face's names, and its safetensors folders."""

import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from wush_jax.models.config import LlamaConfig
from wush_jax.models.encodings import ENCODINGS, DecodedFolder, open_config, open_folder
from wush_jax.models.llama import Llama
from wush_jax.models.misfits import check_fit, check_repeated, sizes_named
from wush_jax.models.placement import Placement, place
from wush_jax.models.stored_names import stored_experts
from wush_jax.storage.json_file import CONFIG
from wush_jax.storage.tensor_folder import MisfitError, TensorFolder

Module = TypeVar("Module", bound=nnx.Module)
FLOATS = (jnp.float32, jnp.bfloat16, jnp.float16)
EMBEDDING = "model.embed_tokens.weight"


def tensor_name(path: tuple[Any, ...]) -> str:
    """Return Hugging Face's name of the variable at a path of :class:`Llama`.

    >>> tensor_name(("layers", 0, "mlp", "up_proj", "kernel"))
    'model.layers.0.mlp.up_proj.weight'
    """
    *modules, last = path
    # Kernel, scale and embedding are all called weight there.
    last = "weight" if last in ("kernel", "scale", "embedding") else last
    name = ".".join(map(str, [*modules, last]))
    return name if name.startswith("lm_head.") else f"model.{name}"


def to_tensors(model: Llama) -> dict[str, np.ndarray]:
    """Return the weights under Hugging Face's names, dense ones turned to (out, in).

    >>> config = LlamaConfig(vocab_size=11, hidden_size=16, intermediate_size=32,
    ...                      num_hidden_layers=1, num_attention_heads=2)
    >>> to_tensors(Llama(config, rngs=nnx.Rngs(0)))["model.layers.0.mlp.up_proj.weight"].shape
    (32, 16)
    """
    tensors = {}
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        value = np.asarray(variable[...])
        value = value.mT if path[-1] == "kernel" else value
        tensors[tensor_name(path)] = np.ascontiguousarray(value)
    return tensors


def to_shapes(model: Llama) -> dict[str, tuple[int, ...]]:
    """Return the shapes of :func:`to_tensors`; the model may be abstract."""
    return {
        tensor_name(path): _turned(variable.shape) if path[-1] == "kernel" else variable.shape
        for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param))
    }


def _turned(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (*shape[:-2], shape[-1], shape[-2])


def from_tensors(
    config: LlamaConfig,
    tensors: Mapping[str, Any],
    *,
    dtype: Any = jnp.float32,
    param_dtype: Any = jnp.float32,
    sharding: Placement = None,
    attention_implementation: str | None = None,
) -> Llama:
    """Build a model from weights named and turned as in :func:`to_tensors`.

    Args:
        config: the sizes.
        tensors: weights by name, looked up one at a time.
        dtype: type of activations and products.
        param_dtype: type in which weights are kept.
        sharding: where weights go, such as :func:`tensor_parallel` of a mesh.
        attention_implementation: as for :class:`Llama`.

    Raises:
        ValueError: if a tensor is missing, left over or of another shape than ``config`` implies.
    """
    model = abstract(
        config,
        dtype=dtype,
        param_dtype=param_dtype,
        attention_implementation=attention_implementation,
    )
    check_fit(to_shapes(model), _shapes_of(tensors), _place(tensors))
    return fill(model, tensors, sharding=sharding)


def _place(tensors: Mapping[str, Any]) -> str:
    """Return where tensors are from, for messages."""
    return f"{tensors.path}: " if isinstance(tensors, FolderTensors) else ""


def _shapes_of(tensors: Mapping[str, Any]) -> dict[str, tuple[int, ...] | None]:
    """Return shapes by name, None of what has to be read for it: `fill` looks at those."""
    known = tensors.shape if isinstance(tensors, FolderTensors) else lambda name: None
    return {name: known(name) for name in tensors}


def fill(
    module: Module,
    tensors: Mapping[str, Any],
    *,
    inside: tuple[Any, ...] = (),
    sharding: Placement = None,
) -> Module:
    """Give an abstract model, or one module of it, its weights; nothing else is looked up.

    Args:
        module: as :func:`abstract` made it; changed.
        tensors: weights by Hugging Face's names.
        inside: path of the module in its model, such as ``("layers", 3)``.
        sharding: where weights go.

    Returns:
        The module.

    Raises:
        ValueError: if a tensor is of another shape than the module implies.
    """
    filled = []
    for path, variable in nnx.to_flat_state(nnx.state(module, nnx.Param)):
        name = tensor_name((*inside, *path))
        value = np.asarray(tensors[name])
        value = value.mT if path[-1] == "kernel" and value.ndim > 1 else value
        if value.shape != variable.shape:
            raise MisfitError(
                f"{_place(tensors)}tensors[{name!r}] has shape {value.shape} where the config "
                f"implies {variable.shape} (input first); check the sizes in config."
            )
        # One at a time: what is on its way to a device is on the host as well.
        placed = jax.block_until_ready(place(name, value, variable.dtype, sharding))
        filled.append((path, variable.replace(placed)))
    nnx.update(module, nnx.from_flat_state(filled))
    return module


def abstract(config: LlamaConfig, **options: Any) -> Llama:
    """Return a model of shapes alone, without memory; options as for :class:`Llama`.

    >>> config = LlamaConfig(vocab_size=11, hidden_size=16, intermediate_size=32,
    ...                      num_hidden_layers=1, num_attention_heads=2)
    >>> abstract(config).norm.scale.get_value()
    ShapeDtypeStruct(shape=(16,), dtype=float32)
    """
    return nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0), **options))


def abstract_of(
    tensors: "FolderTensors", *, dtype: Any, param_dtype: Any = None, **options: Any
) -> Llama:
    """Return the shapes of a folder's model, each weight in the type that its file has.

    Args:
        tensors: of the folder.
        dtype: type of activations and products.
        param_dtype: one type for all weights instead.
        options: as for :class:`Llama`.

    Raises:
        ValueError: if a tensor is missing or left over.
    """
    kept = tensors.dtype(EMBEDDING) if param_dtype is None else param_dtype
    model = abstract(tensors.config, dtype=dtype, param_dtype=kept, **options)
    with sizes_named(tensors.config):
        check_fit(to_shapes(model), _shapes_of(tensors), _place(tensors))
    return model if param_dtype is not None else typed(model, tensors)


def typed(module: Module, tensors: "FolderTensors") -> Module:
    """Give the shapes of an abstract model, or of its ends, the types that a folder has."""
    own = [
        (path, variable.replace(jax.ShapeDtypeStruct(variable.shape, tensors.dtype(name))))
        for path, variable in nnx.to_flat_state(nnx.state(module, nnx.Param))
        for name in [tensor_name(path)]
    ]
    nnx.update(module, nnx.from_flat_state(own))
    return module


class FolderTensors(Mapping[str, np.ndarray]):
    """The weights in a Hugging Face model folder, by name; each is a view of its file, or decoded.

    Names are those of :func:`tensor_name`, whatever stands before them in the files: nothing
    (``AutoModel``), or the name of the language model in a larger one. Experts are gathered to the
    stacks that the decoder holds (`wush_jax.models.stored_names`).

    Args:
        folder: with ``config.json`` and safetensors files.

    Attributes:
        path: the folder.
        config: what ``config.json`` describes.

    Raises:
        ValueError: if files are missing or damaged, or hold a quantized model that is none of
            `wush_jax.models.encodings`, or none of a text.
        NotImplementedError: if the config asks for mathematics that :class:`Llama` lacks, or for an
            encoding that is not read.
    """

    def __init__(self, folder: str | Path):
        self._folder = open_folder(folder, mapped=True)
        self.path = self._folder.path
        decoded = isinstance(self._folder, DecodedFolder)
        if "quantization_config" in self._folder.config and not decoded:
            raise ValueError(
                f"folder = {str(folder)!r} holds a quantized model; read it with wush_jax.load, or "
                f"give the folder of the original, or one of {', '.join(ENCODINGS)}"
            )
        self.config = folder_config(self._folder)
        present, self._experts = _stored_names(self._folder), stored_experts(self.config)
        self._names = {
            name: tuple(present[n] for n in stored.names)
            for name, stored in self._experts.items()
            if present.keys() >= set(stored.names)
        }
        gathered = {n for names in self._names.values() for n in names}
        self._names |= {
            name: (stored,)
            for name, stored in present.items()
            if stored not in gathered and not self._is_surplus(name)
        }

        head = present.get("lm_head.weight")
        if self.config.tie_word_embeddings and head is not None:
            check_repeated(self._folder, head, present[EMBEDDING])

    def _is_surplus(self, name: str) -> bool:
        """Tell what some files repeat: a tied head, and the frequencies of old ones."""
        tied = self.config.tie_word_embeddings and name == "lm_head.weight"
        return tied or name.endswith(".rotary_emb.inv_freq")

    def dtype(self, name: str) -> np.dtype:
        """Return the type of a tensor; of gathered ones, the type that holds them all."""
        kinds = [self._folder.entries[stored].dtype for stored in self._names[name]]
        if not {*kinds} <= {*map(np.dtype, FLOATS)}:
            self[name]  # says what is wrong with it
        return np.dtype(functools.reduce(jnp.promote_types, kinds))

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Return the shape of a tensor, as its file says; of gathered ones None."""
        if name in self._experts:
            return None
        return self._folder.entries[self._names[name][0]].shape

    def __getitem__(self, name: str) -> np.ndarray:
        tensors = [
            self._folder.read(stored, FLOATS, [self._folder.entries[stored].shape])
            for stored in self._names[name]
        ]
        return self._experts[name].gather(tensors) if name in self._experts else tensors[0]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def folder_config(folder: TensorFolder) -> LlamaConfig:
    """Return what a folder's ``config.json`` describes; errors name the file."""
    return _described(folder.config, folder.path)


def read_model_config(folder: str | Path) -> LlamaConfig:
    """Return the same of a folder, or GGUF file, that is not open: no tensor is looked at."""
    return _described(open_config(folder), Path(folder))


def _described(config: Mapping[str, Any], path: Path) -> LlamaConfig:
    try:
        return LlamaConfig.from_dict(config)
    except (ValueError, NotImplementedError) as error:
        raise type(error)(f"{path / CONFIG}: {error}") from error


def _stored_names(folder: TensorFolder) -> dict[str, str]:
    """Return the names in the files by ours: all tensors, those of other parts as they are."""
    end = "embed_tokens.weight"
    found = [n for n in folder.entries if n == end or n.endswith("." + end)]
    if len(found) != 1:
        some = ", ".join(map(repr, [*folder.entries][:3]))
        raise ValueError(
            f"{folder.path} holds {len(found)} tensors that are called [...]{end} ({found[:3]}; "
            f"the first names are {some}), expected one: no decoder of the Llama family, or two"
        )
    before = found[0].removesuffix(end)
    parts = before.split(".")
    heads = {".".join([*parts[:i], "lm_head.weight"]) for i in range(len(parts))}
    names: dict[str, str] = {}
    for stored in folder.entries:
        name = stored
        if stored.startswith(before) and stored not in heads:
            name = "model." + stored.removeprefix(before)
        elif stored in heads:
            name = "lm_head.weight"
        if name in names:
            raise ValueError(f"{folder.path}: tensors {names[name]!r} and {stored!r} are the same")
        names[name] = stored
    return names


def load_pretrained(
    folder: str | Path,
    *,
    dtype: Any = jnp.float32,
    param_dtype: Any = jnp.float32,
    sharding: Placement = None,
    attention_implementation: str | None = None,
) -> Llama:
    """Read a Hugging Face model folder: ``config.json`` and its safetensors files.

    Weights go from the files to their devices one tensor at a time, slice by slice: the host never
    holds the model beside its devices.

    Args:
        folder: with one file or several and their index; float32, bfloat16 or float16.
        dtype: type of activations and products.
        param_dtype: type in which weights are kept; None keeps each tensor's own.
        sharding: where weights go, such as :func:`tensor_parallel` of a mesh.
        attention_implementation: as for :class:`Llama`.

    Raises:
        ValueError: if the folder holds no safetensors files, or files that do not fit the config.
        NotImplementedError: if the config asks for mathematics that the decoder lacks.
    """
    tensors = FolderTensors(folder)
    model = abstract_of(
        tensors,
        dtype=dtype,
        param_dtype=param_dtype,
        attention_implementation=attention_implementation,
    )
    with sizes_named(tensors.config):
        return fill(model, tensors, sharding=sharding)
