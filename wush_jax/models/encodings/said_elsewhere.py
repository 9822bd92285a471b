"""What libraries say of encoded weights in files of their own, beside ``config.json``.

ModelOpt writes ``hf_quant_config.json`` (under ``quantization``), AutoGPTQ of old
``quantize_config.json``. Here both are seen as the ``quantization_config`` that later versions of
the same libraries write into ``config.json``, which goes before them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from wush_jax.storage.json_file import read_json
from wush_jax.storage.tensor_folder import TensorFolder

GPTQ_FILE = "quantize_config.json"
MODELOPT_FILE = "hf_quant_config.json"
MODELOPT = "modelopt"


def quantization_said(folder: TensorFolder) -> Mapping[str, Any]:
    """Return the ``quantization_config`` of a folder, wherever it stands; empty if nowhere.

    Raises:
      ValueError: a file that is no JSON object.
    """
    own = folder.config.get("quantization_config")
    if isinstance(own, Mapping) and (own.get("quant_method") != MODELOPT or "quant_algo" in own):
        return own
    if own is not None and not isinstance(own, Mapping):
        return {}
    if (folder.path / MODELOPT_FILE).is_file():
        found = read_json(folder.path / MODELOPT_FILE).get("quantization")
        return {**(found if isinstance(found, Mapping) else {}), "quant_method": MODELOPT}
    if own is None and (folder.path / GPTQ_FILE).is_file():
        return {"quant_method": "gptq", **read_json(folder.path / GPTQ_FILE)}
    return own or {}
