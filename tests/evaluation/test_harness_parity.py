"""`HarnessModel` against the harness's own model of transformers, on the same weights."""

import numpy as np
import pytest
from token_tools import TEMPLATE, byte_tokenizer

pytest.importorskip("torch")
pytest.importorskip("transformers")
lm_eval = pytest.importorskip("lm_eval")
pytestmark = [
    pytest.mark.usefixtures("float32_matmuls"),
    pytest.mark.filterwarnings("default"),  # those of the harness and of torch
]
LIMIT = 48


def save_model(folder):
    """A model with weights large enough that its choices are clear."""
    import torch
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=258,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=LIMIT,
        bos_token_id=256,
        eos_token_id=257,
    )
    torch.manual_seed(0)
    theirs = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape) + ("norm" in name))
    theirs.save_pretrained(folder)
    return theirs


@pytest.fixture(scope="module", params=["bos", "no bos"])
def pair(request, tmp_path_factory):
    """Ours and theirs, of a folder whose tokenizer puts BOS first, or has none."""
    import transformers
    from lm_eval.models.huggingface import HFLM

    from wush_jax.evaluation.harness import HarnessModel
    from wush_jax.models import load_pretrained
    from wush_jax.models.text import Tokenizer

    folder = tmp_path_factory.mktemp("model")
    torch_model = save_model(folder)
    names = {"bos": "<s>", "eos": "</s>"} if request.param == "bos" else {"eos": "</s>"}
    byte_tokenizer(folder, **names, chat_template=TEMPLATE)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    theirs = HFLM(pretrained=torch_model, tokenizer=tokenizer, device="cpu", batch_size=1)
    ours = HarnessModel(load_pretrained(folder), Tokenizer.read(folder), batch_size=3)
    return ours, theirs


def requests(kind, arguments):
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, args, i) for i, args in enumerate(arguments)]


def both(pair, kind, arguments):
    return [getattr(model, kind)(requests(kind, arguments), disable_tqdm=True) for model in pair]


def test_log_likelihoods(pair):
    pairs = [
        ("The cat", " sat"),
        ("", "Hello"),  # an empty context
        ("x" * 100, " yes"),  # a long one
        ("a ", "b"),  # its space belongs to the continuation
        ("<s>a", "b"),  # brings its BOS along
        ("é", "è"),
        ("The cat", " sat on the mat, and on"),
    ]
    ours, theirs = both(pair, "loglikelihood", pairs)
    for (a, greedy), (b, choice), what in zip(ours, theirs, pairs, strict=True):
        assert a == pytest.approx(b, rel=1e-4), what
        assert greedy == choice


def test_the_likeliest_continuation_is_told(pair):
    ours, theirs = pair
    context = list(b"The cat")
    found = [[(None, context, [token])] for token in range(256)]
    likely = [t for t, request in enumerate(found) if ours._loglikelihood_tokens(request)[0][1]]
    assert len(likely) <= 1
    for token in likely:
        assert theirs._loglikelihood_tokens(found[token], disable_tqdm=True)[0][1]


def test_rolling_log_likelihoods(pair):
    texts = [("short text here",), ("y" * 150,), ("The quick brown fox. " * 5,)]
    ours, theirs = both(pair, "loglikelihood_rolling", texts)
    np.testing.assert_allclose(ours, theirs, rtol=1e-4)


GREEDY = {"until": ["\n"], "max_gen_toks": 8}


def test_generated_text(pair):
    contexts = [
        ("The cat sat on the mat", GREEDY),
        ("The cat", {"until": [], "max_new_tokens": 5}),
        ("The cat", {"until": [], "max_gen_toks": 5, "do_sample": False, "temperature": 0.7}),
        ("z" * 90, GREEDY),  # only the last positions fit
        ("<s>The", GREEDY),
        ("a", {"until": "b", "max_tokens": 30}),
    ]
    free, _ = both(pair, "generate_until", [("The cat", {"until": [], "max_gen_toks": 12})])
    stops = [free[0][1:3], free[0][4:5]]  # within what comes
    contexts.append(("The cat", {"until": stops, "max_gen_toks": 12}))
    ours, theirs = both(pair, "generate_until", contexts)
    assert ours == theirs
    assert ours[-1] == free[0].partition(stops[0])[0].partition(stops[1])[0]


def test_too_many_new_tokens_are_refused_by_both(pair):
    arguments = [("The cat", {"until": ["\n"]})]  # 256 by default
    with pytest.raises(ValueError, match=f"256 new tokens leave no context .* {LIMIT} positions"):
        pair[0].generate_until(requests("generate_until", arguments))
    with pytest.raises(AssertionError, match="max tokens to generate"):
        pair[1].generate_until(requests("generate_until", arguments), disable_tqdm=True)


def test_an_empty_continuation_is_refused_by_both(pair):
    arguments = requests("loglikelihood", [("word", "")])
    with pytest.raises(ValueError, match="at least one token each"):
        pair[0].loglikelihood(arguments, disable_tqdm=True)
    with pytest.raises(AssertionError):
        pair[1].loglikelihood(arguments, disable_tqdm=True)


def test_conversations(pair):
    ours, theirs = pair
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert ours.apply_chat_template(chat) == theirs.apply_chat_template(chat)
    begun = [*chat, {"role": "assistant", "content": "Well "}]
    expected = theirs.apply_chat_template(begun, add_generation_prompt=False)
    assert ours.apply_chat_template(begun, add_generation_prompt=False) == expected
    assert ours.chat_template(True) == theirs.chat_template(True)
    text = ours.apply_chat_template(chat)
    assert ours.tok_encode(text) == theirs.tok_encode(text)
    answers = both(pair, "generate_until", [(text[-30:], GREEDY)])
    assert answers[0] == answers[1]


def test_prefixes(pair):
    ours, theirs = pair
    assert ours.prefix_token_id == theirs.prefix_token_id
    assert ours.eot_token_id == theirs.eot_token_id
    assert ours.max_length == theirs.max_length
