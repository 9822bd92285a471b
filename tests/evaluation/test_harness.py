"""The adapter to lm-evaluation-harness, on requests and a task that need no network."""

import dataclasses
import json
import math

import numpy as np
import pytest
from flax import nnx
from tiny import BYTES
from weights import random_model

from wush_jax.evaluation.harness import HarnessModel, task_figures
from wush_jax.models import generate
from wush_jax.models.text import Tokenizer

pytest.importorskip("lm_eval")
pytestmark = pytest.mark.usefixtures("float32_matmuls")
CONFIG = dataclasses.replace(BYTES, max_position_embeddings=48)
TEXTS = ["ab cd", "the quick brown fox", "x" * 100]


@pytest.fixture(scope="module")
def model():
    return random_model(CONFIG)


@pytest.fixture(scope="module")
def adapter(model):
    return HarnessModel(model, Tokenizer(stop_tokens=(0,)), batch_size=2)


class Request:
    def __init__(self, *args):
        self.args = args


@nnx.jit
def whole(model, tokens):
    return model(tokens)


def log_probabilities(model, tokens):
    padded = np.zeros((1, 64), np.int32)
    padded[0, : len(tokens)] = tokens
    logits = np.asarray(whole(model, padded), np.float64)[0, : len(tokens)]
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def test_loglikelihood_equals_the_model(model, adapter):
    pairs = [("ab", "cd"), ("the quick", " brown"), ("", "fox"), ("x" * 60, "yz")]
    found = adapter.loglikelihood([Request(*pair) for pair in pairs], disable_tqdm=True)
    for (context, continuation), (value, greedy) in zip(pairs, found, strict=True):
        tokens = (list(context.encode()) or [0]) + list(continuation.encode())
        tokens = tokens[-49:]
        count = len(continuation)
        table = log_probabilities(model, tokens[:-1])[-count:]
        expected = sum(table[i, t] for i, t in enumerate(tokens[-count:]))
        assert value == pytest.approx(expected, rel=1e-4)
        assert greedy == (table.argmax(-1) == tokens[-count:]).all()


def test_the_likeliest_continuation_is_known(model, adapter):
    out = generate(model, [list(b"ab")], max_new_tokens=1)
    likely, context = chr(out.tokens[0, 0]), list(b"ab")
    ((_, greedy),) = adapter._loglikelihood_tokens([(None, context, [ord(likely)])])
    assert greedy


def test_rolling_counts_every_token_once(model, adapter):
    found = adapter.loglikelihood_rolling([Request(text) for text in TEXTS], disable_tqdm=True)
    for text, value in zip(TEXTS[:2], found, strict=False):
        tokens = [0, *text.encode()]
        table = log_probabilities(model, tokens[:-1])
        expected = sum(table[i, t] for i, t in enumerate(tokens[1:]))
        assert value == pytest.approx(expected, rel=1e-4)
    assert math.isfinite(found[2])


def test_generate_until(model, adapter):
    settings = {"until": ["\n"], "max_gen_toks": 6}
    (found,) = adapter.generate_until([Request("the", settings)])
    out = generate(model, [list(b"the")], max_new_tokens=6, stop_tokens=(0,))
    tokens = [t for t in out.tokens[0, : out.lengths[0]].tolist() if t]
    assert found == bytes(tokens).decode(errors="replace").partition("\n")[0]


@pytest.mark.filterwarnings("default")  # the harness's own
def test_a_task_of_a_local_file(adapter, model, tmp_path):
    import lm_eval

    documents = [{"question": f"{i}+1=", "answer": str(i + 1)} for i in range(4)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, documents)))
    task = {
        "task": "sums",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "data.jsonl")}},
        "test_split": "test",
        "output_type": "loglikelihood",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
    }
    results = lm_eval.simple_evaluate(
        model=adapter, tasks=[task], bootstrap_iters=0, verbosity=None
    )
    expected = np.mean(
        [
            log_probabilities(model, list(d["question"].encode()))[-1, ord(d["answer"])]
            for d in documents
        ]
    )
    found = results["results"]["sums"]
    assert math.log(found["perplexity,none"]) == pytest.approx(-expected, rel=1e-4)
    (tmp_path / "sums.yaml").write_text(json.dumps(task))  # which YAML contains
    tokenizer = Tokenizer(stop_tokens=(0,))
    options = {"limit": None, "batch_size": 2}
    figures = task_figures(model, tokenizer, [str(tmp_path / "sums.yaml")], **options)
    assert figures["sums perplexity"] == pytest.approx(found["perplexity,none"])
    assert figures["sums acc"] == found["acc,none"]
    with pytest.raises(ValueError, match="no_such_task"):
        task_figures(model, tokenizer, ["no_such_task"], **options)
