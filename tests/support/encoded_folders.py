"""Folders of a small Llama whose weights are encoded as other libraries do it, in plain numpy.

Written from the sources of AutoGPTQ, AutoAWQ, compressed-tensors and transformers; nothing here
comes from this library. Words are made of Python's whole numbers, one number after the other.
"""

import json
import math

import numpy as np
from safetensors.numpy import save_file

CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 16,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
}
LINEARS = {
    **{f"model.layers.0.self_attn.{p}_proj": (64, 64) for p in "qkvo"},
    **{f"model.layers.0.mlp.{p}_proj": (96, 64) for p in ("gate", "up")},
    "model.layers.0.mlp.down_proj": (64, 96),
}
UP = "model.layers.0.mlp.up_proj"
# GPTQModel's overrides, the first that matches from the start; and what they come to.
DYNAMIC = {
    "-:.*q_proj": {},
    r".*\.mlp\.(?:up|down)_proj": {"bits": 8, "group_size": 16, "damp_percent": 0.1},
    "+:.*down_proj": {"bits": 2},
    "up_proj": {"bits": 3},
}
EIGHT = {"bits": 8, "group_size": 16}
OVERRIDES = {UP: EIGHT, "model.layers.0.mlp.down_proj": EIGHT}
OVERRIDES["model.layers.0.self_attn.q_proj"] = False


def plain(dtype=np.float16):
    """What is not encoded."""
    random = np.random.default_rng(0)
    tensors = {
        "model.embed_tokens.weight": random.standard_normal((16, 64)),
        "lm_head.weight": 0.1 * random.standard_normal((16, 64)),
        "model.norm.weight": np.ones(64),
        "model.layers.0.input_layernorm.weight": np.ones(64),
        "model.layers.0.post_attention_layernorm.weight": 1 + 0.1 * random.standard_normal(64),
    }
    return {name: value.astype(dtype) for name, value in tensors.items()}


def write(folder, tensors, quantization, **config):
    folder.mkdir(exist_ok=True)
    save_file(
        {n: np.ascontiguousarray(t) for n, t in tensors.items()}, folder / "model.safetensors"
    )
    content = {**CONFIG, **config, "quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(content))
    return folder


def words(numbers, bits):
    """A row of numbers as int32 words, the first number lowest."""
    stream = sum(int(number) << (bits * i) for i, number in enumerate(numbers))
    size = -(-len(numbers) * bits // 32) * 4
    return np.frombuffer(stream.to_bytes(size, "little"), "<i4")


def rows(table, bits):
    return np.stack([words(row, bits) for row in table])


def random_codes(n, k, groups, bits, seed):
    """Codes from 0 up (N, K), zeros (N, G) from 1 up, scales (N, G) float16."""
    random = np.random.default_rng(seed)
    codes = random.integers(2**bits, size=(n, k))
    zeros = random.integers(1, 2**bits, size=(n, groups))
    scales = random.uniform(0.002, 0.02, (n, groups)).astype(np.float16)
    return codes, zeros, scales


def meant(codes, zeros, scales, place):
    """(code - zero) * scale of each column's group, rounded once to float32."""
    return ((codes - zeros[:, place]) * scales.astype(np.float64)[:, place]).astype(np.float32)


def gptq(
    folder, *, bits=4, group=32, sym=True, desc_act=False, version="gptq", elsewhere=False, **fields
):
    """A folder, and what its weights mean; the config in a file of its own, as of old."""
    tensors, wanted, general = plain(), {}, bits
    for seed, (name, (n, k)) in enumerate(LINEARS.items()):
        own = OVERRIDES.get(name, {}) if "dynamic" in fields else {}
        if own is False:
            tensors[f"{name}.weight"] = np.ones((n, k), np.float16)
            continue
        bits = own.get("bits", general)
        size = own.get("group_size", k if group == -1 else group)
        codes, zeros, scales = random_codes(n, k, k // size, bits, seed)
        zeros = np.full_like(zeros, 2 ** (bits - 1)) if sym else zeros
        place = np.arange(k) // size
        if desc_act:
            place = np.random.default_rng(99).permutation(place)
        stored = zeros - 1 if version == "gptq" else zeros
        tensors |= {
            f"{name}.qweight": rows(codes, bits).T,
            f"{name}.qzeros": rows(stored.T, bits),
            f"{name}.scales": scales.T,
            f"{name}.g_idx": place.astype(np.int32),
        }
        wanted[f"{name}.weight"] = meant(codes, zeros, scales, place)
    config = {"quant_method": "gptq", "bits": general, "group_size": group, "sym": sym}
    config |= {"desc_act": desc_act, "checkpoint_format": version, "damp_percent": 0.01}
    config |= {"true_sequential": True, "meta": {"quantizer": ["gptqmodel:5.0.0"]}}
    if elsewhere:
        del config["quant_method"], config["checkpoint_format"]
        write(folder, tensors, None)
        model = json.loads((folder / "config.json").read_text())
        del model["quantization_config"]
        (folder / "config.json").write_text(json.dumps(model))
        (folder / "quantize_config.json").write_text(json.dumps(config))
        return folder, wanted
    return write(folder, tensors, config | fields), wanted


def awq(folder, *, group=32, zero_point=True, **fields):
    """A folder of version gemm: outputs 0 2 4 6 1 3 5 7 of eight in a word, the first lowest."""
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    tensors, wanted = plain(), {}

    def packed(table):  # (N, rows) to (rows, N / 8)
        eights = table.T.reshape(table.shape[1], -1, 8)[..., order]
        return rows(eights.reshape(table.shape[1], -1), 4)

    for seed, (name, (n, k)) in enumerate(LINEARS.items()):
        size = k if group == -1 else group
        codes, zeros, scales = random_codes(n, k, k // size, 4, seed)
        zeros = zeros if zero_point else np.full_like(zeros, 8)
        tensors |= {
            f"{name}.qweight": packed(codes),
            f"{name}.qzeros": packed(zeros),
            f"{name}.scales": scales.T,
        }
        wanted[f"{name}.weight"] = meant(codes, zeros, scales, np.arange(k) // size)
    config = {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": zero_point}
    config |= {"version": "gemm", "modules_to_not_convert": None}
    return write(folder, tensors, config | fields), wanted


def awq_rows(folder, *, group=32):
    """Version gemv: rows of outputs, all in order; zeros and scales filled up with nothing."""
    tensors, wanted = plain(), {}
    for seed, (name, (n, k)) in enumerate(LINEARS.items()):
        size = k if group == -1 else group
        codes, zeros, scales = random_codes(n, k, k // size, 4, seed)
        width = {32: 4, 64: 2}.get(size, 1)
        words_a_row = math.ceil(math.ceil((k // size) / 8) / width) * width
        full = np.zeros((n, 8 * words_a_row), np.float16)
        full[:, : k // size] = scales
        tensors |= {
            f"{name}.qweight": rows(codes, 4),
            f"{name}.qzeros": np.zeros((n, words_a_row), np.int32),
            f"{name}.scales": full,
        }
        packed = rows(zeros, 4)
        tensors[f"{name}.qzeros"][:, : packed.shape[1]] = packed
        wanted[f"{name}.weight"] = meant(codes, zeros, scales, np.arange(k) // size)
    config = {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True}
    return write(folder, tensors, config | {"version": "gemv"}), wanted


def scheme(**weights):
    """A config of compressed-tensors of one group."""
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None}
    group |= {"output_activations": None}
    config = {"config_groups": {"group_0": group}, "quant_method": "compressed-tensors"}
    return config | {"ignore": ["lm_head"], "quantization_status": "compressed"}


def pack_quantized(folder, *, bits=4, group=32, sym=True, plain_zeros=False, order=None):
    """Symmetric or not, in groups or a scale a row; zeros packed, or plain as of old."""
    tensors, wanted = plain(), {}
    half = 2 ** (bits - 1)
    for seed, (name, (n, k)) in enumerate(LINEARS.items()):
        size = k if group == -1 else group
        codes, zeros, scales = random_codes(n, k, k // size, bits, seed)
        zeros = np.full_like(zeros, half) if sym else zeros
        place = np.arange(k) // size
        tensors |= {
            f"{name}.weight_packed": rows(codes, bits),
            f"{name}.weight_scale": scales,
            f"{name}.weight_shape": np.int64([n, k]),
        }
        if order is not None:
            place = np.random.default_rng(99).permutation(place) if order == "own" else place
            idx = np.full(k, -1) if order == "none" else place
            tensors[f"{name}.weight_g_idx"] = idx.astype(np.int32)
        if not sym:
            old, new = (zeros - half).astype(np.int8), rows(zeros.T, bits).T
            tensors[f"{name}.weight_zero_point"] = old if plain_zeros else new
        wanted[f"{name}.weight"] = meant(codes, zeros, scales, place)
    config = scheme(
        num_bits=bits,
        type="int",
        symmetric=sym,
        strategy="channel" if group == -1 else "group",
        group_size=None if group == -1 else group,
        actorder="group" if order == "own" else None,
    )
    return write(folder, tensors, config | {"format": "pack-quantized"}), wanted


def to_e4m3(values):
    """The nearest numbers of E4M3 (ties either way), and their bytes: sign, exponent, mantissa."""
    octets = np.arange(127)
    exponent, mantissa = octets >> 3, octets & 7
    grid = np.where(exponent > 0, (1 + mantissa / 8) * 2.0 ** (exponent - 7), mantissa * 2.0**-9)
    nearest = np.abs(np.abs(values)[..., None] - grid).argmin(-1)
    sign = (values < 0) & (nearest > 0)
    return np.where(sign, -grid[nearest], grid[nearest]), (nearest | sign << 7).astype(np.uint8)


def float8(folder, config, scale_name, block, *, scale_dtype=np.float32, extra=(), single=False):
    """8-bit floats with a scale a block (None: of that many rows or columns as there are)."""
    import jax.numpy as jnp  # the one type that numpy has no name for

    tensors, wanted = plain(np.float32), {}
    for seed, (name, (n, k)) in enumerate(LINEARS.items()):
        random = np.random.default_rng(seed)
        rows, columns = block[0] or n, block[1] or k
        values, octets = to_e4m3(random.standard_normal((n, k)) * 40)
        scales = random.uniform(0.001, 0.01, (-(-n // rows), -(-k // columns))).astype(scale_dtype)
        wide = np.repeat(np.repeat(scales.astype(np.float64), rows, 0), columns, 1)[:n, :k]
        tensors[f"{name}.weight"] = octets.view(jnp.float8_e4m3fn)
        tensors[f"{name}.{scale_name}"] = scales.reshape(1) if single else scales
        tensors |= {f"{name}.{key}": np.ones(1, np.float32) for key in extra}
        wanted[f"{name}.weight"] = (values * wide).astype(np.float32)
    return write(folder, tensors, config, torch_dtype="float32"), wanted


def fp8(folder, *, block=(32, 32), **fields):
    """As DeepSeek has it, or with one scale a tensor."""
    config = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}
    config["weight_block_size"] = None if block is None else list(block)
    options = {"single": block is None}
    return float8(folder, config | fields, "weight_scale_inv", block or (None, None), **options)


def modelopt_fp8(folder, *, elsewhere=True):
    """As NVIDIA's library has it: what it says in a file of its own, or in the config."""
    options = {"extra": ("input_scale",), "single": True}
    kv, named = {"kv_cache_quant_algo": None}, {"quant_method": "modelopt", "ignore": ["lm_head"]}
    config = {"quant_algo": "FP8"} | ({**kv, "exclude_modules": ["lm_head"]} if elsewhere else {})
    scheme8 = {"dynamic": False, "num_bits": 8, "type": "float"}
    group = {"config_groups": {"group_0": {"input_activations": scheme8, "weights": scheme8}}}
    folder, wanted = float8(
        folder,
        None if elsewhere else config | named | group,
        "weight_scale",
        (None, None),
        **options,
    )
    if elsewhere:
        producer = {"name": "modelopt", "version": "0.29.0"}
        content = {"producer": producer, "quantization": config}
        (folder / "hf_quant_config.json").write_text(json.dumps(content))
    return folder, wanted


def float_quantized(folder, strategy="channel", inputs=None):
    """As compressed-tensors has it, activations quantized or not."""
    block = {"channel": (1, None), "tensor": (None, None), "block": (32, 32)}[strategy]
    arguments = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": strategy}
    arguments |= {"block_structure": [32, 32]} if strategy == "block" else {}
    config = scheme(**arguments) | {"format": "float-quantized"}
    config["config_groups"]["group_0"]["input_activations"] = inputs
    extra = ("input_scale",) if inputs else ()
    single = strategy == "tensor"
    return float8(folder, config, "weight_scale", block, extra=extra, single=single)


def int_quantized(folder, sym=False):
    """Whole bytes, a scale a row, with zero points."""
    tensors, wanted = plain(), {}
    for seed, (name, (n, k)) in enumerate(LINEARS.items()):
        codes, zeros, scales = random_codes(n, k, 1, 8, seed)
        tensors[f"{name}.weight"] = (codes - 128).astype(np.int8)
        tensors[f"{name}.weight_scale"] = scales
        zeros = np.full_like(zeros, 128) if sym else zeros
        if not sym:
            tensors[f"{name}.weight_zero_point"] = (zeros - 128).astype(np.int8)
        wanted[f"{name}.weight"] = meant(codes, zeros, scales, np.zeros(k, int))
    config = scheme(num_bits=8, type="int", symmetric=sym, strategy="channel")
    return write(folder, tensors, config | {"format": "int-quantized"}), wanted


# What each writer can: by name.
CASES = {
    "gptq": (gptq, {}),
    "gptq g64": (gptq, {"group": -1}),
    "gptq 8": (gptq, {"bits": 8}),
    "gptq 3": (gptq, {"bits": 3, "sym": False, "version": "gptq_v2"}),
    "gptq 2": (gptq, {"bits": 2, "version": "gptq_v2", "sym": False}),
    "gptq v2 asymmetric": (gptq, {"sym": False, "version": "gptq_v2"}),
    "gptq v1 asymmetric": (gptq, {"sym": False}),
    "gptq act order": (gptq, {"desc_act": True}),
    "gptq of old": (gptq, {"elsewhere": True}),
    "gptq dynamic": (gptq, {"dynamic": DYNAMIC}),
    "awq": (awq, {}),
    "awq gemv": (awq_rows, {}),
    "awq gemv, one group": (awq_rows, {"group": -1}),
    "awq symmetric": (awq, {"zero_point": False, "checkpoint_format": "gemm", "sym": True}),
    "awq one group": (awq, {"group": -1}),
    "pack": (pack_quantized, {}),
    "pack rows": (pack_quantized, {"group": -1}),
    "pack 8": (pack_quantized, {"bits": 8}),
    "pack 2": (pack_quantized, {"bits": 2, "sym": False}),
    "pack asymmetric": (pack_quantized, {"sym": False}),
    "pack old zeros": (pack_quantized, {"sym": False, "plain_zeros": True}),
    "pack no order": (pack_quantized, {"order": "none"}),
    "pack own order": (pack_quantized, {"order": "own"}),
}
EIGHT_BITS = {
    "fp8 blocks": (fp8, {}),
    "fp8 blocks that do not tile": (fp8, {"block": (40, 48)}),
    "fp8 tensor": (fp8, {"block": None}),
    "modelopt": (modelopt_fp8, {}),
    "modelopt, in the config": (modelopt_fp8, {"elsewhere": False}),
    "float rows": (float_quantized, {}),
    "float tensor": (float_quantized, {"strategy": "tensor"}),
    "float blocks": (float_quantized, {"strategy": "block"}),
    "int": (int_quantized, {}),
    "int symmetric": (int_quantized, {"sym": True}),
}
