"""What to do with a layer: format, transform, solver; and rules that give layers their recipes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from wush_jax.formats import MXFP4, Format
from wush_jax.formats.checks import check_choice, check_kind, check_number, check_whole
from wush_jax.formats.elements import E2M1
from wush_jax.transforms.checks import check_balance

TRANSFORMS = ("identity", "random", "hadamard", "calibrated_hadamard", "whitening", "wus", "wush")
SOLVERS = ("rtn", "gptq")
SCALE_SEARCHES = ("rule", "sweep")
GLOBAL_SCALES = ("constant", "derived")
INPUT_ERRORS = ("ignore", "model", "sample")
SWITCHES = ("share_transform", "shared_blocks", "interleave", "block_gain", "activation_order")
# Blocks that "widest" chooses from.
WIDTHS = (128, 64, 32, 16)
# Transforms that are one matrix for all blocks, whatever the data.
DATA_FREE = ("identity", "random", "hadamard")


def has_constant(fmt: Format | None) -> bool:
    """Whether scales have a limited range and the global scale is fixed.

    >>> from wush_jax import MXFP4, NVFP4
    >>> has_constant(NVFP4), has_constant(NVFP4.replace(global_scale=None)), has_constant(MXFP4)
    (True, False, False)
    """
    return fmt is not None and fmt.scale_dtype == "e4m3" and fmt.global_scale is not None


@dataclass(frozen=True)
class Recipe:
    """How one layer is quantized. Static and hashable.

    Attributes:
      format: number format of the weights.
      activation_format: format of the activations; "same" as the weights' (W4A4); "tuned", the same
        bits with the scale rule that loses least on activations (`tuned`); or None to leave them
        unquantized (W4A16).
      transform: one of `TRANSFORMS`.
      solver: "rtn" or "gptq".
      block_size: channels per block d, a multiple of the group size; None means d = group;
        "widest", for each layer the largest of 128, 64, 32 and 16 that divides its K.
      balance: lambda of KBBQ: ``T_X = H S^(-balance/2) U^T W'^T``, for WUSH and WUS, which have 1;
        less leaves more of the range to the activations.
      damping: lambda of the transform (and of GPTQ's Hessian).
      transform_dtype: "bfloat16" or "float32": what the run-time transform is rounded to, before
        the weights meet its inverse transpose.
      share_transform: layers that share an input share one transform (and one transform+quantize
        pass at run time).
      shared_blocks: all blocks of a transform share one matrix (d, d), built from the mean of their
        moments: what other libraries' files have room for (`wush_jax.checkpoints.interchange`).
      scale_search: of the weights' scales: "rule" takes the format's rule; "sweep" tries the scales
        next to it and keeps the least error weighted by the activation moment.
      global_scale: of NVFP4, NVINT4 and the like, for weights and activations: "constant" is the
        format's own, and only where calibration sees that saturate or lose its digits a power of
        two times it; "derived" is always the one that the ranges of a site ask for.
      interleave: with GPTQ and a transform of the layer's own, build each block's transform from
        the weights as updated by the blocks before (the paper's algorithm 2); False builds all of
        them from the original weights, in one batch. A shared transform is always built so.
      input_error: what GPTQ knows of the error that quantizing the activations adds: "ignore"
        nothing (the paper); "model" its power, from the format alone; "sample" its moments,
        measured on a sample of calibration rows. The weights make up for it
        (`wush_jax.solvers.noise`); with "sample" each output keeps slope one against the original.
      descent: sweeps of coordinate descent over the codes after GPTQ.
      refit: rounds of fitting each block's transform to GPTQ's codes, and the codes by ``descent``
        to what that leaves (`wush_jax.solvers.refit`); free at run time.
      block_gain: multiply each block's transform by the gain 2^(j/8) with the least activation
        error on a sample of calibration rows; free at run time.
      activation_order: GPTQ treats the blocks with the most input power first.
      solver_dtype: of GPTQ's weights and feedback, "float32" or "float64".

    Raises:
      ValueError: an unknown name, a block that is not a multiple of the group, negative damping.

    >>> Recipe(transform="hadamard").block
    32
    """

    format: Format = MXFP4
    activation_format: Format | Literal["same", "tuned"] | None = "same"
    transform: str = "wush"
    solver: str = "rtn"
    block_size: int | Literal["widest"] | None = None
    balance: float = 1.0
    damping: float = 1e-2
    transform_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    share_transform: bool = True
    shared_blocks: bool = False
    scale_search: str = "rule"
    global_scale: str = "constant"
    interleave: bool = True
    input_error: str = "ignore"
    descent: int = 0
    refit: int = 0
    block_gain: bool = False
    activation_order: bool = False
    solver_dtype: Literal["float32", "float64"] = "float32"

    def __post_init__(self):
        check_choice(TRANSFORMS, transform=self.transform)
        check_choice(SOLVERS, solver=self.solver)
        check_choice(SCALE_SEARCHES, scale_search=self.scale_search)
        check_choice(GLOBAL_SCALES, global_scale=self.global_scale)
        check_choice(INPUT_ERRORS, input_error=self.input_error)
        check_choice(("bfloat16", "float32"), transform_dtype=self.transform_dtype)
        check_choice(("float32", "float64"), solver_dtype=self.solver_dtype)
        check_kind(bool, "True or False", **{name: getattr(self, name) for name in SWITCHES})
        if self.format is None:
            raise ValueError(
                "format=None is not a Format; use a rule (path, None) to exclude a layer"
            )
        if isinstance(self.activation_format, str):
            check_choice(("same", "tuned"), activation_format=self.activation_format)
        if not isinstance(self.format, Format):
            raise ValueError(
                f"format={self.format!r} is not a Format; use wush_jax.MXFP4 and the like"
            )
        if self.format.short_last:
            raise ValueError(
                f"format={self.format.name} is for activations, activation_format="
                f"{self.format.name}; for weights of 8 bits use MXFP8"
            )
        if self.input_format is not None:
            remedy = "a Format, such as wush_jax.MXFP4, 'same', 'tuned' or None"
            check_kind(Format, remedy, activation_format=self.input_format)
        self._check_block()
        check_number(damping=self.damping)
        if not 0 <= self.damping < float("inf"):
            raise ValueError(f"damping={self.damping} must be finite and non-negative; try 1e-2")
        check_balance(self.balance)
        self._check_combination()

    def _check_block(self):
        """Refuse blocks that groups do not tile."""
        if isinstance(self.block_size, str):
            check_choice(("widest",), block_size=self.block_size)
            return
        if self.block_size is not None:
            check_whole(block_size=self.block_size)
        for fmt in (self.format, self.input_format):
            if fmt is not None and not (self.block > 0 and fmt.holds(self.block)):
                raise ValueError(
                    f"block_size={self.block_size} must be a multiple of group_size="
                    f"{fmt.group_size} of {fmt.name}"
                )

    def _check_combination(self):
        """Refuse fields that contradict each other."""
        formats = (self.format, self.input_format)
        if self.global_scale == "derived" and not any(map(has_constant, formats)):
            raise ValueError(
                f"global_scale='derived' is of formats with E4M3 scales and a constant, not of "
                f"{self.format.name}: use NVFP4 or NVINT4, or leave it 'constant'"
            )
        gptq = self.solver == "gptq"
        if self.balance != 1 and self.transform not in ("wush", "wus"):
            raise ValueError(
                f"balance={self.balance} is of transform='wush' and 'wus', not {self.transform!r}"
            )
        check_whole(descent=self.descent, refit=self.refit)
        if self.descent < 0:
            raise ValueError(f"descent={self.descent!r} must be a number of sweeps, 0 for none")
        if self.descent and not gptq:
            raise ValueError(f"descent={self.descent} revisits GPTQ's codes; use solver='gptq'")
        if self.refit < 0:
            raise ValueError(f"refit={self.refit!r} must be a number of rounds, 0 for none")
        if self.refit and not gptq:
            raise ValueError(f"refit={self.refit} fits GPTQ's transforms; use solver='gptq'")
        if self.input_error != "ignore" and not gptq:
            raise ValueError(f"input_error={self.input_error!r} is GPTQ's; use solver='gptq'")
        for name in ("block_gain", "refit"):
            value = getattr(self, name)
            if value and self.transform in DATA_FREE:
                raise ValueError(
                    f"{name}={value} needs a transform for each block; transform="
                    f"{self.transform!r} is one for all: use 'wush' or the like"
                )
            if value and self.shared_blocks:
                raise ValueError(
                    f"{name}={value} gives each block a matrix of its own; shared_blocks=False"
                )
        for name in ("input_error", "block_gain"):
            if getattr(self, name) in ("ignore", False):
                continue
            if self.input_format is None:
                raise ValueError(f"{name} is about quantized activations; activation_format=None")
            if self.interleaved:
                raise ValueError(
                    f"{name} needs the transforms before GPTQ starts; use interleave=False"
                )

    @property
    def block(self) -> int:
        """Block size d.

        Raises:
          ValueError: the widest, which only a layer's K can tell.
        """
        if isinstance(self.block_size, str):
            raise ValueError(f"block_size={self.block_size!r} hangs on K; use fitted(K).block")
        return self.format.group_size if self.block_size is None else self.block_size

    @property
    def input_format(self) -> Format | None:
        """Format of the activations, "same" and "tuned" resolved."""
        if isinstance(self.activation_format, str):
            return {"same": self.format, "tuned": tuned(self.format)}[self.activation_format]
        return self.activation_format

    @property
    def interleaved(self) -> bool:
        """Whether GPTQ builds the transform of a layer of its own block by block."""
        own = self.transform not in DATA_FREE and not self.shared_blocks
        return self.solver == "gptq" and self.interleave and own

    @property
    def needs_sample(self) -> bool:
        """Whether calibration has to keep a sample of rows."""
        return self.block_gain or self.input_error == "sample"

    def fitted(self, k: int) -> Recipe:
        """Return the recipe of a layer with K inputs: "widest" becomes a number.

        Where no width divides K, d = group is left, as for None.

        >>> [Recipe(block_size="widest").fitted(k).block for k in (1024, 576, 96)]
        [128, 64, 32]
        """
        if self.block_size != "widest":
            return self
        formats = [fmt for fmt in (self.format, self.input_format) if fmt is not None]
        fits = [d for d in WIDTHS if not k % d and all(fmt.holds(d) for fmt in formats)]
        return self.replace(block_size=fits[0] if fits else None)

    @property
    def solved_alone(self) -> Recipe:
        """The recipe of one solve, whose formats have the global scales that were found for it."""
        return self.replace(global_scale="constant")

    def replace(self, **changes) -> Recipe:
        """Return this recipe with some fields changed."""
        return replace(self, **changes)


Rules = Recipe | Sequence[tuple[str, Recipe | None]]


class RuleBook:
    """Path rules: ``(pattern, recipe)`` pairs; the first full match wins, None skips a layer.

    Patterns are regular expressions over dotted module paths such as
    ``layers.0.self_attn.q_proj``. A bare `Recipe` stands for ``[(".*", recipe)]``.

    >>> book = RuleBook([(".*head", None), (".*", Recipe())])
    >>> book.match("lm_head") is None, book.unused(["lm_head"])
    (True, ['.*'])
    """

    def __init__(self, rules: Rules):
        known = isinstance(rules, Recipe | Iterable) and not isinstance(rules, str | Mapping)
        if not known or hasattr(rules, "dtype"):
            raise ValueError(
                f"rules is a {type(rules).__name__}; give a Recipe or a list of (pattern, Recipe "
                "or None)"
            )
        pairs = [(".*", rules)] if isinstance(rules, Recipe) else list(rules)
        if not pairs:
            raise ValueError("rules is empty; pass a Recipe or a list of (pattern, Recipe or None)")
        self._rules = []
        for item in pairs:
            try:
                pattern, recipe = item
                compiled = re.compile(pattern)
            except (TypeError, ValueError, re.error) as error:
                raise ValueError(
                    f"rules has the entry {item!r} ({error}); each must be a (regular expression, "
                    "Recipe or None) pair"
                ) from error
            if recipe is not None and not isinstance(recipe, Recipe):
                raise ValueError(f"rules[{pattern!r}] is {recipe!r}; it must be a Recipe or None")
            self._rules.append((compiled, recipe))

    def match(self, path: str) -> Recipe | None:
        """Return the recipe of the first rule that matches the whole path, or None."""
        for pattern, recipe in self._rules:
            if pattern.fullmatch(path):
                return recipe
        return None

    def unused(self, paths: Iterable[str]) -> list[str]:
        """Return the patterns that decide none of the given paths."""
        used = set()
        for path in paths:
            matches = (i for i, (pattern, _) in enumerate(self._rules) if pattern.fullmatch(path))
            used.add(next(matches, None))
        return [p.pattern for i, (p, _) in enumerate(self._rules) if i not in used]


def tuned(fmt: Format) -> Format:
    """Return a format for activations: the same bits and the same cost, the least error known.

    MXFP4 by `pow2_div3`: the constant 3.5 instead of 3, which rounds the largest value of a group
    to [3.5, 7) steps; a little clipping for a finer grid. NVFP4 by absmax, NVINT4: three candidate
    scales a group. Other formats come back as they are; FP8 has nothing to choose, since its error
    does not depend on a power of two. Measured on models in docs/quality.md.

    >>> tuned(MXFP4).global_scale
    3.5
    """
    if fmt.element == E2M1 and (fmt.rule, fmt.global_scale) == ("pow2_div3", 3.0):
        return fmt.replace(global_scale=3.5)
    if fmt.element == E2M1 and (fmt.rule, fmt.scale_dtype) == ("absmax", "e4m3"):
        return fmt.replace(rule="three_candidates")
    if fmt.rule == "signed_absmax":
        return fmt.replace(rule="signed_candidates")
    return fmt
