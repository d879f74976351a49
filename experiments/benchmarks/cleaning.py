"""V-PBGD and G-PBGD on data hyper-cleaning.

The problem has its published size and random data: the cost does not depend on
the values. Comparisons:

- with PyTorch: one seed, and ten (`vmap` with shared images / a loop);
- with the same step in plain jax, as rows and fused: operations;
- with a gradient step on upper + lower and the same batches: the price of the
  second level;
- seeds together / one at a time. If one seed fills the cache, two at a time
  (`lax.map`) are faster;
- with a large matrix product: the share of the peak speed.
"""

import functools
from collections.abc import Sequence

from experiments.benchmarks import measure
from experiments.benchmarks.cleaning_steps import (
  Sizes,
  by_hand,
  hyper_cleaning,
  library,
  seeds_together,
  single_level,
  slope_penalty,
)

BOUND_FLOPS, BOUND_SINGLE_LEVEL = 1.02, 2.2
SEEDS = 10


def _torch(model, sizes, seeds, context):
  """Compares the library's step with PyTorch's; several seeds use `vmap`."""
  context.peers.require('torch')
  case = functools.partial(hyper_cleaning, model, sizes)
  if seeds == 1:
    first = case(0)
    measured = measure.Program(
      *library(first, 'v_pbgd', fused=True), first.data
    )
  else:
    measured = measure.Program(*seeds_together(case, seeds))
  arguments = sizes._asdict() | {'model': model, 'seeds': seeds}
  with context.peers.process('torch_steps', 'v_pbgd', **arguments) as loop:
    return measure.compare(measured, loop.run, context)


def _by_hand(model, sizes, name, form, context):
  case = hyper_cleaning(model, sizes)
  measured, peer = (
    measure.Program(*make(case, name, fused=form == 'fused'), case.data)
    for make in (library, by_hand)
  )
  return measure.compare(measured, peer, context)


def _single_level(model, sizes, name, context):
  case = hyper_cleaning(model, sizes)
  measured = measure.Program(*library(case, name, fused=True), case.data)
  base = measure.Program(*single_level(case), case.data)
  return measure.compare(measured, base, context)


def _seeds(model, sizes, at_once, context):
  """Compares seeds together with seeds one at a time."""
  case = functools.partial(hyper_cleaning, model, sizes)
  first = case(0)
  one = measure.Program(*library(first, 'v_pbgd', fused=True), first.data)
  together = measure.Program(*seeds_together(case, SEEDS, at_once))
  # All seeds cost the same: repeats one program.
  return measure.compare(
    together.run, lambda steps: one.run(SEEDS * steps), context
  ) | {'memory': together.memory / one.memory}


def _forms(model, sizes, context):
  case = hyper_cleaning(model, sizes)
  forward, reverse = (
    measure.Program(*slope_penalty(case, forward=mode), case.data)
    for mode in (True, False)
  )
  return measure.compare(forward, reverse, context)


def _product(model, sizes, size, context):
  """Compares a step with a matrix product of as many operations."""
  case = hyper_cleaning(model, sizes)
  measured = measure.Program(*library(case, 'v_pbgd', fused=True), case.data)
  return measure.compare_to_product(measured, measured.flops, size, context)


def _growth(sizes, counts, context):
  case = functools.partial(hyper_cleaning, 'linear', sizes)
  make = lambda seeds: measure.Program(*seeds_together(case, seeds))
  return measure.growth(make, counts, context.rounds)


def rows(preset: str) -> Sequence[measure.Row]:
  """Returns the comparisons."""
  small = preset == 'smoke'
  sizes = Sizes(rows=200, features=50, hidden=16) if small else Sizes()
  product = 128 if small else 2048
  every = measure.Rows()

  for model, seeds_bound in (('linear', 0.35), ('mlp', 1.0)):
    of = f'{model}, {sizes.rows:,} rows'
    for seeds, bound in ((1, 0.9), (SEEDS, seeds_bound)):
      every.add(
        f'vpbgd/torch/{model}' + (f'/seeds{seeds}' if seeds > 1 else ''),
        f'V-PBGD, {of}, {seeds} seed{"s" * (seeds > 1)} / PyTorch',
        *(_torch, model, sizes, seeds),
        wall=bound,
      )
    for name in ('v_pbgd', 'g_pbgd'):
      for form in ('rows', 'fused'):
        every.add(
          f'vpbgd/by_hand/{model}/{name}/{form}',
          f'{name} {form}, {of} / by hand',
          *(_by_hand, model, sizes, name, form),
          flops=BOUND_FLOPS,
        )
    every.add(
      f'vpbgd/single_level/{model}',
      f'V-PBGD, {of} / a step on f + g',
      *(_single_level, model, sizes, 'v_pbgd'),
      wall=BOUND_SINGLE_LEVEL,
      flops=BOUND_SINGLE_LEVEL,
    )
    every.add(
      f'vpbgd/single_level/{model}/g_pbgd',
      f'G-PBGD, {of} / a step on f + g',
      *(_single_level, model, sizes, 'g_pbgd'),
    )
    for at_once, how in ((None, 'by vmap'), (2, '2 at a time')):
      every.add(
        f'vpbgd/seeds/{model}/{"vmap" if at_once is None else "map"}',
        f'{SEEDS} seeds {how}, {of} / one by one',
        *(_seeds, model, sizes, at_once),
        wall=1.0,
      )
    every.add(
      f'vpbgd/slope/{model}',
      f'slope penalty forward, {of} / reverse over reverse',
      *(_forms, model, sizes),
    )
    every.add(
      f'vpbgd/product/{model}',
      f'V-PBGD, {of} / a product with as many operations',
      *(_product, model, sizes, product),
    )
  counts = (1, 2, 4) if small else (1, 2, 5, 10, 20)
  every.add(
    'growth/seeds',
    f'V-PBGD, linear, seeds {counts[0]} to {counts[-1]}',
    *(_growth, sizes, counts),
    time_exponent=1.0,
  )
  return every
