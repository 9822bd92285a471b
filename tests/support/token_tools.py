"""Tokenizers of a few lines for tests, in the files of the ``tokenizers`` package."""

import json

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' and strict %}"
    "{{ raise_exception('no system') }}{% endif %}[{{ m.role }}]{{ m.content }}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


def byte_tokenizer(folder, *, bos=None, eos=None, truncation=None, padding=None, **settings):
    """Write one whose ids are bytes, with 256 and 257 for the named tokens; return it."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]  # the others are moved up
    moved = [byte for byte in range(256) if byte not in shown]
    names = {chr(byte): byte for byte in shown} | {chr(256 + i): b for i, b in enumerate(moved)}
    inner = Tokenizer(models.BPE(vocab=names, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(name, special=True) for name in (bos, eos) if name])
    if bos:
        inner.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, inner.token_to_id(bos))]
        )
    if truncation:
        inner.enable_truncation(truncation)
    if padding:
        inner.enable_padding(length=padding, pad_id=0, pad_token=chr(256))
    inner.save(str(folder / "tokenizer.json"))
    _write_settings(folder, bos, eos, settings)
    return inner


def word_tokenizer(folder, words, **settings):
    """Write one of words as Llama 2 and Mistral have them: a space belongs to its word."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {name: i for i, name in enumerate(["<unk>", "<s>", "</s>"])}
    vocabulary |= {f"▁{word}": i + 3 for i, word in enumerate(words)}
    inner = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token="<unk>"))
    inner.add_special_tokens(["<s>", "</s>"])
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    inner.save(str(folder / "tokenizer.json"))
    _write_settings(folder, "<s>", "</s>", settings)
    return inner


def _write_settings(folder, bos, eos, settings):
    content = {"tokenizer_class": "PreTrainedTokenizerFast", **settings}
    content |= {name: token for name, token in (("bos_token", bos), ("eos_token", eos)) if token}
    (folder / "tokenizer_config.json").write_text(json.dumps(content))
