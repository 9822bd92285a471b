"""Where tokens enter: what is none is refused with its place; nothing is dropped or padded."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from folders import write
from tiny import BYTES, CONFIG
from weights import random_model

import wush_jax as wush
from wush_jax.commands.options import Text
from wush_jax.models import generate
from wush_jax.models.documents import read_text
from wush_jax.models.tokens import (
    check_batches,
    check_tokens,
    cut,
    in_batches,
    read_tokens,
)

pytestmark = pytest.mark.files
RANDOM = np.random.default_rng(0)


@pytest.mark.parametrize("kind", [np.int32, np.int64, np.uint8, np.uint16, np.uint64])
def test_integers_of_any_type_are_tokens(kind):
    found = check_tokens(np.arange(6, dtype=kind).reshape(2, 3), 6)
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found, np.arange(6).reshape(2, 3))


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([[1, 2], [256, 3]], "1 id is outside .* of 256 tokens: 256 at row 1, column 0"),
        ([[1, -100]], "-100 at row 0, column 1"),
        (np.array([[2**32 + 5]]), "4294967301 at row 0, column 0"),  # int32 would make it 5
        (np.array([[2**64 - 1]], np.uint64), "18446744073709551615 at row 0"),
        (jnp.array([[1, 300]]), "300 at row 0, column 1"),
        (np.full((9, 9), -1), "81 ids .* and 76 more"),
        ([[1.0, 2.0]], "holds float64, expected integers"),
        (np.ones((1, 2), bool), "holds bool, expected integers"),
        ([[2**70]], "holds object, expected integers"),
        ([[1, 2], [3]], "rows of unequal length"),
        ([[]], "holds no token"),
        ([1, 2, 999], r"shape \(3,\), expected \(batch, length\).*; 1 id is outside .* axis 0 2"),
    ],
)
def test_what_is_no_token_is_refused_with_its_place(tokens, message):
    with pytest.raises(ValueError, match=f"^tokens: .*{message}"):
        check_tokens(tokens, 256)


def test_without_a_vocabulary_only_what_no_model_has_is_refused():
    """-100 may be the mark of a model that nobody here knows; int32 must hold it."""
    assert check_tokens([[-100, 10**6]], None).tolist() == [[-100, 10**6]]
    with pytest.raises(ValueError, match="4294967296 at row 0"):
        check_tokens([[2**32]], None)


def test_all_batches_are_told_at_once():
    batches = [[[1]], [[9]], [[1.5]], [[2]]]
    with pytest.raises(ValueError, match=r"(?s)batches\[1\]: 1 id.*batches\[2\]: holds float"):
        check_batches(batches, 5)
    seen = check_batches(iter(batches), 5)
    assert next(seen).tolist() == [[1]]
    with pytest.raises(ValueError, match=r"batches\[1\]"):
        next(seen)


@pytest.mark.parametrize("sequential", [None, wush.Sequential()])
def test_calibration_refuses_them(sequential):
    model = random_model(CONFIG)
    batches = [np.zeros((1, 4), np.int32), np.array([[1, 2, -100, 64]])]
    with pytest.raises(ValueError, match=r"batches\[1\]: 2 ids .* 64 tokens: -100 at row 0"):
        wush.quantize_model(model, batches, wush.Recipe(), sequential=sequential)


@pytest.mark.parametrize("figure", [wush.perplexity, lambda m, b: wush.kl_divergence(m, m, b)])
def test_figures_refuse_them(figure):
    batches = [np.zeros((1, 4), np.int64), np.array([[1, 2, 3, 2**32 + 5]])]
    with pytest.raises(ValueError, match=r"batches\[1\]: .*4294967301 at row 0, column 3"):
        figure(random_model(CONFIG), batches)
    with pytest.raises(ValueError, match=r"batches\[1\]: .*4294967301 at row 0, column 3"):
        figure(lambda tokens: jnp.zeros((*tokens.shape, 64)), iter(batches))


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([[300, 1, 2]], "prompts: 1 id .* 300 at row 0, column 0"),
        ([[1], [2, -1]], "-1 at row 1, column 1"),
        ([[1.5, 2.0]], "prompts: holds float64"),
        (np.array([[2**40, 1]]), "1099511627776 at row 0"),
    ],
)
def test_generation_refuses_them(prompts, message):
    with pytest.raises(ValueError, match=message):
        generate(random_model(CONFIG), prompts, max_new_tokens=2)
    with pytest.raises(ValueError, match=r"stop_tokens: .* 64 at row 0"):
        generate(random_model(CONFIG), [[1]], max_new_tokens=2, stop_tokens=[1, 64])


def test_what_is_right_of_a_prompt_is_ignored():
    model, prompts = random_model(CONFIG), np.array([[5, 6, -100], [7, 8, 9]])
    found = generate(model, prompts, lengths=[2, 3], max_new_tokens=3)
    expected = generate(model, [[5, 6], [7, 8, 9]], max_new_tokens=3)
    np.testing.assert_array_equal(found.tokens, expected.tokens)


def test_windows_have_the_prefix_once():
    text = np.arange(1, 12)
    windows = cut([text], 5, prefix=[0])
    assert [row.tolist() for row in windows.rows] == [[0, 1, 2, 3, 4], [0, 5, 6, 7, 8]]
    assert windows.left_out == 3
    again = cut([np.concatenate([[0], text])], 5, prefix=[0])
    np.testing.assert_array_equal(again.rows, windows.rows)
    assert cut([text], 5, limit=1).left_out == 0  # the rest was not asked for


def test_documents_keep_their_ends_apart():
    documents = [np.arange(7), np.arange(10, 12), np.arange(20, 23)]
    windows = cut(documents, 3)
    expected = [[0, 1, 2], [3, 4, 5], [10, 11], [20, 21, 22]]
    assert [row.tolist() for row in windows.rows] == expected
    assert windows.left_out == 1
    shapes = [batch.shape for batch in in_batches(windows.rows, 2)]
    assert shapes == [(2, 3), (1, 3), (1, 2)]


@pytest.mark.parametrize(
    ("documents", "options", "message"),
    [
        ([np.arange(3)], {}, "3 tokens where one window takes 4"),
        ([np.arange(3)], {"prefix": [1, 2, 3, 4]}, "leaves no room behind the 4 tokens"),
    ],
)
def test_windows_that_cannot_be(documents, options, message):
    with pytest.raises(ValueError, match=message):
        cut(documents, 4, **options)


def saved(folder, values):
    np.save(folder / "tokens.npy", values)
    return folder / "tokens.npy"


def test_a_file_of_one_text_and_one_of_rows(tmp_path):
    stream = RANDOM.integers(50, size=40)
    (found,) = read_tokens(saved(tmp_path, stream), 50)
    np.testing.assert_array_equal(found, stream)
    rows = read_tokens(saved(tmp_path, stream.reshape(8, 5).astype(np.uint16)), 50)
    np.testing.assert_array_equal(np.stack(rows), stream.reshape(8, 5))


def test_padding_is_cut_off_on_both_sides(tmp_path):
    file = saved(tmp_path, [[7, 7, 1, 2, 7, 3, 7], [4, 5, 6, 7, 7, 7, 7]])
    rows = [row.tolist() for row in read_tokens(file, 50, pad=7)]
    assert rows == [[1, 2, 7, 3], [4, 5, 6]]
    rows = [row.tolist() for row in read_tokens(file, 50, pad=7, stops=[7])]
    assert rows == [[1, 2, 7, 3, 7], [4, 5, 6, 7]]  # the first one ends the text
    labels = saved(tmp_path, [[1, 2, -100], [3, 4, 5]])
    assert [row.tolist() for row in read_tokens(labels, 50, pad=-100)] == [[1, 2], [3, 4, 5]]


def test_rows_that_look_filled_are_asked_about(tmp_path):
    values = np.zeros((6, 48), np.int64)
    values[:, :30] = RANDOM.integers(1, 50, (6, 30))
    with pytest.raises(ValueError, match=r"6 of 6 rows end .* ids 0.* --pad-id 0, or --pad-id -1"):
        read_tokens(saved(tmp_path, values), 50)
    assert {len(row) for row in read_tokens(saved(tmp_path, values), 50, pad=0)} == {30}
    assert {len(row) for row in read_tokens(saved(tmp_path, values), 50, pad=-1)} == {48}
    with pytest.raises(ValueError, match="rows begin"):
        read_tokens(saved(tmp_path, values[:, ::-1]), 50)


@pytest.mark.parametrize(
    ("values", "options", "message"),
    [
        ([[0, 0], [1, 2]], {"pad": 0}, r"1 rows hold nothing but the padding 0: rows \[0\]"),
        ([[1, 50], [2, 3]], {"pad": 0}, "50 at row 0, column 1"),
        ([[1, -100, 2], [1, 2, -100]], {"pad": -100}, "1 id .*-100 at row 0, column 1"),
        (np.ones((2, 2, 2), int), {"pad": 0}, "expected .batch, length"),
        (np.array([], int), {}, "holds no token"),
        (np.ones(3), {}, "holds float64"),
        (np.int64(3), {}, "expected .batch, length"),
    ],
)
def test_bad_files_are_named(values, options, message, tmp_path):
    with pytest.raises(ValueError, match=f"--tokens .*tokens.npy.*{message}"):
        read_tokens(saved(tmp_path, values), 50, **options)


def test_files_that_are_none(tmp_path):
    file = tmp_path / "tokens.npy"
    np.savez(tmp_path / "archive", a=np.arange(9))
    np.save(tmp_path / "objects", np.array([[1, 2], [3]], object), allow_pickle=True)
    whole = saved(tmp_path, np.arange(9)).read_bytes()
    contents = [b"", b"\1\0" * 200, b"PK\3\4", whole[:40], whole[:-8]]
    contents += [(tmp_path / name).read_bytes() for name in ("archive.npz", "objects.npy")]
    for content in contents:
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"tokens.npy is no .npy file of integers \("):
            read_tokens(file, 50)


def test_texts_are_read_as_they_are(tmp_path):
    file = tmp_path / "text.txt"
    file.write_bytes(b"\xef\xbb\xbfa\r\nb\r")
    assert read_text(file) == "a\r\nb\r"
    for content, message in ((b"", "is empty"), (b"caf\xe9", r"is no UTF-8 text \(byte 3")):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=f"--text .*text.txt {message}"):
            read_text(file)
    file.write_text("words", encoding="utf-16")
    with pytest.raises(ValueError, match="no UTF-8 text"):
        read_text(file)


@pytest.mark.parametrize("size", [None, "256", 0, True, 2.5])
def test_a_config_without_a_vocabulary_is_refused(size, tmp_path):
    (tmp_path / "x.npy").write_bytes(b"")
    write(tmp_path, BYTES, {"x": np.zeros(1, np.float32)}, vocab_size=size)
    fault = f"config.json: vocab_size = {size!r}, expected a positive whole number"
    with pytest.raises(ValueError, match=fault):
        Text(tokens=tmp_path / "x.npy").windows(tmp_path)


def test_sharded_batches_stay_where_they_are(eight_devices):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    batch = jax.device_put(np.arange(16, dtype=np.int32).reshape(8, 2), place)
    assert check_tokens(batch, 16).sharding == place
    with pytest.raises(ValueError, match="15 at row 7, column 1"):
        check_tokens(batch, 15)
