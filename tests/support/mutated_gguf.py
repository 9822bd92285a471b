"""Changes of one entry of a GGUF file, written anew by the ``gguf`` package."""

import gguf
import hypothesis.strategies as st
import numpy as np
from gguf.constants import GGUFValueType

Kind = gguf.GGMLQuantizationType
# Of blocks of as many bytes: the file's size tells them not apart.
SAME_SIZE = [{Kind.F16, Kind.BF16}, {Kind.F32, Kind.I32}, {Kind.Q8_0}, {Kind.Q4_0}, {Kind.Q4_1}]
TYPES = {
    GGUFValueType.UINT32: [0, 1, 2, 3, 33, 2**31, 2**32 - 1],
    GGUFValueType.INT32: [0, -1, 1, 2],
    GGUFValueType.FLOAT32: [0.0, -1.5, 0.5, 1e30, 1e-30, float("nan"), float("inf")],
    GGUFValueType.STRING: ["", "x", "llama", "qwen2", "gemma", "a" * 300],
    GGUFValueType.BOOL: [True, False],
}
OWN = ("GGUF.version", "GGUF.tensor_count", "GGUF.kv_count")


def parts(file):
    """Its fields (value, type, type of entries), and its tensors (bytes in rows, shape, type)."""
    reader = gguf.GGUFReader(file)
    fields = {
        name: (field.contents(), field.types[0], field.types[-1])
        for name, field in reader.fields.items()
        if name not in OWN
    }
    tensors = {
        t.name: (np.array(t.data), [int(n) for n in t.shape[::-1]], t.tensor_type)
        for t in reader.tensors
    }
    return fields, tensors


def write(file, fields, tensors):
    writer = gguf.GGUFWriter(file, "none")
    writer.kv_data[0].clear()  # the architecture is one of the fields
    for name, (value, kind, entries) in fields.items():
        if kind != GGUFValueType.ARRAY:
            writer.add_key_value(name, value, kind)
        else:
            writer.add_key_value(name, value, kind, entries)
    for name, (data, shape, kind) in tensors.items():
        octets = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
        writer.add_tensor_info(name, shape, np.dtype(np.float32), octets.nbytes, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    out = writer.fout[0]
    writer.write_padding(out, out.tell())
    for data, _, _ in tensors.values():
        octets = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
        out.write(octets.tobytes())
        writer.write_padding(out, octets.nbytes)
    writer.close()


@st.composite
def gguf_changes(draw, folder):
    """One field or one tensor: gone, of another name, type, shape or value."""
    (file,) = folder.glob("*.gguf")
    fields, tensors = parts(file)
    change = draw(st.sampled_from([_field, _field, _tensor]))
    what = change(draw, fields, tensors)
    changed = folder.parent / "changed.part"
    write(changed, fields, tensors)
    content = changed.read_bytes()
    changed.unlink()
    return file.name, content, what


def _field(draw, fields, tensors):
    name = draw(st.sampled_from(sorted(fields)))
    old, kind, entries = fields[name]
    act = draw(st.sampled_from(["delete", "rename", "value", "value", "value", "type"]))
    if act in ("delete", "rename"):
        del fields[name]
        new = draw(st.sampled_from([f"{name}s", "x", name.upper()]))
        if act == "rename":
            fields[new] = old, kind, entries
        return (name,), act, old, "gone"
    known = sorted(TYPES, key=int)
    kind = kind if act == "value" and kind in TYPES else draw(st.sampled_from(known))
    value = draw(st.sampled_from(TYPES[kind]))
    fields[name] = value, kind, kind
    return (name,), act, old, value


def _tensor(draw, fields, tensors):
    name = draw(st.sampled_from(sorted(tensors)))
    data, shape, kind = tensors[name]
    act = draw(st.sampled_from(["delete", "rename", "copy", "dtype", "shape", "byte"]))
    if act in ("delete", "rename", "copy"):
        gone = tensors[name] if act == "copy" else tensors.pop(name)
        new = draw(st.sampled_from([f"{name}s", name.replace("blk.0", "blk.1"), "x"]))
        if act != "delete":
            tensors[new] = gone
    elif act == "dtype":
        same = next((group for group in SAME_SIZE if kind in group), {kind})
        tensors[name] = data, shape, draw(st.sampled_from(sorted(same | {Kind.F32, Kind.Q8_0})))
    elif act == "shape":
        new = draw(st.sampled_from([shape[::-1], [*shape, 1], [int(np.prod(shape))]]))
        tensors[name] = data, new, kind
    else:
        octets = np.ascontiguousarray(data).reshape(-1).view(np.uint8).copy()
        octets[draw(st.integers(0, len(octets) - 1))] ^= 1 << draw(st.integers(0, 7))
        tensors[name] = octets, shape, kind
    return name, act, kind, shape
