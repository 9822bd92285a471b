"""Text as tokens."""

import json

import pytest

from wush_jax.models.text import Tokenizer


def folder(path, **config):
    (path / "config.json").write_text(json.dumps(config))
    return path


def test_bytes_where_the_vocabulary_is_bytes(tmp_path):
    tokenizer = Tokenizer.read(folder(tmp_path, vocab_size=256, eos_token_id=7))
    assert tokenizer.encode("é") == [0xC3, 0xA9]
    assert tokenizer.decode([0xC3, 0xA9, 0xC3]) == "é\ufffd"
    assert tokenizer.stop_tokens == (7,)


def test_the_generation_config_says_where_texts_end(tmp_path):
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [3, 4]}')
    assert Tokenizer.read(folder(tmp_path, vocab_size=256, eos_token_id=7)).stop_tokens == (3, 4)


def test_no_tokenizer_is_refused(tmp_path):
    with pytest.raises(ValueError, match="1000 tokens are no bytes"):
        Tokenizer.read(folder(tmp_path, vocab_size=1000))


def test_the_tokenizer_of_the_folder(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {"the": 0, "quick": 1, "fox": 2, "?": 3, "<s>": 4}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="?"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    inner.add_special_tokens(["<s>"])
    inner.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 4)]
    )
    inner.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.read(folder(tmp_path, vocab_size=5))
    assert tokenizer.encode("the fox the quick") == [4, 0, 2, 0, 1]
    assert tokenizer.encode("fox", special=False) == [2]
    assert tokenizer.decode([4, 0, 2]) == "the fox"


def test_a_tokenizer_without_its_package_is_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tokenizers", None)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"wush-jax\[hf\]"):
        Tokenizer.read(folder(tmp_path, vocab_size=5))
