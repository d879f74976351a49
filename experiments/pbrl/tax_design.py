"""Tax design: taxes on goods and income that maximise welfare.

Paper: Shen, Yang and Chen, Principled Penalty-based Methods for Bilevel
Reinforcement Learning and RLHF, 2024. The problem is of Thoma, Pasztor, Krause,
Ramponi and Hu, Contextual Bilevel Reinforcement Learning for Incentive
Alignment, 2024, after Hill, Bardoscia and Turrell, Solving Heterogeneous
General Equilibrium Economic Models with Deep Reinforcement Learning, 2021.

    python -m experiments.pbrl.tax_design --preset=quick

Expected: HPGD, adaptive model design and the value penalty raise welfare from
32 to 53.3. Time: 4 minutes.

Methods: the value and the Bellman penalty of the paper; HPGD, the hypergradient
at the exact response; AMD, adaptive model design, which differentiates some
backups of the response; zero order, by random differences. The exact gradient
of both tastes is a reference. A household works and buys three
goods; its assets are its state. Two tastes are the contexts. The leader sets a
tax on each good and one on income, and is judged by the welfare at the
household's exact optimum. Assets and actions are on grids, so all values are
exact. The preset `long` takes the published 1,000 updates, with the published
rate in the middle of its grid.
"""

import dataclasses
import itertools
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np

from experiments import harness
from experiments.pbrl import contexts, contextual

# Constants of the paper.
TASTES = ((0.6, 0.3, 0.1), (0.1, 0.7, 0.2))
WORK, LARGEST_TAX, FIRST_TAX = 0.1, 2.0, 0.3
HOURS, GOODS = 8.0, 5.0  # Largest amounts per step; the wage is 1.
NOISE, DISCOUNT, SPREAD = 5.0, 0.9, 2**0.5
CONSUMPTION_WEIGHT, TAX_WEIGHT = 15.0, 5.0


@dataclasses.dataclass(frozen=True)
class Settings(contextual.Settings):
  """Settings of a run, and of this problem.

  Attributes:
    assets: points of the grid of assets; the paper has a network instead.
    span: ends of this grid, plus and minus; 100 in the paper.
    hours: points of the grid of hours; 10 in the paper.
    amounts: points of the grid of each good; 5 in the paper.
  """

  temperatures: tuple[float, ...] = (0.1, 0.2, 0.3)
  penalty: tuple[float, float] = (0.3, 100.0)
  rates: tuple[float, ...] = (0.02, 0.1, 0.5)
  assets: Annotated[int, harness.Allowed(2)] = 21
  span: float = 50.0
  hours: Annotated[int, harness.Allowed(2)] = 5
  amounts: Annotated[int, harness.Allowed(2)] = 3


PRESETS = {
  'quick': Settings(),
  'smoke': Settings(
    temperatures=(0.2,),
    steps=40,
    chunk=20,
    rates=(0.1, 0.5),
    seeds=2,
    assets=11,
    hours=3,
    amounts=2,
  ),
  'long': Settings(steps=1_000, rates=(0.002, 0.01, 0.05)),
  'paper': Settings(
    steps=1_000,
    chunk=100,
    backups=100,
    rates=(0.01, 0.1, 1.0),
    assets=41,
    span=100.0,
    hours=10,
    amounts=5,
  ),
}


class Households:
  """Processes of households, by taxes and taste."""

  def __init__(self, settings: Settings):
    """Makes the grids."""
    grid = np.linspace(-settings.span, settings.span, settings.assets)
    hours = np.linspace(0, HOURS, settings.hours)
    amounts = np.linspace(0, GOODS, settings.amounts)
    actions = np.array([*itertools.product(hours, *[amounts] * 3)])
    self.grid = grid.astype(np.float32)
    self.hours = actions[:, 0].astype(np.float32)
    self.goods = actions[:, 1:].astype(np.float32)
    # Utility of assets: logarithmic, and linear for debts.
    utility = np.where(grid > 0, np.log1p(np.maximum(grid, 0) / 20), grid)
    self.asset_utility = utility.astype(np.float32)
    start = np.exp(-(grid**2) / (2 * SPREAD**2))
    self.start = (start / start.sum()).astype(np.float32)
    self.midpoints = (self.grid[1:] + self.grid[:-1]) / 2
    # Bundles of the same total leave the same assets.
    totals = actions[: len(amounts) ** 3, 1:].sum(1)
    self.totals, kinds = np.unique(totals, return_inverse=True)
    member = kinds == np.arange(len(self.totals))[:, None]
    self.member = member.astype(np.float32)
    self.hours_grid = hours.astype(np.float32)

  @property
  def shape(self) -> tuple[int, int]:
    """Shape of a table of logits, (states, actions)."""
    return len(self.grid), len(self.hours)

  def process(self, x: jax.Array, taste: jax.Array) -> contexts.Process:
    """Makes the process of a household.

    Args:
      x: logits of the taxes on three goods and on income, (4,).
      taste: index of the taste.

    Returns:
      A `Process` whose transitions and rewards depend on x.
    """
    rates = LARGEST_TAX * jax.nn.sigmoid(x)
    tax, income_tax = rates[:3], rates[3]
    preferences = jnp.take(jnp.array(TASTES, x.dtype), taste, axis=0)
    bought = self.goods / (1 + tax)
    # Powers of zero have an infinite derivative.
    positive = jnp.all(self.goods > 0, axis=1)
    safe = jnp.where(positive[:, None], bought, 1.0)
    utility = jnp.where(positive, jnp.prod(safe**preferences, axis=1), 0.0)
    rewards = self.asset_utility[:, None] + (utility - WORK * self.hours**2)
    revenue = jnp.sum(tax * bought, axis=1) + income_tax * self.hours
    consumption = CONSUMPTION_WEIGHT * jnp.mean(bought, axis=1) / GOODS
    welfare = consumption + TAX_WEIGHT * jnp.log1p(revenue)
    earned = (1 - income_tax) * self.hours_grid
    saved = earned[:, None] - self.totals.astype(np.float32)
    after = self.grid[:, None, None] + saved
    after = jnp.clip(after, self.grid[0], self.grid[-1])
    # Normal noise on the grid; the ends get its tails.
    below = jax.scipy.stats.norm.cdf(
      (self.midpoints - after[..., None]) / NOISE
    )
    edges = jnp.concatenate(
      [jnp.zeros_like(below[..., :1]), below, jnp.ones_like(below[..., :1])], -1
    )
    return contexts.Process(
      contexts.Groups(jnp.diff(edges, axis=-1), self.member),
      rewards,
      jnp.broadcast_to(welfare, rewards.shape),
      self.start,
      DISCOUNT,
    )


def make_study(settings: Settings) -> contextual.Study:
  """Makes the study of all temperatures."""
  households = Households(settings)
  first = np.log(FIRST_TAX / (LARGEST_TAX - FIRST_TAX))
  return contextual.Study(
    lambda x, taste, hyper: households.process(x, taste),
    len(TASTES),
    lambda key: first + 0.1 * jax.random.normal(key, (4,)),
    households.shape,
    contextual.product(temperature=settings.temperatures),
  )


def main(options: harness.Options) -> harness.Report:
  """Tunes and runs all methods."""
  return contextual.run(options, make_study(options.settings))


STUDY = harness.Study(main, PRESETS)


if __name__ == '__main__':
  harness.run(STUDY)
