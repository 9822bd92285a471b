"""The closed forms against float64, the theorem's predictions, degenerate moments."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from constructions import CONSTRUCTIONS, B, D, build, every, moments, singular
from hypothesis import given
from hypothesis import strategies as st

import wush_jax as wush
from wush_jax import transforms

pytestmark = pytest.mark.usefixtures("strict")

# The library builds in float64 and rounds once to float32 (6e-8); entries of H T are sums of D of
# them; the eigh route of the oracle squares the condition of S (here at most 1e3).
CLOSE = 1e-6


@pytest.mark.parametrize("route", ["svd", "eigh"])
@pytest.mark.parametrize("root", [oracle.cholesky_root, oracle.symmetric_root])
def test_closed_form_by_every_root_and_route(root, route):
    w32, x32, w64, x64 = moments()
    h = oracle.hadamard(D)
    pair = build["wush"](w32, x32)
    for b in range(B):
        t_x, t_w, _ = oracle.wush(w64[b], x64[b], root=root, route=route)
        rows_x = h.T @ np.asarray(pair.activation[b], np.float64)
        rows_w = h.T @ np.asarray(pair.weight[b], np.float64)
        sign = np.sign(np.sum(rows_x * t_x, axis=-1, keepdims=True))
        np.testing.assert_allclose(rows_x, sign * t_x, atol=CLOSE * np.abs(t_x).max())
        np.testing.assert_allclose(rows_w, sign * t_w, atol=CLOSE * np.abs(t_w).max())


@every
def test_pairs_are_inverse_transposes(name):
    w32, x32, *_ = moments()
    pair = build[name](w32, x32)
    for b in range(B):
        t_x, t_w = (np.asarray(t[b], np.float64) for t in (pair.activation, pair.weight))
        size = np.linalg.norm(t_x, 2) * np.linalg.norm(t_w, 2)
        np.testing.assert_allclose(t_x @ t_w.T, np.eye(D), atol=2e-7 * size)  # float32 factors


def test_second_moments_become_h_s_h():
    w32, x32, w64, x64 = moments()
    pair = build["wush"](w32, x32)
    s = singular(w64, x64)
    h = oracle.hadamard(D)
    for t, m in ((pair.activation, x64), (pair.weight, w64)):
        for b in range(B):
            t64 = np.asarray(t[b], np.float64)
            np.testing.assert_allclose(
                t64 @ m[b] @ t64.T, h @ np.diag(s[b]) @ h.T, atol=CLOSE * s[b, 0]
            )


@pytest.mark.parametrize("balance", [0.0, 0.75, 2.0])
def test_balance_shares_s_between_both_sides(balance):
    w32, x32, w64, x64 = moments()
    pair = jax.jit(lambda w, x: wush.wush_transform(w, x, damping=0.0, balance=balance))(w32, x32)
    s, h = singular(w64, x64), oracle.hadamard(D)
    for t, m, power in ((pair.activation, x64, 2 - balance), (pair.weight, w64, balance)):
        for b in range(B):
            t64, expected = np.asarray(t[b], np.float64), s[b] ** power
            # Entries of M reach S^2 whatever the balance: float32 factors lose relative to that.
            size = np.linalg.norm(t64, 2) ** 2 * np.linalg.norm(m[b], 2)
            np.testing.assert_allclose(
                t64 @ m[b] @ t64.T, h @ np.diag(expected) @ h.T, atol=CLOSE * size
            )
    for b in range(B):
        np.testing.assert_allclose(
            np.asarray(pair.activation[b], np.float64) @ np.asarray(pair.weight[b], np.float64).T,
            np.eye(D),
            atol=2e-7 * np.prod([np.linalg.norm(t[b], 2) for t in (pair.activation, pair.weight)]),
        )


def test_balances_of_zero_and_one_are_known_transforms():
    w32, x32, *_ = moments()
    for balance, known in (
        (0.0, transforms.calibrated_hadamard_transform(w32, x32)),
        (1.0, wush.wush_transform(w32, x32)),
    ):
        found = wush.wush_transform(w32, x32, balance=balance)
        np.testing.assert_array_equal(found.activation, known.activation)
        np.testing.assert_array_equal(found.weight, known.weight)


# Losses of the floating-point model: only both factors together reach tr(S)^2 / d.
FP = {
    "wush": lambda s: s.sum(-1) ** 2 / D,
    "wus": lambda s: (s**2).sum(-1),
    "calibrated_hadamard": lambda s: (s**2).sum(-1),
    "whitening": lambda s: (s**2).sum(-1),
}
# Of the integer model's bound tr(A) tr(B): S^(1/2) balances, H does not matter.
INT = {
    "wush": lambda s: s.sum(-1) ** 2,
    "wus": lambda s: s.sum(-1) ** 2,
    "calibrated_hadamard": lambda s: D * (s**2).sum(-1),
    "whitening": lambda s: D * (s**2).sum(-1),
}


@every
@pytest.mark.parametrize(("model", "expected"), [("fp", FP), ("int", INT)], ids=["fp", "int"])
def test_predicted_losses(name, model, expected):
    w32, x32, w64, x64 = moments()
    loss = wush.predicted_loss(w32, x32, build[name](w32, x32), model=model)
    np.testing.assert_allclose(loss, expected[name](singular(w64, x64)), rtol=1e-5)


@pytest.mark.parametrize("rotation", [wush.identity_transform(D), wush.hadamard_transform(D)])
def test_any_rotation_of_the_weighted_coordinates_gives_tr_s_squared(rotation):
    """y = W'^T x, E y y^T = U S^2 U^T, weights white."""
    *_, w64, x64 = moments()
    y = np.stack([(r := np.linalg.cholesky(w)).T @ x @ r for w, x in zip(w64, x64, strict=True)])
    white = np.broadcast_to(np.eye(D, dtype=np.float32), y.shape)
    loss = wush.predicted_loss(white, y.astype(np.float32), rotation)
    np.testing.assert_allclose(loss, (singular(w64, x64) ** 2).sum(-1), rtol=1e-6)


def test_norms_of_the_integer_model():
    """In the coordinates y = W'^T x: ||T^-1||_F^2 = tr(S) = E ||T y||^2."""
    w32, x32, w64, x64 = moments()
    pair = build["wush"](w32, x32)
    trace = singular(w64, x64).sum(-1)
    for b in range(B):
        root = np.linalg.cholesky(w64[b])
        t = np.asarray(pair.activation[b], np.float64) @ np.linalg.inv(root).T
        np.testing.assert_allclose((np.linalg.inv(t) ** 2).sum(), trace[b], rtol=1e-5)
        y = root.T @ x64[b] @ root
        np.testing.assert_allclose(np.trace(t @ y @ t.T), trace[b], rtol=1e-5)


@given(seed=st.integers(0, 2**32 - 1))
def test_no_transform_beats_the_closed_form(seed):
    rng = np.random.default_rng(seed)
    w32, x32, w64, x64 = moments(seed)
    best = singular(w64, x64).sum(-1) ** 2 / D
    t_x = rng.standard_normal((B, D, D))
    t_w = np.linalg.inv(t_x).swapaxes(-1, -2)
    near = np.asarray(build["wush"](w32, x32).activation, np.float64)
    near = near + 0.01 * rng.standard_normal((B, D, D)) * np.abs(near).max()
    for t in (t_x, near):
        t_w = np.linalg.inv(t).swapaxes(-1, -2)
        losses = [oracle.fp_loss(w64[b], x64[b], t[b], t_w[b]) for b in range(B)]
        assert (losses >= best * (1 - 1e-9)).all()  # float64


@pytest.mark.parametrize("name", ["wush", "wus", "whitening"])
def test_noise_of_the_model_makes_the_predicted_loss(name):
    """E (w^T T^-1 diag(eta) T x)^2, sampled. Five standard errors of the mean: 1 in 2 million."""
    w32, x32, w64, x64 = moments()
    pair = build[name](w32, x32)
    rng = np.random.default_rng(7)
    x = rng.standard_normal((20000, D)) @ np.linalg.cholesky(x64[0]).T
    t_x, t_w = (np.asarray(t[0], np.float64) for t in (pair.activation, pair.weight))
    error = rng.standard_normal(x.shape) * (x @ t_x.T)
    squares = ((error @ (t_w @ np.linalg.cholesky(w64[0]))) ** 2).sum(-1)
    predicted = float(wush.predicted_loss(w32, x32, pair)[0])
    standard_error = squares.std() / len(squares) ** 0.5
    assert standard_error < 0.03 * predicted  # the check has teeth
    assert abs(squares.mean() - predicted) < 5 * standard_error


def test_change_of_basis_of_the_inputs_changes_nothing():
    """x -> A x, w -> A^-T w: S is the same and T_new = T A^-1, up to the signs of rows of H^T T."""
    w32, x32, w64, x64 = moments(condition=10)
    rng = np.random.default_rng(3)
    a = np.eye(D) + 0.3 * rng.standard_normal((D, D)) / D**0.5
    inverse = np.linalg.inv(a)
    w_new = (inverse.T @ w64 @ inverse).astype(np.float32)
    x_new = (a @ x64 @ a.T).astype(np.float32)
    old, new = build["wus"](w32, x32), build["wus"](w_new, x_new)
    # Moments rounded to float32 (6e-8) move singular vectors by that over the gaps of S (> 1e-2).
    for t_old, t_new, back in (
        (old.activation, new.activation, a),
        (old.weight, new.weight, inverse.T),
    ):
        t_old, rows = np.asarray(t_old, np.float64), np.asarray(t_new, np.float64) @ back
        sign = np.sign((t_old * rows).sum(-1, keepdims=True))
        np.testing.assert_allclose(sign * rows, t_old, atol=1e-4 * np.abs(t_old).max())
    np.testing.assert_allclose(
        wush.predicted_gain(w_new, x_new, damping=0.0),
        wush.predicted_gain(w32, x32, damping=0.0),
        rtol=1e-5,
    )


@given(seed=st.integers(0, 2**32 - 1), damping=st.sampled_from([0.0, 1e-4, 1e-2]))
def test_gain_is_between_one_over_d_and_one(seed, damping):
    w32, x32, *_ = moments(seed)
    gain = np.asarray(wush.predicted_gain(w32, x32, damping=damping))
    assert (gain >= 1 / D * (1 - 1e-6)).all()
    assert (gain <= 1 + 1e-6).all()
    s = singular(
        *(np.stack([oracle.damp(m.astype(float), damping) for m in v]) for v in (w32, x32))
    )
    np.testing.assert_allclose(gain, s.sum(-1) ** 2 / (D * (s**2).sum(-1)), rtol=1e-5)


def test_gain_at_its_ends():
    line = np.zeros((D, D), np.float32)
    line[0, 0] = 1
    assert float(wush.predicted_gain(np.eye(D, dtype=np.float32), np.eye(D, dtype=np.float32))) == 1
    near = float(wush.predicted_gain(line, line, damping=1e-7))
    assert 1 / D < near < 1.001 / D


# ------------------------------------------------------------------ degenerate moments


def degenerate():
    rng = np.random.default_rng(0)
    low = rng.standard_normal((D, 2))
    full = oracle.random_moment(rng, D, 10)
    return {
        "zero": (np.zeros((D, D)), np.zeros((D, D))),
        "zero weight": (np.zeros((D, D)), full),
        "zero activation": (full, np.zeros((D, D))),
        "rank 2": (low @ low.T, low @ low.T),
        "condition 1e12": (oracle.random_moment(rng, D, 1e12), oracle.random_moment(rng, D, 1e12)),
        "huge": (1e30 * full, 1e30 * full),
        "tiny": (1e-30 * full, 1e-30 * full),
        "far apart": (1e-18 * full, 1e18 * full),
        "dead channel": (full, full * (np.arange(D) > 0) * (np.arange(D) > 0)[:, None]),
    }


@every
@pytest.mark.parametrize("case", degenerate())
def test_degenerate_moments_with_damping(case, name):
    m_w, m_x = (m.astype(np.float32) for m in degenerate()[case])
    pair = CONSTRUCTIONS[name](m_w, m_x)
    t_x, t_w = (np.asarray(t, np.float64) for t in (pair.activation, pair.weight))
    assert np.isfinite(t_x).all()
    size = np.linalg.norm(t_x, 2) * np.linalg.norm(t_w, 2)
    np.testing.assert_allclose(t_x @ t_w.T, np.eye(D), atol=2e-7 * size)
    assert 0 < float(wush.predicted_gain(m_w, m_x)) <= 1 + 1e-6


@pytest.mark.parametrize("case", degenerate())
def test_degenerate_moments_without_damping(case):
    """Finite, or an error that says what to do: never a silent NaN."""
    m_w, m_x = (m.astype(np.float32) for m in degenerate()[case])
    for function in (*CONSTRUCTIONS.values(), wush.predicted_gain):
        try:
            out = function(m_w, m_x, damping=0.0)
        except ValueError as error:
            assert "damping=0.0" in str(error)  # noqa: PT017
        else:
            assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(out))
    if case in ("rank 2", "dead channel"):
        singular_moment = np.diag(np.float32([1] * (D - 1) + [0]))
        with pytest.raises(ValueError, match=r"damping=0.0 .*not positive definite.*1e-2"):
            wush.wush_transform(m_w, singular_moment, damping=0.0)


def test_damping_is_relative_to_the_mean_diagonal():
    w32, x32, w64, x64 = moments()
    pair = wush.wush_transform(w32, x32, damping=0.05)
    for b in range(B):
        damped = [oracle.damp(m[b], 0.05) for m in (w64, x64)]
        t_x, _, _ = oracle.wush(*damped)
        gram = np.asarray(pair.activation[b], np.float64)
        np.testing.assert_allclose(gram.T @ gram, t_x.T @ t_x, rtol=1e-5, atol=1e-5)


@every
def test_jit_vmap_and_batch_agree(name):
    w32, x32, *_ = moments()
    batch = build[name](w32, x32)
    mapped = jax.vmap(build[name])(w32, x32)  # batched outside of the x64 context
    traced = jax.jit(jax.vmap(lambda w, x: CONSTRUCTIONS[name](w, x, damping=0.0)))(w32, x32)
    eager = CONSTRUCTIONS[name](w32, x32, damping=0.0)
    for other in (mapped, traced, eager):
        for a, b in zip(jax.tree.leaves(batch), jax.tree.leaves(other), strict=True):
            np.testing.assert_allclose(a, b, atol=CLOSE * np.abs(a).max())


def test_float64_callers_keep_their_digits():
    *_, w64, x64 = moments()
    with jax.enable_x64(True):
        pair = wush.wush_transform(jnp.asarray(w64), jnp.asarray(x64), damping=0.0)
        assert pair.activation.dtype == jnp.float64
        product = np.asarray(pair.activation @ pair.weight.mT)
    np.testing.assert_allclose(product, np.broadcast_to(np.eye(D), product.shape), atol=1e-11)


EYE = np.eye(4, dtype=np.float32)
BAD = np.diag(np.float32([1, np.inf, np.nan, 1]))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: wush.wush_transform(EYE[:2], EYE),
            r"weight_moment has shape \(2, 4\).*\(..., d, d",
        ),
        (lambda: wush.wush_transform(EYE, EYE[0]), r"activation_moment has shape \(4,\)"),
        (
            lambda: wush.wush_transform(EYE, np.eye(8, dtype="f4")),
            r"\(4, 4\).*\(8, 8\).*block sizes",
        ),
        (lambda: wush.wush_transform(EYE, BAD), "activation_moment .* 2 non-finite .*remove it"),
        (lambda: wush.predicted_gain(BAD, EYE), "weight_moment .* 2 non-finite"),
        (lambda: wush.wush_transform(EYE, EYE, damping=-0.1), "damping=-0.1 must be non-negative"),
        (lambda: wush.wush_transform(EYE, EYE, balance=-1), "balance=-1 must be from 0 .* to 2"),
        (
            lambda: wush.wush_transform(np.eye(6, dtype="f4"), np.eye(6, dtype="f4")),
            "d=6.*power of",
        ),
        (
            lambda: wush.predicted_loss(EYE, EYE, wush.identity_transform(4), model="x"),
            "model='x' is unknown; choose one of fp, int",
        ),
        (lambda: wush.apply_transform(jnp.ones((2, 6)), EYE), r"\(4, 4\).*\(2, 6\).*K=6"),
        (lambda: wush.apply_transform(jnp.ones((2, 8)), EYE[None]), r"\(1, 4, 4\).*\(2, 8\)"),
        (lambda: wush.wush_transform(EYE, -EYE), "damping=0.01 leaves.*positive definite"),
    ],
)
def test_mistakes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_whitening_and_wus_need_no_hadamard_matrix():
    six = np.eye(6, dtype=np.float32)
    assert wush.wush_transform(six, six, hadamard=False).activation.shape == (6, 6)
    assert transforms.whitening_transform(six, six).activation.shape == (6, 6)
