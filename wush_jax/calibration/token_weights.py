"""How much each token counts in calibration: by what the model's prediction makes of its outputs.

Layers are quantized for the least error of their outputs, and that of one token may matter to the
model's prediction more than that of another. A token t of a layer counts by

    ``|g_t| ,  g_t = d/dy_t sum_s log p(label_s)``

with y_t the layer's output, and the label of every position s drawn from the model's own
prediction there; one backward pass gives all of them. The square of g, the diagonal of Fisher's
information, would weigh the error's power as the KL does to second order, but is ruled by few
tokens: the norm itself does better (docs/lab-notes.md).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from wush_jax.calibration.sites import Call, Masked, Site, inputs_of
from wush_jax.layers.dense import Dense
from wush_jax.layers.output_gradients import output_gradients

#: What `wush_jax.calibrate` takes.
TokenWeights = Literal["gradient"]
TOKEN_WEIGHTS = ("gradient",)


def check_token_weights(token_weights: str | None) -> None:
    """Raise ValueError for a name that is none.

    >>> check_token_weights(None)
    """
    if token_weights is not None and token_weights not in TOKEN_WEIGHTS:
        raise ValueError(
            f"token_weights={token_weights!r} is unknown; choose 'gradient', or None, which counts "
            "all tokens alike"
        )


def gradient_weights(
    model: nnx.Module,
    batch: Any,
    sites: Sequence[Site],
    layers: Mapping[str, Dense],
    key: jax.Array,
    *,
    call: Call,
) -> dict[Site, jax.Array]:
    """Return the weights of a batch's tokens at every site, of any mean.

    Layers that share an input have one weight a token: the norm of all their gradients together,
    ``sqrt(sum over layers |g_t|^2)``.

    Args:
      model: an NNX language model; it is left as it is.
      batch: the call's input; labels of what a mask leaves out count nothing.
      sites: to weigh for.
      layers: all of their layers, by path.
      key: that labels are drawn with.
      call: how to run the model; it returns logits (..., V).

    Returns:
      By site float32 (*stack, [experts], ...), as the layers' input has tokens.

    Raises:
      ValueError: a call that returns anything but logits, or has no gradient.
      NotImplementedError: a layer that gradients cannot be followed to, by its name.
    """
    wanted = {path: layers[path] for site in sites for path in site.layers}
    loss = _log_likelihood(batch, key)
    squares = output_gradients(model, inputs_of(batch), call, wanted, loss)
    return {site: jnp.sqrt(sum(squares[path] for path in site.layers)) for site in sites}


def _log_likelihood(batch: Any, key: jax.Array) -> Callable[[list[Any]], jax.Array]:
    """Return the sum of log p(label) over a batch, of logits."""

    def loss(out: list[Any]) -> jax.Array:
        found = [f"{x.dtype}{x.shape}" for x in out]
        if len(out) != 1 or out[0].ndim < 2 or not jnp.issubdtype(out[0].dtype, jnp.floating):
            raise ValueError(
                "token_weights='gradient' needs a call that returns logits (..., vocabulary), and "
                f"nothing else; it returns {', '.join(found) or 'no array'}: pass "
                "call=lambda model, batch: ... that does"
            )
        logp = jax.nn.log_softmax(out[0].astype(jnp.float32))
        labels = jax.random.categorical(key, jax.lax.stop_gradient(logp))
        taken = jnp.take_along_axis(logp, labels[..., None], axis=-1)[..., 0]
        if not isinstance(batch, Masked):
            return jnp.sum(taken)
        mask = jnp.asarray(batch.mask, bool)
        if mask.shape != taken.shape:
            raise ValueError(
                f"token_weights='gradient': the mask is of tokens {mask.shape}, the logits are of "
                f"{taken.shape}; calibrate without one of the two"
            )
        return jnp.sum(jnp.where(mask, taken, 0.0))

    return loss
