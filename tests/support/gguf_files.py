"""GGUF files of a small model, which the ``gguf`` package writes."""

import gguf
import numpy as np
from encoded_folders import LINEARS, plain

TYPES = {
    "self_attn.q_proj": "Q8_0",
    "self_attn.k_proj": "Q4_0",
    "self_attn.v_proj": "F16",
    "self_attn.o_proj": "BF16",
    "mlp.gate_proj": "Q5_0",
    "mlp.up_proj": "Q4_1",
    "mlp.down_proj": "F32",
}


def their_name(name):
    """`model.layers.0.mlp.up_proj.weight` as llama.cpp has it, by a table of its own package."""
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, 2)
    return f"{table.get_name(name.rpartition('.')[0])}.{name.rpartition('.')[2]}"


def permuted(weight, heads):
    """Llama's rows as llama.cpp's converter orders them."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def weights(architecture):
    random = np.random.default_rng(3)
    found = {n: t.astype("f4") for n, t in plain().items()}
    found |= {
        f"{n}.weight": random.standard_normal(s).astype("f4") * 0.1 for n, s in LINEARS.items()
    }
    if architecture != "llama":
        for part in ("q_norm", "k_norm"):
            found[f"model.layers.0.self_attn.{part}.weight"] = np.linspace(0.5, 1.5, 32, dtype="f4")
    return found


def write(file, architecture="llama", drop=(), tensors=None, **fields):
    """A file, and what it holds in Hugging Face's order of rows."""
    writer, wanted = gguf.GGUFWriter(file, architecture), {}
    own = {
        "context_length": 64,
        "embedding_length": 64,
        "block_count": 1,
        "feed_forward_length": 96,
        "attention.head_count": 2,
        "attention.head_count_kv": 2,
        "rope.dimension_count": 32,
        **fields,
    }
    for key, value in own.items():
        if key not in drop and value is not None:
            kind = writer.add_string if isinstance(value, str) else writer.add_uint32
            kind(f"{architecture}.{key}", value)
    writer.add_float32(f"{architecture}.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_float32(f"{architecture}.rope.freq_base", 10000.0)
    writer.add_uint32("tokenizer.ggml.bos_token_id", 1)
    writer.add_uint32("tokenizer.ggml.eos_token_id", 2)
    writer.add_array("tokenizer.ggml.tokens", [f"t{i}" for i in range(16)])
    for name, value in {**weights(architecture), **(tensors or {})}.items():
        kind = next((t for part, t in TYPES.items() if part in name), "F32")
        rotated = architecture == "llama" and ("q_proj" in name or "k_proj" in name)
        stored = permuted(value, 2) if rotated else value
        kind = getattr(gguf.GGMLQuantizationType, kind)
        data = gguf.quantize(stored, kind)
        ours = name if name.startswith("rope") else their_name(name)
        writer.add_tensor(ours, data, raw_dtype=kind)
        # Blocks are of columns, so that rows are quantized by themselves, in any order.
        wanted[name] = gguf.dequantize(gguf.quantize(value, kind), kind).reshape(value.shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return wanted
