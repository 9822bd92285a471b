"""Documents of files, and windows in shares."""

import json

import numpy as np
import pytest

from wush_jax.models.chat import ChatTemplate
from wush_jax.models.documents import joined, mixed, read_documents
from wush_jax.models.text import Tokenizer

pytestmark = pytest.mark.files

CHAT = ChatTemplate("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}")


def lines(path, *records):
    file = path / "some.jsonl"
    file.write_text("\n".join(map(json.dumps, records)) + "\n\n")
    return file


def test_texts_and_conversations(tmp_path):
    talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    file = lines(tmp_path, {"text": "a\u2028b", "id": 1}, {"messages": talk}, {"text": ""})
    assert read_documents(file, CHAT) == ["a\u2028b", "<user>hi<assistant>ho", ""]
    (tmp_path / "a.txt").write_text('{"text": 1}')
    assert read_documents(tmp_path / "a.txt") == ['{"text": 1}']


def test_lines_that_are_none_are_told_at_once(tmp_path):
    file = lines(tmp_path, {"text": "a"}, {"text": 1}, [], {"messages": []}, {})
    with pytest.raises(
        ValueError, match=r"some\.jsonl: line 2: text is a int.*line 3: .*line 4"
    ) as told:
        read_documents(file, CHAT)
    assert "line 4: messages is no list" in str(told.value)
    assert "line 5: expected" in str(told.value)
    with pytest.raises(ValueError, match="line 1: messages need a chat template"):
        read_documents(lines(tmp_path, {"messages": [{"role": "user", "content": ""}]}))
    with pytest.raises(ValueError, match="holds no text"):
        read_documents(lines(tmp_path, {"text": ""}))


def test_documents_are_joined_by_what_ends_a_text():
    class Marked(Tokenizer):
        prefix = (1,)

    tokens = joined(["ab", "\x01c", ""], Marked(eos=2), False)
    assert tokens.tolist() == [97, 98, 2, 99, 2]  # one BOS a window: the document's own goes


def test_shares_and_seeds():
    rows = [[np.full(4, 10 * i + j) for j in range(6)] for i in range(2)]

    def take(*more):
        return [[int(row[0]) for row in some] for some in mixed(rows, *more, ["a", "b"])]

    assert take(None, (), None) == [list(range(6)), list(range(10, 16))]
    assert take(4, (3, 1), None) == [[0, 1, 2], [10]]
    drawn = take(4, (3, 1), 7)
    assert drawn == take(4, (3, 1), 7) != take(4, (3, 1), 8)
    assert [len(some) for some in drawn] == [3, 1]
    assert len({*drawn[0]}) == 3
    with pytest.raises(ValueError, match="a has 6 windows, its share is 9"):
        take(10, (9, 1), None)
    with pytest.raises(ValueError, match="one positive number for each of the 2 files a, b"):
        take(4, (1,), None)
    with pytest.raises(ValueError, match="--shares needs --samples"):
        take(None, (1, 1), None)
