"""Folders of every layout with one entry of a config, or one tensor, changed.

Each is refused by an error that names the entry or the tensor, or computes what it did. What files
without checksums cannot tell from other valid ones is taken at its word, and listed here.
"""

import json
import shutil

import hypothesis
import hypothesis.strategies as st
import mutated_folders
import pytest
from hypothesis import settings

pytestmark = pytest.mark.files

# Native files have digests and checksums: nothing else is ever read of them.
SEALED = ("native", "native-shards", "hadamard")
# Constants of a model and of its inputs: other ones are other models, as valid as the first.
AT_THEIR_WORD = {
    *("rope_theta", "rms_norm_eps", "sliding_window", "max_window_layers", "use_sliding_window"),
    *("dtype", "torch_dtype", "wush_activation_dtype", "version", "max_position_embeddings"),
    *("model_type", "architectures", "rope_parameters", "rope_scaling", "forward_dtype"),
    *("num_experts_per_tok", "swiglu_limit", "swiglu_alpha"),
    # Decoded since inputs may have an order, or in wider codes since groups may have zero points.
    *("input_activations", "desc_act", "zero_point", "sym", "symmetric"),
    *("llama.context_length", "llama.attention.layer_norm_rms_epsilon", "llama.rope.freq_base"),
    *("qwen3.context_length", "qwen3.attention.layer_norm_rms_epsilon", "qwen3.rope.freq_base"),
}
# Files have no sign of a changed byte, nor of 16 bits that are of another type.
NO_SIGN = ("byte", "dtype")
# What a message may name in place of the entry that was changed: its digest, or what is around it.
INSTEAD = ("digest", "crc32", "quantization_config", "config_groups", "weight_map", "_size=")
INSTEAD += ("input_activations", "head_dim", "[N, K]", "have the layers", "no entry for")
INSTEAD += ("gguf cannot be read",)  # as its package says
INSTEAD += ("have no place in the decoder", "no tensor ends in 'down_proj_blocks'")
INSTEAD += ("hold 8-bit floats",)  # names the copy of a tensor


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    folders = mutated_folders.make_all(tmp_path_factory.mktemp("originals"))
    return {folder: mutated_folders.read(folder) for folder in folders}


def check(originals, data, target):
    """Change one of the folders, read it, and judge."""
    folder = data.draw(st.sampled_from(sorted(originals)))
    change = data.draw(st.sampled_from(mutated_folders.changes(folder)))
    file, content, what = data.draw(change(folder))
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(folder, target)
    (target / file).write_bytes(content)
    where, kind = what[:2]
    try:
        found = mutated_folders.read(target)
    except (ValueError, NotImplementedError) as error:
        text = str(error)
        names = [p for p in (where if isinstance(where, tuple) else (where,)) if isinstance(p, str)]
        parts = [names[-1], *names[-1].split(".")[-2:-1]]  # in Hugging Face's words: up_proj
        named = any(word in text for word in (*parts, *INSTEAD))
        assert named or "surplus" in text, (folder.name, what, text)
        assert target.name in text, (folder.name, what, text)
        return "refused"
    if found == originals[folder]:
        return "same"
    excused = kind in NO_SIGN if isinstance(where, str) else AT_THEIR_WORD & set(map(str, where))
    # llama.cpp has no other word for a head that is the embedding.
    excused = excused or (file.endswith(".gguf") and where == "output.weight" and kind == "delete")
    assert excused, (folder.name, file, what)
    assert folder.name not in SEALED, (folder.name, file, what)
    return "other"


@pytest.mark.parametrize("name", ["plain", "nvfp4", "fp8"])
def test_a_head_that_is_not_the_embedding_is_not_left_out(originals, name, tmp_path):
    (folder,) = (folder for folder in originals if folder.name == name)
    shutil.copytree(folder, tmp_path / name)
    config = json.loads((folder / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    config["tie_word_embeddings"] = True
    (tmp_path / name / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"tie_word_embeddings=True .*lm_head.* differs from"):
        mutated_folders.read(tmp_path / name)


@settings(max_examples=12)
@hypothesis.given(data=st.data())
def test_a_changed_folder_is_refused_or_computes_the_same(originals, data, tmp_path_factory):
    check(originals, data, tmp_path_factory.getbasetemp() / "mutated")


@pytest.mark.slow
@settings(max_examples=10_000, derandomize=False)
@hypothesis.given(data=st.data())
def test_ten_thousand_changed_folders(originals, data, tmp_path_factory):
    check(originals, data, tmp_path_factory.getbasetemp() / "mutated-long")
