"""Runs a traced program and shows every tagged input on the way, whatever loop it is in.

The program's own equations are evaluated as they are. Where tags are inside of a loop, a branch or
a call, what was seen so far is threaded through it: as carry of `scan` and `while`, as result of
every branch of `cond`, as a result per device of `shard_map`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Literal
from jax.sharding import PartitionSpec

from wush_jax.layers.calls import Call
from wush_jax.layers.origins import Origin, moved

# What was seen, by layer: pytrees of arrays, of which zeros are the empty ones.
Seen = dict[str, Any]


class Value(NamedTuple):
    """An array of the program, and which parameter it is, where it is one."""

    array: Any
    origin: Origin | None = None


Update = Callable[[Call, Seen], Seen]


@dataclass(frozen=True, eq=False)
class Interpreter:
    """Evaluates programs with tags.

    Attributes:
      update: called with every `Call` and what was seen; returns what is seen then.
      merge: of what two devices saw of a layer.
      lost: called with the name of a layer and why a call of it cannot be observed.
      output: called with every `Call` of a tagged output and what was seen; returns the array that
        takes its place.
    """

    update: Update
    merge: Callable[[str, Any, Any], Any] = lambda layer, one, two: one
    lost: Callable[[str, str], None] = lambda layer, reason: None
    output: Callable[[Call, Seen], Any] = lambda call, seen: call.x
    known: dict[int, Any] = field(default_factory=dict)

    def run(self, body: Any, values: Sequence[Value], seen: Seen) -> tuple[list[Value], Seen]:
        """Evaluate a jaxpr; return its results and what was seen."""
        jaxpr = getattr(body, "jaxpr", body)
        env = dict(zip(jaxpr.constvars, map(Value, getattr(body, "consts", ())), strict=True))
        env |= dict(zip(jaxpr.invars, values, strict=True))

        def read(atom: Any) -> Value:
            return Value(atom.val) if isinstance(atom, Literal) else env[atom]

        for equation in jaxpr.eqns:
            with equation.ctx.manager:
                out, seen = self.evaluate(equation, [read(v) for v in equation.invars], seen)
            env |= dict(zip(equation.outvars, out, strict=True))
        return [read(v) for v in jaxpr.outvars], seen

    def evaluate(self, equation: Any, values: list[Value], seen: Seen) -> tuple[list[Value], Seen]:
        """Evaluate one equation."""
        name, p = equation.primitive.name, equation.params
        arrays, origins = [v.array for v in values], [v.origin for v in values]
        if name == "wush_tag":
            x, kernel, *sizes = arrays
            call = Call(p["tag"], x, kernel.shape, origins[1], p["batched"], tuple(sizes))
            return values[:1], self.update(call, seen)
        if name == "wush_output":
            y, kernel = arrays
            call = Call(p["tag"], y, kernel.shape, origins[1], p["batched"])
            return [Value(self.output(call, seen))], seen
        inside = self.layers(p)
        if inside or any(origins):
            rule = _RULES.get(name)
            if rule is not None:
                return rule(self, equation, values, seen)
        for layer in inside:
            self.lost(layer, f"is called inside of {name}, where nothing can be observed")
        out = equation.primitive.bind(*arrays, **equation.primitive.get_bind_params(p))
        out = list(out) if equation.primitive.multiple_results else [out]
        return list(map(Value, out, moved(equation, arrays, origins))), seen

    def layers(self, params: Any) -> tuple[str, ...]:
        """Return the names of the layers that are tagged in an equation's jaxprs."""
        found: dict[str, None] = {}
        for body in _bodies(params):
            if id(body) not in self.known:
                inner = {
                    name: None
                    for e in body.eqns
                    for name in (
                        [e.params["tag"].layer]
                        if e.primitive.name == "wush_tag"
                        else self.layers(e.params)
                    )
                }
                self.known[id(body)] = (body, inner)  # the body is kept, so that its id is its own
            found |= self.known[id(body)][1]
        return tuple(found)

    def split(self, params: Any, seen: Seen) -> tuple[Seen, Seen]:
        """Return what is seen inside of an equation, and the rest."""
        mine = {name: seen[name] for name in self.layers(params) if name in seen}
        return mine, {name: value for name, value in seen.items() if name not in mine}


def _bodies(params: Any) -> list[Any]:
    """The jaxprs among an equation's parameters."""
    found = []
    for value in params.values():
        items = value if isinstance(value, (tuple, list)) else (value,)
        found += [item for item in items if hasattr(item, "eqns")]
    return found


def _arrays(values: Sequence[Value]) -> list[Any]:
    return [v.array for v in values]


def _inline(run: Interpreter, equation, values, seen):
    (body,) = _bodies(equation.params)
    return run.run(body, values, seen)


def _agree(before: Sequence[Origin | None], after: Sequence[Origin | None]) -> list[Origin | None]:
    pairs = zip(before, after, strict=True)
    return [one if one is not None and one.same(two) else None for one, two in pairs]


def _settle(carry: Sequence[Value], attempt: Callable) -> Any:
    """Try a loop with the origins of its carry, until those are what they are after a step."""
    origins = [v.origin for v in carry]
    while True:
        result, after = attempt(origins)
        kept = _agree(origins, after)
        if all((a is None) == (b is None) for a, b in zip(origins, kept, strict=True)):
            return result, origins
        origins = kept


def _scan(run: Interpreter, equation, values, seen):
    p = equation.params
    if "num_consts" in p:
        constants, carried = p["num_consts"], p["num_carry"]
    else:
        constants, carried, _ = map(len, p["ft_in"].update(values).unpack())
    consts, carry, xs = (
        values[:constants],
        values[constants : constants + carried],
        values[constants + carried :],
    )
    mine, rest = run.split(p, seen)
    stacked: list[Origin | None] = []

    def attempt(origins):
        after: list = []

        def step(state, item):
            (arrays, mine), (counter, slices) = state, item
            parts = [
                Value(s, None if x.origin is None else x.origin.take(0, counter).drop([0]))
                for s, x in zip(slices, xs, strict=True)
            ]
            out, mine = run.run(p["jaxpr"], [*consts, *map(Value, arrays, origins), *parts], mine)
            after[:] = [v.origin for v in out[:carried]]
            stacked[:] = [v.origin and v.origin.put_back(counter) for v in out[carried:]]
            return (_arrays(out[:carried]), mine), _arrays(out[carried:])

        found = lax.scan(
            step,
            (_arrays(carry), mine),
            (jnp.arange(p["length"], dtype=jnp.int32), _arrays(xs)),
            reverse=p["reverse"],
            unroll=max(p["unroll"], 1),
        )
        return found, after

    ((arrays, mine), ys), origins = _settle(carry, attempt)
    return [*map(Value, arrays, origins), *map(Value, ys, stacked)], rest | mine


def _while(run: Interpreter, equation, values, seen):
    p = equation.params
    for layer in run.layers({"condition": p["cond_jaxpr"]}):
        run.lost(layer, "is called in the condition of a while loop")
    first, second = p["cond_nconsts"], p["cond_nconsts"] + p["body_nconsts"]
    tests, consts, carry = values[:first], values[first:second], values[second:]
    mine, rest = run.split({"body": p["body_jaxpr"]}, seen)
    blind = Interpreter(lambda call, seen: seen)

    def attempt(origins):
        after: list = []

        def condition(state):
            ((out,), _) = blind.run(p["cond_jaxpr"], [*tests, *map(Value, state[0])], {})
            return out.array

        def step(state):
            arrays, mine = state
            out, mine = run.run(p["body_jaxpr"], [*consts, *map(Value, arrays, origins)], mine)
            after[:] = [v.origin for v in out]
            return _arrays(out), mine

        return lax.while_loop(condition, step, (_arrays(carry), mine)), after

    (arrays, mine), origins = _settle(carry, attempt)
    return list(map(Value, arrays, origins)), rest | mine


def _cond(run: Interpreter, equation, values, seen):
    p = equation.params
    mine, rest = run.split(p, seen)
    index, *operands = values
    origins: list[list[Origin | None]] = []

    def branch(body, arrays, mine):
        given = [Value(a, v.origin) for a, v in zip(arrays, operands, strict=True)]
        out, mine = run.run(body, given, mine)
        origins.append([v.origin for v in out])
        return _arrays(out), mine

    branches = [partial(branch, body) for body in p["branches"]]
    arrays, mine = lax.switch(index.array, branches, _arrays(operands), mine)
    first, *others = origins
    for other in others:
        first = _agree(first, other)
    return list(map(Value, arrays, first)), rest | mine


def _shard_map(run: Interpreter, equation, values, seen):
    p = equation.params
    mine, rest = run.split(p, seen)
    axes = tuple(a for a in p["mesh"].axis_names if a in p["newly_manual_axes"])
    empty = jax.tree.map(jnp.zeros_like, mine)

    def local(arrays, empty):
        given = [Value(a, v.origin) for a, v in zip(arrays, values, strict=True)]
        out, found = run.run(p["jaxpr"], given, empty)
        return _arrays(out), jax.tree.map(lambda leaf: leaf[None], found)

    arrays, found = jax.shard_map(
        local,
        mesh=p["mesh"],
        in_specs=(list(p["in_specs"]), PartitionSpec()),
        out_specs=(list(p["out_specs"]), PartitionSpec(axes)),
        axis_names=set(axes),
        check_vma=False,
    )(_arrays(values), empty)
    for name, value in mine.items():
        for device in range(p["mesh"].size if not axes else _devices(p["mesh"], axes)):
            part = jax.tree.map(lambda leaf, i=device: leaf[i], found[name])
            value = run.merge(name, value, part)
        mine[name] = value
    return list(map(Value, arrays)), rest | mine


def _devices(mesh: Any, axes: Sequence[str]) -> int:
    count = 1
    for axis in axes:
        count *= mesh.shape[axis]
    return count


_TRANSPARENT = (
    *("jit", "pjit", "closed_call", "core_call", "remat2", "checkpoint"),
    *("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr", "custom_vmap_call"),
)
_RULES: dict[str, Callable] = {
    "scan": _scan,
    "while": _while,
    "cond": _cond,
    "shard_map": _shard_map,
} | dict.fromkeys(_TRANSPARENT, _inline)
