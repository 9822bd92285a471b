"""The model that a folder's config describes, in shapes alone."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import nnx

from wush_jax.checkpoints.content import ACTIVATIONS
from wush_jax.checkpoints.layouts.layout import quantization_config
from wush_jax.models import Llama, LlamaConfig
from wush_jax.models.hugging_face import EMBEDDING, folder_config
from wush_jax.storage.json_file import CONFIG
from wush_jax.storage.tensor_folder import Entry, TensorFolder

FLOATS = ("bfloat16", "float32", "float16")


def described_llama(folder: TensorFolder) -> Llama:
    """Return the shapes of the Llama that a folder's config describes.

    Raises:
      ValueError: it describes none, or one that the files do not hold: the entries of the config.
      NotImplementedError: it asks for mathematics that we lack.
    """
    file = folder.path / CONFIG
    quantization = quantization_config(folder)
    if quantization.get("naming", "hugging_face") != "hugging_face":
        raise ValueError(f"{file} describes no Llama; give the model that was saved, or its shapes")
    try:
        embedding = _embedding(folder)
        _check_layers(folder.config.get("num_hidden_layers"), folder)
        config = folder_config(folder)
        if quantization.get("model_digest", config.digest()) != config.digest():
            raise ValueError(
                "its entries are not those that were saved, their digest differs: something "
                "changed them; delete 'model_digest' to have what they say now"
            )
        _check_layers(config.num_hidden_layers, folder)
        _check_embedding(embedding, config)
        kinds = {"dtype": _activations(folder, embedding), "param_dtype": embedding.dtype}
        return nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0), **kinds))
    except NotImplementedError:
        raise
    except Exception as error:  # whatever a nonsensical config trips over
        said = str(error) if type(error) is ValueError else repr(error)
        said = said.removeprefix(f"{file}: ")
        raise ValueError(f"{file} describes no Llama that is here: {said}") from error


def _embedding(folder: TensorFolder) -> Entry:
    if EMBEDDING not in folder.entries:
        raise ValueError(
            f"the files hold no tensor {EMBEDDING!r}; fetch the folder again, or give the model "
            "that was saved"
        )
    embedding = folder.entries[EMBEDDING]
    if embedding.dtype.name not in FLOATS:
        raise ValueError(
            f"tensor {EMBEDDING!r} is {embedding.dtype.name}, expected one of {', '.join(FLOATS)}; "
            "fetch the folder again"
        )
    return embedding


def _check_layers(layers: Any, folder: TensorFolder) -> None:
    """Refuse more layers than there are tensors, before a billion of them is spelled out."""
    if isinstance(layers, int) and layers > len(folder.entries):
        raise ValueError(
            f"num_hidden_layers={layers} are more layers than the files hold, which have "
            f"{len(folder.entries)} tensors; correct it, or fetch the folder again"
        )


def _check_embedding(embedding: Entry, config: LlamaConfig) -> None:
    wanted = (config.vocab_size, config.hidden_size)
    if embedding.shape != wanted:
        raise ValueError(
            f"vocab_size={wanted[0]} and hidden_size={wanted[1]}, but tensor {EMBEDDING!r} has "
            f"shape {embedding.shape}; correct them, or fetch the folder again"
        )


def _activations(folder: TensorFolder, embedding: Entry) -> Any:
    """Return the type of activations: what we saved, else the model's, else the embedding's."""
    names = ("torch_dtype", "dtype", ACTIVATIONS)
    named = {name: folder.config[name] for name in names if name in folder.config}
    saved = quantization_config(folder).get("activation_dtype")
    if ACTIVATIONS not in named and saved is not None:
        named["activation_dtype"] = saved
    if not named:
        return embedding.dtype
    name, value = [*named.items()][-1]
    if value not in FLOATS:
        raise ValueError(
            f"{name}={value!r} is no type of activations; correct it to one of {', '.join(FLOATS)}"
        )
    return jnp.dtype(value)
