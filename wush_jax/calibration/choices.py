"""One recipe a site: what each costs and loses, and which to take under a limit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from wush_jax.calibration.sites import Site
from wush_jax.solvers.recipe import Recipe

# Of a choice, what it loses in whatever counts; sums over sites are compared.
Worth = Callable[["Choice"], float]


@dataclass(frozen=True)
class Choice:
    """One recipe for one site, and what it costs and loses.

    Attributes:
      site: the layers.
      recipe: for all of them; None leaves them as they are.
      loss: mean over its layers of output loss / output power on held-out inputs.
      nbytes: what counts against the limit: of its transforms, or of its weights as well.
    """

    site: Site
    recipe: Recipe | None
    loss: float
    nbytes: int


def total_loss(choice: Choice) -> float:
    """The relative losses of a choice's layers, summed."""
    return len(choice.site.layers) * choice.loss


def spend(
    table: Mapping[Site, Sequence[Choice]], budget: int | None, worth: Worth = total_loss
) -> list[Choice]:
    """Return one choice a site: the least worth of all together, within the budget.

    Starts from each site's fewest bytes and takes the step that saves most loss a byte, along each
    site's lower convex hull, while it fits.

    Raises:
      ValueError: the smallest choices together exceed the budget.
    """
    hulls = [_hull(choices, worth) for choices in table.values()]
    at = [0] * len(hulls)
    spent = sum(hull[0].nbytes for hull in hulls)
    if budget is not None and spent > budget:
        raise ValueError(
            f"budget={budget} bytes: the smallest transforms together take {spent}; add 'identity' "
            "to transforms, or raise the budget"
        )
    for site, i in _steps(hulls, worth):
        cost = hulls[site][i + 1].nbytes - hulls[site][i].nbytes
        # A step that was skipped ends its site: the later ones would cost its bytes as well.
        if at[site] == i and (budget is None or spent + cost <= budget):
            at[site], spent = i + 1, spent + cost
    return [hull[i] for hull, i in zip(hulls, at, strict=True)]


def meet(table: Mapping[Site, Sequence[Choice]], worth: Worth, most: float) -> list[Choice]:
    """Return one choice a site: the fewest bytes whose worth, summed, is at most ``most``.

    Steps as in `spend`, until it is; then those back that the rest does not need.

    Raises:
      ValueError: even the best choices lose more.
    """
    hulls = [_hull(choices, worth) for choices in table.values()]
    at = [0] * len(hulls)

    def total() -> float:
        return sum(worth(hull[i]) for hull, i in zip(hulls, at, strict=True))

    least = sum(worth(hull[-1]) for hull in hulls)
    if least > most:
        raise ValueError(
            f"the promise of {most:.6g} cannot be kept: the best candidates of every site together "
            f"lose {least:.6g}; add better ones (None leaves a site as it is), or promise less"
        )
    taken = []
    for site, i in _steps(hulls, worth):
        if total() <= most:
            break
        at[site] = i + 1
        taken.append((hulls[site][i + 1].nbytes - hulls[site][i].nbytes, site))
    for _, site in sorted(taken, reverse=True):
        at[site] -= 1
        if total() > most:
            at[site] += 1
    return [hull[i] for hull, i in zip(hulls, at, strict=True)]


def _steps(hulls: Sequence[Sequence[Choice]], worth: Worth) -> list[tuple[int, int]]:
    """Every step along a hull, (site, from), what saves most a byte first."""
    steps = sorted(
        (-_slope(hull[i], hull[i + 1], worth), site, i)
        for site, hull in enumerate(hulls)
        for i in range(len(hull) - 1)
    )
    return [(site, i) for _, site, i in steps]


def _hull(choices: Sequence[Choice], worth: Worth) -> list[Choice]:
    """The lower convex hull of (bytes, worth): ever more bytes for ever less."""
    hull: list[Choice] = []
    for choice in sorted(choices, key=lambda c: (c.nbytes, worth(c))):
        if hull and worth(choice) >= worth(hull[-1]):
            continue
        if hull and choice.nbytes == hull[-1].nbytes:
            hull.pop()
        while len(hull) > 1 and (
            _slope(hull[-2], hull[-1], worth) <= _slope(hull[-1], choice, worth)
        ):
            hull.pop()
        hull.append(choice)
    return hull


def _slope(a: Choice, b: Choice, worth: Worth) -> float:
    """What a byte saves, from a to b."""
    return (worth(a) - worth(b)) / (b.nbytes - a.nbytes)
