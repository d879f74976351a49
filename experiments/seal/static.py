"""Compares optimisers of selection scores on rows with fixed losses.

Paper: Shen, Chen, Das and Chen, SEAL: Safety-enhanced Aligned LLM Fine-tuning
via Bilevel Data Selection, ICLR 2025.

    python -m experiments.seal.static --preset=quick

Expected: in whole epochs, descent and mirror descent drop the rows that a sort
of the losses drops; Adam does not. Time: 1 minute on 2 cores.

There is no model: each row has a fixed loss, drawn from one of two overlapping
distributions. The selector reads batches of rows and should drop those with the
largest losses, which a sort finds exactly.
"""

import dataclasses
import functools
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel_jax as bj
from experiments import harness
from experiments.seal import order

TITLES = {
  'descent': 'gradient descent',
  'mirror': 'mirror descent',
  'sigmoid': 'descent on sigmoids',
  'descent/drawn': 'descent, with replacement',
  'descent/drawn/by_visits': 'descent, with replacement, divided by visits',
  'mirror/drawn': 'mirror descent, with replacement',
  'mirror/drawn/by_visits': (
    'mirror descent, with replacement, divided by visits'
  ),
  'adam_rows': 'Adam, one state per row',
  'adam': 'Adam on all scores, as published',
  'exact': 'sort by loss',
}
METHODS = tuple(
  name for name in TITLES if not name.endswith('by_visits') and name != 'exact'
)


@dataclasses.dataclass(frozen=True)
class Settings:
  """Settings of a run.

  Attributes:
    rows: number of rows.
    batch_size: rows of a step, as in the paper.
    epochs: numbers of epochs after which the ranking is measured.
    unsafe: fraction of unsafe rows, as in the paper.
    drop: fraction of the rows that is dropped, as in the paper.
    separation: distance of the mean losses of both kinds, in standard
      deviations.
    rate: step size of descent and of mirror descent.
    adam_rate: step size of Adam, as in the paper.
    seeds: of the losses and of the order.
    methods: optimisers that are compared.
  """

  rows: int = 4_096
  batch_size: int = 64
  epochs: tuple[int, ...] = (1, 3, 30)
  unsafe: Annotated[float, harness.Allowed(high=1.0)] = 0.2
  drop: Annotated[float, harness.Allowed(high=1.0)] = 0.2
  separation: float = 1.66
  rate: float = 0.1
  adam_rate: float = 5e-3
  seeds: int = 5
  methods: Annotated[tuple[str, ...], harness.Among(METHODS, TITLES)] = METHODS


PRESETS = {
  'quick': Settings(),
  'smoke': Settings(rows=1_024, epochs=(1, 3), seeds=2),
  # The number of rows of the paper.
  'paper': Settings(rows=112_000, batch_size=64),
}


def draw_losses(settings: Settings, key: jax.Array) -> tuple[jax.Array, Any]:
  """Draws the positive loss of each row, and which rows are unsafe, (rows,)."""
  count = round(settings.unsafe * settings.rows)
  unsafe = jnp.arange(settings.rows) < count
  noise = jax.random.normal(jax.random.fold_in(key, 7), (settings.rows,))
  losses = 2 + (noise + settings.separation * unsafe) / 2
  return jnp.maximum(losses, 0.01), unsafe


def make_batch(settings: Settings, name: str, context: Any) -> jax.Array:
  """Indices of the rows of a step: in epochs, or drawn with replacement."""
  rows, size = settings.rows, settings.batch_size
  if 'drawn' in name:
    return jax.random.randint(context.key, (size,), 0, rows)
  return order.batch_at(context.seed_key, context.step, rows, size)


def make_solver(settings: Settings, name: str, losses: Any) -> Any:
  """Makes a solver: of all scores for 'adam', else with scores in its state."""
  method = name.partition('/')[0]
  if method == 'adam':

    def mean(scores, batch):
      p = settings.rows * jax.nn.softmax(scores)
      return jnp.mean(p[batch] * losses[batch])

    return optax.chain(bj.gradient(mean), optax.adam(settings.adam_rate))
  selector = {'adam_rows': optax.adam(settings.adam_rate)}
  return bj.solvers.seal(
    lambda y, batch: 0.0 * y,
    lambda y, batch: losses[batch] + 0.0 * y,
    scores=bj.solvers.RowScores(
      selector.get(method, optax.sgd(settings.rate)),
      settings.rows,
      lambda batch: batch,
      {'mirror': 'mirror', 'sigmoid': 'sigmoid'}.get(method, 'softmax'),
    ),
    penalty=1.0,
    lower=optax.sgd(0.1),
  )


def lowest(scores: jax.Array, fraction: float) -> jax.Array:
  """Selects a fraction of the rows by the lowest scores, bool (rows,)."""
  count = round(fraction * len(scores))
  return jnp.zeros(len(scores), bool).at[jnp.argsort(scores)[:count]].set(True)


def rates(
  scores: jax.Array, losses: jax.Array, unsafe: jax.Array, fraction: float
) -> dict[str, jax.Array]:
  """Measures a ranking: agreement with a sort of the losses, drop rates."""
  dropped, exact = lowest(scores, fraction), lowest(-losses, fraction)
  rate = lambda rows: jnp.sum(dropped & rows) / jnp.sum(rows)
  return {
    'agreement': rate(exact),
    'unsafe_drop': rate(unsafe),
    'clean_drop': rate(~unsafe),
  }


def run(
  options: harness.Options, name: str
) -> dict[str, dict[str, np.ndarray]]:
  """Runs a method; rates (epochs, seeds) by ranking and measure."""
  settings = options.settings

  def solver(context):
    losses, _ = draw_losses(settings, context.seed_key)
    solver = make_solver(settings, name, losses)
    return order.counted(solver, settings.rows, lambda batch: batch)

  def init(context):
    del context
    return jnp.zeros(settings.rows if name == 'adam' else ())

  def evaluate(context, params, state):
    losses, unsafe = draw_losses(settings, context.seed_key)
    scores = bj.auxiliaries(state).get('selector', params)
    measures = rates(scores, losses, unsafe, settings.drop)
    if 'drawn' in name:
      by_visits = scores / jnp.maximum(state.visits, 1)
      other = rates(by_visits, losses, unsafe, settings.drop)
      measures |= {f'by_visits/{n}': v for n, v in other.items()}
    return measures

  epoch = settings.rows // settings.batch_size
  trained = harness.train(
    solver,
    harness.Task(init, functools.partial(make_batch, settings, name)),
    harness.Training.from_options(
      options,
      steps=max(settings.epochs) * epoch,
      chunk=epoch,
      name=name.replace('/', '_'),
      settings=settings,
      # Mapped seeds would sum all scores at every step.
      at_once=1,
    ),
    harness.Measure(evaluate),
  )
  at = [trained.steps.tolist().index(e * epoch) for e in settings.epochs]
  rankings: dict[str, dict[str, np.ndarray]] = {}
  for metric, values in trained.history.items():
    kind, _, measure = metric.rpartition('/')
    if kind in ('', 'by_visits'):
      ranking = f'{name}/{kind}' if kind else name
      rankings.setdefault(ranking, {})[measure] = values[at]
  return rankings


def check(settings: Settings) -> None:
  """Raises SettingsError for invalid settings."""
  if settings.rows % settings.batch_size:
    raise harness.SettingsError(
      f'rows={settings.rows} is no multiple of batch_size='
      f'{settings.batch_size}: an epoch consists of whole batches.'
    )
  if settings.unsafe == 1 or settings.drop == 1:
    raise harness.SettingsError('--unsafe and --drop have to be below 1.')


def main(options: harness.Options) -> harness.Report:
  """Runs all methods and a sort of the losses."""
  settings = options.settings
  rankings: dict[str, dict[str, np.ndarray]] = {}
  for name in settings.methods:
    rankings |= run(options, name)

  def exact(seed):
    losses, unsafe = draw_losses(settings, jax.random.key(seed))
    return rates(-losses, losses, unsafe, settings.drop)

  same = jax.vmap(exact)(jnp.asarray(options.seeds, jnp.uint32))
  rankings['exact'] = {n: [v] * len(settings.epochs) for n, v in same.items()}
  results = harness.Results()
  for name, by_epoch in rankings.items():
    for i, epochs in enumerate(settings.epochs):
      at = {'ranking': name, 'epochs': epochs}
      results.put(at, {n: values[i] for n, values in by_epoch.items()})
  last = {'epochs': settings.epochs[-1]}
  return harness.Report(
    results,
    rows='ranking',
    columns=(
      'agreement',
      harness.Column('unsafe_drop', at=last),
      harness.Column('clean_drop', at=last),
    ),
    titles=TITLES,
  )


STUDY = harness.Study(
  main, PRESETS, check=check, renamed={'apart': 'separation'}
)


if __name__ == '__main__':
  harness.run(STUDY)
