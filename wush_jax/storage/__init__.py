"""Files and folders on disk: tensors, configs, locks, and writing that survives a crash."""

from wush_jax.storage.folder_lock import sole_writer
from wush_jax.storage.folder_writer import copy_companions, write_folder
from wush_jax.storage.json_file import read_config, read_json, write_json
from wush_jax.storage.tensor_file import write_tensors
from wush_jax.storage.tensor_folder import TensorFolder

__all__ = [
    "TensorFolder",
    "copy_companions",
    "read_config",
    "read_json",
    "sole_writer",
    "write_folder",
    "write_json",
    "write_tensors",
]
