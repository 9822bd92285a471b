"""Flax Linen models, seen as NNX: the same plan, calibration, swap and report as everything else.

A linen module builds its layers while it is called, so there is nothing to swap beforehand. What
does exist beforehand is the tree of parameters. `LinenModel` makes that tree a tree of NNX modules
(dense layers become `LinenDense`), which is planned, calibrated and swapped like any other; its
call runs the linen module with ``nn.intercept_methods``, Flax's own public hook, and lets whatever
stands in a layer's place in the tree answer that layer's call. Nothing is patched, and outside
that call nothing is intercepted. The alternatives cover less: ``dot_general_cls`` is an attribute
of Dense and DenseGeneral alone, and every model has to pass it on; rewriting modules is the user's
work. The state of what stands in travels in the layer's place in the ``params`` collection, which
every model with dense layers carries through its `nn.scan`, `nn.remat`, `nn.vmap`: so layers
stacked for a scan are a batch of kernels here too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
from flax import nnx

from wush_jax.layers.calls import Call
from wush_jax.layers.dense import STACKED, dense_layers, dotted, is_array
from wush_jax.layers.interpreter import Interpreter
from wush_jax.layers.linen_tree import (
    PARAMS,
    STANDIN,
    Held,
    LinenScope,
    LinenState,
    fill,
    share,
    shown,
    values,
)
from wush_jax.layers.linen_tree import LinenDense as LinenDense
from wush_jax.layers.linen_tree import calls as calls_of
from wush_jax.layers.linen_views import LINEN_TYPES as LINEN_TYPES
from wush_jax.layers.linen_views import LinenTypes
from wush_jax.layers.tagged_run import run_tagged


class LinenModel(LinenScope):
    """A linen module with its variables as an NNX module.

    Calls are ``module.apply(variables, ...)``. Dense layers are submodules at their linen paths.

    Args:
      module: the linen module.
      variables: as `init` returned them, or shapes; at least ``{"params": ...}``. Boxes of
        partitioning metadata are taken off.
      arguments: of a call, arrays or shapes; only their shapes matter.
      types: what counts as a dense layer.
      keywords: of the call, such as ``train=False``.

    Raises:
      ValueError: no params.

    >>> import jax.numpy as jnp
    >>> from wush_jax import Recipe, quantize_model
    >>> module = nn.Sequential([nn.Dense(64), nn.relu, nn.Dense(32)])
    >>> x = jax.random.normal(jax.random.key(0), (16, 32))
    >>> model = LinenModel(module, module.init(jax.random.key(1), x), x)
    >>> quantized, report = quantize_model(model, [x], Recipe(solver="rtn"))
    >>> [layer.path for layer in report.layers], quantized(x).shape
    (['layers_0', 'layers_2'], (16, 32))
    """

    def __init__(
        self,
        module: nn.Module,
        variables: Mapping[str, Any],
        *arguments: Any,
        types: LinenTypes = LINEN_TYPES,
        **keywords: Any,
    ):
        super().__init__(type(module).__name__)
        variables = nn.unbox(variables)
        if not variables.get(PARAMS):
            raise ValueError(f"variables has {list(variables)}; it must hold {PARAMS!r}")
        self.linen = Held(module)
        others = {name: value for name, value in variables.items() if name != PARAMS}
        self.collections = nnx.data(jax.tree.map(LinenState, others))
        calls = calls_of(module, variables, arguments, keywords)
        fill(self, variables[PARAMS], (), calls, dict(types))
        share(self, variables[PARAMS], calls.get((), []), None, dict(types))
        _mark_stacks(self, arguments, keywords)

    def __call__(self, *arguments: Any, mutable: Any = False, **keywords: Any) -> Any:
        """Apply the linen module.

        Args:
          arguments: as the module's own.
          mutable: collections beside params that may change; they are returned as `apply` does.
          keywords: ``rngs`` and ``method`` as `apply` takes them, and the module's own.

        Returns:
          The output; with ``mutable`` the output and the changed collections.
        """
        variables = {PARAMS: self.assemble(), **values(self.collections)}
        with nn.intercept_methods(_answer):
            return self.linen.value.apply(variables, *arguments, mutable=mutable, **keywords)


def _answer(call: Callable, arguments: tuple, keywords: dict, context: Any) -> Any:
    """Let what stands in a layer's place answer its call."""
    module = context.module
    if context.method_name != "__call__":
        return call(*arguments, **keywords)
    for name in (f"{STANDIN}{module.name}", STANDIN):
        if module.has_variable(PARAMS, name):
            standin = nnx.merge(*module.get_variable(PARAMS, name))
            [x] = [a for a in (*arguments, *keywords.values()) if is_array(a)]
            return standin(x)
    return call(*arguments, **keywords)


def _mark_stacks(model: LinenModel, arguments: tuple, keywords: dict) -> None:
    """Let layers know which axes of their kernels the call's scans take away."""
    arrays, rebuild = shown((arguments, keywords))
    layers, _ = dense_layers(model, ())
    stacks: dict[str, tuple[int, ...]] = {}

    def note(call: Call, seen: dict) -> dict:
        if not call.fault:
            stacks.setdefault(call.tag.layer, call.stack)
        return seen

    def call(model: nnx.Module, arrays: list) -> Any:
        arguments, keywords = rebuild(arrays)
        return model(*arguments, **keywords)

    graph, state = nnx.split(model)

    def trace(state: Any, arrays: list) -> Any:
        return run_tagged(nnx.merge(graph, state), arrays, call, layers, Interpreter(note), {})

    jax.eval_shape(trace, state, arrays)
    for path, module in nnx.iter_modules(model):
        if dotted(path) in stacks:
            setattr(module, STACKED, stacks[dotted(path)])
