"""Text as tokens."""

import json

import numpy as np
import pytest
from token_tools import TEMPLATE, byte_tokenizer, word_tokenizer

from wush_jax.commands.options import Text
from wush_jax.models.chat import ChatTemplate
from wush_jax.models.text import Tokenizer


def folder(path, **config):
    (path / "config.json").write_text(json.dumps({"model_type": "llama"} | config))
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
    with pytest.raises(ValueError, match=r"no tokenizer.json, and config.json no vocab_size: add"):
        Tokenizer.read(folder(tmp_path))


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
    with pytest.raises(ValueError, match=r"wush-jax\[hub\]"):
        Tokenizer.read(folder(tmp_path, vocab_size=5))


BOS, EOS = {"bos": "<s>", "eos": "</s>"}, {"eos": "</s>"}
CONFIG = {"vocab_size": 258, "max_position_embeddings": 64}


def bytes_in(path, **options):
    pytest.importorskip("tokenizers")
    byte_tokenizer(path, **options)
    return Tokenizer.read(folder(path, **CONFIG))


def test_truncation_and_padding_of_the_file_are_not_applied(tmp_path):
    text = "0123456789" * 2000
    cut = bytes_in(tmp_path, **BOS, truncation=512)
    assert cut.encode(text) == [256, *text.encode()]
    filled = bytes_in(tmp_path, **BOS, padding=64)
    assert filled.encode("hello") == [256, *b"hello"]


def test_no_text_begins_twice(tmp_path):
    tokenizer = bytes_in(tmp_path, **BOS)
    assert tokenizer.encode("<s>hi") == tokenizer.encode("hi") == [256, *b"hi"]
    assert tokenizer.begins_itself("<s>hi")
    assert not tokenizer.begins_itself("hi")
    assert tokenizer.prefix == [256]
    assert tokenizer.encode("<s>hi", special=False) == [256, *b"hi"]


def test_special_tokens_in_a_text_are_those_or_text(tmp_path):
    """transformers takes them for tokens unless ``split_special_tokens`` is set."""
    tokenizer = bytes_in(tmp_path, **BOS)
    assert tokenizer.encode("a</s>b", special=False) == [97, 257, 98]
    assert tokenizer.encode("a</s>b", special=False, split_special=True) == [*b"a</s>b"]
    assert tokenizer.encode("a</s>b", special=False) == [97, 257, 98]
    assert tokenizer.decode([256, 97, 257]) == "a"
    assert tokenizer.decode([256, 97, 257], special=True) == "<s>a</s>"


def test_bos_by_rule_always_or_never(tmp_path):
    own = bytes_in(tmp_path, **BOS)
    assert own.with_bos("auto") is own
    assert own.with_bos("never").encode("<s>a") == [256, 97]
    assert own.with_bos("never").encode("a") == [97]
    assert own.with_bos("always").encode("a") == own.with_bos("always").encode("<s>a") == [256, 97]
    with pytest.raises(ValueError, match="bos='always': neither"):
        bytes_in(tmp_path, **EOS).with_bos("always")
    plain = Tokenizer(bos=1).with_bos("always")
    assert plain.encode("a") == [1, 97]


@pytest.mark.parametrize("settings", [{}, {"add_bos_token": False}, {"add_eos_token": True}])
def test_the_rule_is_the_tokenizers_alone_as_in_transformers(settings, tmp_path):
    tokenizer = bytes_in(tmp_path, **BOS, **settings)
    assert tokenizer.encode("a") == [256, 97]
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs("a")["input_ids"] == [256, 97]


def test_the_tokenizer_says_where_texts_end_if_no_config_does(tmp_path):
    assert bytes_in(tmp_path, **BOS).stop_tokens == (257,)
    tokenizer = Tokenizer.read(folder(tmp_path, **CONFIG, eos_token_id=[3, 4], bos_token_id=5))
    assert (tokenizer.stop_tokens, tokenizer.eos, tokenizer.bos) == ((3, 4), 257, 256)


def test_a_continuation_keeps_its_space(tmp_path):
    """Metaspace tokenizers drop the space before the first word of what they decode."""
    pytest.importorskip("tokenizers")
    word_tokenizer(tmp_path, ["hello", "world", "is"])
    tokenizer = Tokenizer.read(folder(tmp_path, vocab_size=6))
    prompt = tokenizer.encode("hello")
    assert tokenizer.decode([4, 5]) == "world is"
    assert tokenizer.continuation(prompt, [4, 5]) == " world is"


def test_a_continuation_completes_a_character():
    plain = Tokenizer()
    assert plain.continuation(list("né".encode())[:-1], list("é".encode())[1:]) == "é"


@pytest.mark.parametrize(
    "content", ["{}", "[]", "", '{"model": {"type": "BPE"}}', '{"version": "1.0", "model": 3}']
)
def test_files_that_are_no_tokenizers_are_named(content, tmp_path):
    pytest.importorskip("tokenizers")
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match=r"tokenizer.json is no tokenizer .* fetch it again"):
        Tokenizer.read(folder(tmp_path, **CONFIG))


@pytest.mark.parametrize("name", ["eos_token_id", "bos_token_id"])
@pytest.mark.parametrize("value", ["</s>", -1, 2.0, [1, None], {}])
def test_ids_that_are_none_are_named(name, value, tmp_path):
    with pytest.raises(ValueError, match=f"{name}="):
        Tokenizer.read(folder(tmp_path, vocab_size=256, **{name: value}))
    (tmp_path / "generation_config.json").write_text(f'{{"{name}": 3}}')
    with pytest.raises(ValueError, match=f"{name}="):
        Tokenizer.read(tmp_path)


def test_text_that_is_no_unicode(tmp_path):
    with pytest.raises(ValueError, match="no valid Unicode"):
        bytes_in(tmp_path, **BOS).encode("\udce9")


def test_what_the_tokenizer_has_no_token_for(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    model = tokenizers.models.WordLevel({"the": 0}, unk_token="?")
    tokenizers.Tokenizer(model).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match="has no tokens for the text"):
        Tokenizer.read(folder(tmp_path, **CONFIG)).encode("fox")


def windows(path, **options):
    """Windows of 8 tokens of a text that fills some, for a folder that has no weights but names."""
    from safetensors.numpy import save_file

    save_file({"x": np.zeros(1, np.float32)}, path / "model.safetensors")
    (path / "text.txt").write_text("abcdefg" * 5 + "xyz")
    return Text(text=(path / "text.txt",), length=8, samples=None, **options).windows(path)


def test_every_window_begins_as_texts_do(tmp_path):
    bytes_in(tmp_path, **BOS)
    found = windows(tmp_path)
    assert [row.tolist() for row in found.rows] == [[256, *b"abcdefg"]] * 5
    assert found.left_out == 3
    plain = windows(tmp_path, bos="never")
    assert plain.rows[0].tolist() == list(b"abcdefga")
    assert len(plain.rows) == 4


def test_a_text_of_another_models_tokenizer_is_refused(tmp_path):
    bytes_in(tmp_path, **BOS)
    folder(tmp_path, vocab_size=200)
    with pytest.raises(ValueError, match=r"text.txt, as the tokenizer of .*256 at row 0, column 0"):
        windows(tmp_path)


def test_a_text_is_one_path_or_several(tmp_path):
    file = tmp_path / "text.txt"
    for given in (file, str(file), [file], (str(file),)):
        assert Text(text=given) == Text(text=(file,))
    bytes_in(tmp_path, **BOS)
    (expected,) = windows(tmp_path).taken.values()
    assert Text(text=file, length=8).windows(tmp_path).taken == {str(file): expected}
    assert Text(tokens=str(file)) == Text(tokens=file)


@pytest.mark.parametrize(
    ("name", "values", "remedy"),
    [
        ("text", [3, (3,), {file: 1 for file in "ab"}], "a path, or a tuple of paths"),
        ("tokens", [3, ("a.npy",), np.arange(3)], "the path of one .npy file"),
        ("shares", [3, (0,), ("1",), (float("nan"),), (float("inf"), 1)], "positive numbers"),
        ("length", [0, -1, "8", 8.0, None, True], "at least 1, a whole number"),
        ("samples", [0, -1, "8", 8.0, True], "at least 1, a whole number"),
        ("batch", [0, -1, "8", 8.0, None], "at least 1, a whole number"),
        ("seed", [-1, "8", 8.0], "a whole number, 0 or more"),
        ("pad_id", [-2, "8", 8.0], "an id, or -1 for none"),
        ("bos", [None, "maybe", ["auto"]], "auto, always or never"),
        ("split_special_tokens", [None, 1, "yes"], "True or False"),
    ],
)
def test_settings_of_a_text_that_are_none(name, values, remedy):
    for value in values:
        with pytest.raises(ValueError, match=f"--{name.replace('_', '-')} .*{remedy}"):
            Text(**{name: value})
    with pytest.raises(ValueError, match=r"--batch 'x'.*; --bos 3: "):
        Text(batch="x", bos=3)


CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": 'Say "<é>"'},
    {"role": "assistant", "content": "Well "},
]


def test_conversations(tmp_path):
    pytest.importorskip("jinja2")
    chat = bytes_in(tmp_path, **BOS, chat_template=TEMPLATE).chat
    expected = '<s>[system]Be brief.</s>[user]Say "<é>"</s>'
    assert chat.render(CHAT[:2]) == expected
    assert chat.render(CHAT[:2], add_generation_prompt=True) == expected + "[assistant]"
    assert chat.render(CHAT, continue_final=True) == expected + "[assistant]Well "
    with pytest.raises(ValueError, match=r"refuses the conversation .no system"):
        chat.render(CHAT, strict=True)
    tokenizer = Tokenizer.read(tmp_path)
    assert tokenizer.encode(expected)[:2] == [256, ord("[")]


def test_templates_of_files(tmp_path):
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    assert bytes_in(tmp_path, **BOS, chat_template=named).chat.source == "d"
    (tmp_path / "chat_template.json").write_text('{"chat_template": "json"}')
    assert Tokenizer.read(tmp_path).chat.source == "json"
    (tmp_path / "chat_template.jinja").write_text("jinja")
    assert Tokenizer.read(tmp_path).chat.source == "jinja"
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"chat_template.jinja is no UTF-8"):
        Tokenizer.read(tmp_path)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ([{"name": "tool_use", "template": "t"}], "is 'default'"),
        (3, "is a int"),
    ],
)
def test_templates_that_are_none(template, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        bytes_in(tmp_path, **BOS, chat_template=template)


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{% for x in messages %}{{ x.append(1) }}{% endfor %}",
        "{% if %}",
        "{{ 1 / 0 }}",
        "{{ messages[9].role + 1 }}",
        "{{ nobody.knows }}",
    ],
)
def test_templates_that_want_more_are_refused(source):
    pytest.importorskip("jinja2")
    with pytest.raises(ValueError, match="the chat template refuses"):
        print(ChatTemplate(source).render([{"role": "user", "content": "x"}]))


def test_templates_as_transformers_renders_them():
    """White space of blocks, JSON without escapes, loop controls, marks of generation."""
    source = (
        "{% for m in messages %}\n  {% if loop.index > 2 %}{% break %}{% endif %}\n"
        "{{ m | tojson }}\n{% generation %}{{ m.content }}{% endgeneration %}\n{% endfor %}"
        "{{ tools is none }}"
    )
    expected = (
        '{"role": "system", "content": "Be brief."}\nBe brief.'
        '{"role": "user", "content": "Say \\"<é>\\""}\nSay "<é>"True'
    )
    pytest.importorskip("jinja2")
    assert ChatTemplate(source).render(CHAT) == expected
    transformers = pytest.importorskip("transformers")
    render = transformers.utils.chat_template_utils.render_jinja_template
    assert render([CHAT], chat_template=source)[0] == [expected]
