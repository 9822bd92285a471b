"""Choosing transform and block size: by loss, within a budget, leaving out what does not fit."""

import itertools

import numpy as np
import pytest
from comparison import ONE_ORDER
from tiny import Net, rows

import wush_jax as wush
from wush_jax.calibration.choices import Choice, spend
from wush_jax.calibration.observe import Site

pytestmark = [pytest.mark.usefixtures("strict", "float32_matmuls"), pytest.mark.once]

FAST = wush.Recipe()


@pytest.fixture(scope="module")
def found():
    return wush.choose_recipes(Net(), rows(2), FAST, blocks=(32, 64))


def test_rules_quantize_the_sites(found):
    rules, choices = found
    planned = wush.plan(Net(), rules, rows(1)[0])
    assert {p for item in planned.sites for p in item.site.layers} == {p for p, _ in rules}
    assert not planned.report.unused_rules
    assert {c.site.name for c in choices} >= {"left"}
    # K = 32 takes no blocks of 64.
    assert all(c.recipe.block == 32 for c in choices if c.site.size == 32)


def test_without_a_budget_the_least_loss_wins(found):
    _, choices = found
    alone = [
        wush.choose_recipes(Net(), rows(2), FAST, transforms=[t], blocks=[d])[1]
        for t, d in itertools.product(("identity", "wush"), (32,))
    ]
    for best, *others in zip(choices, *alone, strict=True):
        # The best is among the others, too, from other programs: where their moments differ by
        # float32 rounding, so do a code or two of 2048, measured 3e-4 of the loss.
        slack = 1 if ONE_ORDER else 1.001
        assert all(best.loss <= slack * other.loss for other in others)


def test_a_budget_is_kept(found):
    _, rich = found
    spent = sum(c.nbytes for c in rich)
    _, poor = wush.choose_recipes(Net(), rows(2), FAST, blocks=(32, 64), budget=spent // 2)
    assert sum(c.nbytes for c in poor) <= spent // 2
    assert sum(c.loss for c in poor) >= sum(c.loss for c in rich)
    _, none = wush.choose_recipes(Net(), rows(2), FAST, blocks=(32, 64), budget=0)
    assert {c.recipe.transform for c in none} == {"identity"}


def choices(seed):
    """Three sites with random candidates."""
    rng = np.random.default_rng(seed)
    table = {}
    for i in range(3):
        site = Site((f"{i}",), 32)
        nbytes = np.r_[0, rng.integers(1, 20, 4)]
        losses = np.sort(rng.random(5))[::-1]
        table[site] = [
            Choice(site, FAST, float(loss), int(n))
            for n, loss in zip(np.sort(nbytes), losses, strict=True)
        ]
    return table


@pytest.mark.parametrize("seed", range(5))
def test_spending_is_nearly_optimal(seed):
    """Against all combinations: as good as the best one that leaves one step's bytes unspent."""
    table = choices(seed)
    everything = list(itertools.product(*table.values()))
    largest = max(c.nbytes for options in table.values() for c in options)
    for budget in (0, 7, 15, 30, 100):
        chosen = spend(table, budget)
        assert sum(c.nbytes for c in chosen) <= budget
        smaller = [c for c in everything if sum(x.nbytes for x in c) <= max(0, budget - largest)]
        best = min(sum(x.loss for x in c) for c in smaller)
        assert sum(c.loss for c in chosen) <= best + 1e-12
    assert sum(c.loss for c in spend(table, None)) == min(
        sum(x.loss for x in c) for c in everything
    )


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="batches holds 1; pass at least two"):
        wush.choose_recipes(Net(), rows(1), FAST)
    with pytest.raises(ValueError, match=r"transforms=\['fft'\]; give a list"):
        wush.choose_recipes(Net(), rows(2), FAST, transforms=["fft"])
    with pytest.raises(ValueError, match=r"K=32 is divided by none of blocks=\[64\]"):
        wush.choose_recipes(Net(), rows(2), FAST, transforms=["wush"], blocks=[64])
    with pytest.raises(ValueError, match="budget=10 bytes: the smallest transforms"):
        wush.choose_recipes(Net(), rows(2), FAST, transforms=["wush"], blocks=[32], budget=10)


def test_full_recipes_come_back(found):
    """Candidates are tried by rounding; what comes back is what was asked for."""
    rules, _ = wush.choose_recipes(
        Net(), rows(2), wush.BEST, transforms=["hadamard", "wush"], blocks=[32]
    )
    for _, recipe in rules:
        assert (recipe.solver, recipe.descent) == ("gptq", wush.BEST.descent)
        assert recipe.block_gain == (recipe.transform == "wush")
        assert recipe.refit == (wush.BEST.refit if recipe.transform == "wush" else 0)
