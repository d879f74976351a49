"""Scores of rows whose losses stand still: which optimisers rank them right.

Paper: Shen, Chen, Das and Chen, SEAL: Safety-enhanced Aligned LLM Fine-tuning
via Bilevel Data Selection, ICLR 2025.

    python -m experiments.seal.static --preset=quick

Expected: in whole epochs, descent and mirror descent drop the rows that the
losses themselves would drop; Adam does not. Time: 1 minute on 2 cores.

No model: each row has a loss that nothing moves, of two kinds that overlap. The
selector sees batches of rows and is to leave out those of the largest losses.
Whatever it does worse than a sort of the losses is its own doing.
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
  'descent': 'descent',
  'mirror': 'mirror descent',
  'sigmoid': 'sigmoids, descent',
  'descent/drawn': 'descent, rows drawn with replacement',
  'descent/drawn/by_visits': 'the same, divided by visits',
  'mirror/drawn': 'mirror descent, drawn with replacement',
  'mirror/drawn/by_visits': 'the same, divided by visits',
  'adam_rows': 'Adam, each row alone',
  'adam': 'Adam on all scores, as published',
  'exact': 'the losses themselves',
}
METHODS = tuple(
  name for name in TITLES if not name.endswith('by_visits') and name != 'exact'
)


@dataclasses.dataclass(frozen=True)
class Settings:
  """Settings of a run.

  Attributes:
    rows: how many there are.
    batch_size: of them a step; the paper's.
    epochs: after how many the ranking is looked at.
    unsafe: the share of the rows of larger losses; the paper's.
    drop: the share of the rows that is left out; the paper's.
    apart: between the mean losses of the kinds, in standard deviations.
    rate: step size of descent and of mirror descent.
    adam_rate: of Adam, the published one.
    seeds: of the losses and of the order.
    methods: which are run.
  """

  rows: int = 4_096
  batch_size: int = 64
  epochs: tuple[int, ...] = (1, 3, 30)
  unsafe: Annotated[float, harness.Allowed(high=1.0)] = 0.2
  drop: Annotated[float, harness.Allowed(high=1.0)] = 0.2
  apart: float = 1.66
  rate: float = 0.1
  adam_rate: float = 5e-3
  seeds: int = 5
  methods: Annotated[tuple[str, ...], harness.Among(METHODS)] = METHODS


PRESETS = {
  'quick': Settings(),
  'smoke': Settings(rows=1_024, epochs=(1, 3), seeds=2),
  # The number of rows of the paper.
  'paper': Settings(rows=112_000, batch_size=64),
}


def losses_of(settings: Settings, key: jax.Array) -> tuple[jax.Array, Any]:
  """The loss of each row, positive, and whether it is unsafe; (rows,) both."""
  count = round(settings.unsafe * settings.rows)
  unsafe = jnp.arange(settings.rows) < count
  drawn = jax.random.normal(jax.random.fold_in(key, 7), (settings.rows,))
  losses = 2 + (drawn + settings.apart * unsafe) / 2
  return jnp.maximum(losses, 0.01), unsafe


def batch_of(settings: Settings, name: str, context: Any) -> jax.Array:
  """Rows of whole epochs, or drawn with replacement."""
  rows, size = settings.rows, settings.batch_size
  if 'drawn' in name:
    return jax.random.randint(context.key, (size,), 0, rows)
  return order.batch_at(context.seed_key, context.step, rows, size)


def solver_of(settings: Settings, name: str, losses: Any) -> Any:
  """The solver; that of 'adam' is of all scores, the others keep their own."""
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


def lowest(scores: jax.Array, share: float) -> jax.Array:
  """Which rows have the lowest scores, (rows,) of bool."""
  count = round(share * len(scores))
  return jnp.zeros(len(scores), bool).at[jnp.argsort(scores)[:count]].set(True)


def rates(
  scores: jax.Array, losses: jax.Array, unsafe: jax.Array, share: float
) -> dict[str, jax.Array]:
  """Of a ranking: agreement with that of the losses, and who is dropped."""
  dropped, exact = lowest(scores, share), lowest(-losses, share)
  mean_of = lambda which: jnp.sum(dropped & which) / jnp.sum(which)
  return {
    'agreement': mean_of(exact),
    'unsafe_drop': mean_of(unsafe),
    'clean_drop': mean_of(~unsafe),
  }


def run(
  options: harness.Options, name: str
) -> dict[str, dict[str, np.ndarray]]:
  """Rates after each epoch, (epochs, seeds), by name of the ranking."""
  settings = options.settings

  def solver(context):
    losses, _ = losses_of(settings, context.seed_key)
    solver = solver_of(settings, name, losses)
    return order.counted(solver, settings.rows, lambda batch: batch)

  def init(context):
    del context
    return jnp.zeros(settings.rows if name == 'adam' else ())

  def evaluate(context, params, state):
    losses, unsafe = losses_of(settings, context.seed_key)
    scores = bj.auxiliaries(state).get('selector', params)
    found = rates(scores, losses, unsafe, settings.drop)
    if 'drawn' in name:
      by_visits = scores / jnp.maximum(state.visits, 1)
      other = rates(by_visits, losses, unsafe, settings.drop)
      found |= {f'by_visits/{n}': v for n, v in other.items()}
    return found

  each = settings.rows // settings.batch_size
  trained = harness.train(
    solver,
    harness.Task(init, functools.partial(batch_of, settings, name)),
    harness.Training.from_options(
      options,
      steps=max(settings.epochs) * each,
      chunk=each,
      name=name.replace('/', '_'),
      settings=settings,
      # Side by side, each would sum all scores at every step.
      at_once=1,
    ),
    harness.Measure(evaluate),
  )
  at = [trained.steps.tolist().index(e * each) for e in settings.epochs]
  found: dict[str, dict[str, np.ndarray]] = {}
  for metric, values in trained.history.items():
    kind, _, what = metric.rpartition('/')
    if kind in ('', 'by_visits'):
      ranking = f'{name}/{kind}' if kind else name
      found.setdefault(ranking, {})[what] = values[at]
  return found


def check(settings: Settings) -> None:
  """Raises SettingsError for settings that no run can have."""
  if settings.rows % settings.batch_size:
    raise harness.SettingsError(
      f'rows={settings.rows} is no multiple of batch_size='
      f'{settings.batch_size}: an epoch is whole batches.'
    )
  if settings.unsafe == 1 or settings.drop == 1:
    raise harness.SettingsError('unsafe and drop are below 1.')


def main(options: harness.Options) -> harness.Report:
  """Runs all methods."""
  settings = options.settings
  found: dict[str, dict[str, np.ndarray]] = {}
  for name in settings.methods:
    found |= run(options, name)

  def exact(seed):
    losses, unsafe = losses_of(settings, jax.random.key(seed))
    return rates(-losses, losses, unsafe, settings.drop)

  same = jax.vmap(exact)(jnp.asarray(options.seeds, jnp.uint32))
  found['exact'] = {
    what: [v] * len(settings.epochs) for what, v in same.items()
  }
  results = harness.Results()
  for name, by_epoch in found.items():
    for i, epochs in enumerate(settings.epochs):
      at = {'ranking': name, 'epochs': epochs}
      results.put(at, {what: values[i] for what, values in by_epoch.items()})
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


STUDY = harness.Study(main, PRESETS, paper='seal', binary='static', check=check)


if __name__ == '__main__':
  harness.run(STUDY)
