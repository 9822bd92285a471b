"""What a run is given: copies of folders, edited; files of tokens; texts; flags."""

import json
import shutil

import numpy as np
from hypothesis import strategies as st
from machine import run
from mutations import EDITS

FLAGS = {
    "length": [8, 8, 8, 16, 3, 99, 1, 0, -1, "x"],
    "batch": [4, 4, 1, 0, "2.5"],
    "samples": [3, 1, 0, -2],
    "bos": ["auto", "always", "never", "maybe"],
}


class Run:
    """One run: its folder, what was drawn for it, and what came out."""

    def __init__(self, draw, world, work):
        self.draw, self.world, self.work, self.log = draw, world, work, []
        self.names = []

    def run(self, argv):
        """Run the command; flags may be named in a refusal, as may the fields that they set."""
        flags = [word for word in map(str, argv) if word.startswith("--")]
        self.names += flags + [f"{flag[2:].replace('-', '_')}=" for flag in flags]
        return run(argv)

    def pick(self, values):
        return self.draw(st.sampled_from(list(values)))

    def copies(self, kind, edits=(0, 1, 1, 1, 2)):
        """Copy a folder and its twin, and edit both; no edit of values where there is no twin."""
        shutil.rmtree(self.work, ignore_errors=True)
        self.work.mkdir()
        folders = [shutil.copytree(getattr(self.world, kind), self.work / "model")]
        if (twin := self.world.twin(kind)) is not None:
            folders.append(shutil.copytree(twin, self.work / "twin"))
        allowed = list(EDITS) if kind == "source" else ["config", "json", "file", "file"]
        for _ in range(self.pick(edits)):
            try:
                self.log.append(EDITS[self.pick(allowed)](self.draw, folders))
            except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError):
                self.log.append("no edit: an earlier one left nothing to change")
        self.names += [f.name for f in folders[0].iterdir()] + [str(self.work)]
        return folders

    def flags(self, names):
        """Draw some flags, most of them good."""
        found = []
        for name in names:
            values = FLAGS[name]
            if name == "length" or self.pick([True, False, False]):
                found += [f"--{name}", self.pick(values)]
        self.log.append(" ".join(map(str, found)))
        return found

    def tokens(self):
        """Write a file of tokens; return flags and the documents, None where there are none."""
        kind = self.pick(["good", "good", "rows", "any", "bytes"])
        random = np.random.default_rng(self.draw(st.integers(0, 9)))
        values = random.integers(3, 64, {"rows": (3, 9)}.get(kind, (40,)))
        if kind == "any":
            dtype = self.pick(["u1", "u2", "u8", "i1", "i8", ">i4", "f4", "?", "U1"])
            shape = tuple(self.draw(st.lists(st.sampled_from([0, 1, 9, 20]), max_size=3)))
            high = self.pick([2, 64, 65, 200])
            values = random.integers(-1 if dtype == "i8" else 0, high, shape).astype(dtype)
        file = self.work / "tokens.npy"
        np.save(file, values)
        if kind == "bytes":
            file.write_bytes(self.draw(st.binary(max_size=20)))
        self.log.append(f"tokens {kind} {values.dtype} {values.shape}")
        documents = None
        if kind != "bytes" and values.dtype.kind in "iu" and values.ndim in (1, 2) and values.size:
            documents = [values] if values.ndim == 1 else list(values)
        return ["--tokens", file, "--pad-id", -1], documents

    def text(self):
        """Write a text; return flags and its bytes."""
        words = st.lists(st.sampled_from(["w1", "w7", "w60", "x", "<s>", "</s>", "", "é"]))
        content = self.draw(
            st.one_of(
                words.map(" ".join).map(str.encode),
                st.just(b" ".join(b"w%d" % (i % 61) for i in range(40))),
                st.binary(max_size=30),
                st.just("\ufeffw1 w2 w3 w4 w5 w6 w7 w8 w9 w10".encode("utf-8")),
                st.just("w1 w2 w3 w4 w5 w6 w7 w8 w9".encode("utf-16")),
            )
        )
        (self.work / "text.txt").write_bytes(content)
        self.log.append(f"text {content[:40]!r}")
        return ["--text", self.work / "text.txt"], content

    def texts(self, folder, flags):
        """Draw tokens or a text; return flags and a function that cuts windows of them."""
        settings = dict(zip(flags[::2], flags[1::2], strict=True))
        if self.pick([True, True, False]):
            more, documents = self.tokens()
            return more, lambda: windows(documents, folder, settings, prefix_of(folder, settings))
        more, content = self.text()
        return more, lambda: text_windows(content, folder, settings)


def prefix_of(folder, settings):
    """What goes before a file of tokens."""
    if settings.get("--bos") != "always":
        return []
    return [json.loads((folder / "config.json").read_text())["bos_token_id"]]


def windows(documents, folder, settings, prefix):
    """Cut documents as the pages say."""
    positions = json.loads((folder / "config.json").read_text()).get("max_position_embeddings")
    length = min(int(settings["--length"]), 2048 if positions is None else positions)
    room, limit, found = length - len(prefix), settings.get("--samples"), []
    for document in documents:
        body = np.asarray(document).astype(np.int64)
        if prefix and body[: len(prefix)].tolist() == prefix:
            body = body[len(prefix) :]
        count = max(1, len(body) // room)
        rows = (body[i * room :][:room] for i in range(count))
        found += [np.r_[np.asarray(prefix, np.int64), row] for row in rows]
    return found[: None if limit is None else int(limit)]


def text_windows(content, folder, settings):
    """Cut a text: by the tokenizer of the package itself."""
    inner = tokenizer(folder)
    text = content.decode("utf-8-sig")
    ids = inner.encode(text, add_special_tokens=False).ids
    whole = inner.encode(text, add_special_tokens=True).ids
    rule = settings.get("--bos", "auto")
    prefix = whole[: len(whole) - len(ids)] if rule == "auto" else []
    if rule == "always":
        names = json.loads((folder / "tokenizer_config.json").read_text())
        prefix = [inner.token_to_id(token_name(names["bos_token"]))]
    return windows([np.asarray(ids)], folder, settings, prefix)


def token_name(token):
    return token["content"] if isinstance(token, dict) else token


def tokenizer(folder):
    import tokenizers

    inner = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    inner.no_truncation()
    inner.no_padding()
    return inner
