"""School, SARCOS and Adult: many tasks, seven torques, accuracy and parity.

Paper: Fernando, Shen, Liu, Chaudhury, Murugesan and Chen, Mitigating Gradient
Bias in Multi-objective Learning, 2023.

    python -m experiments.moco.tabular --preset=quick --data_dir=DATA
    python -m experiments.moco.tabular --datasets=mine.csv --targets=one,two

Expected: the bias of SMG is 1.8 (SARCOS) and 1.9 (Adult) times that of MoCo
with exact weights. Time: 4 minutes for a data set on 2 cores.

`DATA/multitask` has `school.mat` (MALSAR's), `sarcos_inv_test.mat` and
`adult.csv.gz`. Without --data_dir, the tasks are made up: regressions that
share features, of the shape of SARCOS. A LIBSVM or csv file of your own is a
regression for each of its target columns.
"""

import dataclasses
import pathlib
import time
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel_jax as bj
from experiments import harness
from experiments.moco import bias, compare, methods, tabular_data
from experiments.moco import problem as problems

# What a run of one method does not depend on.
APART = ('methods', 'bias_batches', 'datasets', *compare.APART)
# What the claims are about; without a data folder a made-up one stands in.
PUBLISHED = ('sarcos', 'adult', 'school')
# Those whose weights cost little beside 139 gradients: no active sets, no
# pseudo-inverses.
MANY_OBJECTIVES = (
  'mean',
  'pcgrad',
  'grad_drop',
  'nash_mtl',
  'stch',
  'uncertainty',
  'modo',
  'moco',
  *methods.SOLVERS,
)


@dataclasses.dataclass(frozen=True)
class Settings:
  """Settings of a run.

  Attributes:
    datasets: of school, sarcos and adult; made_up needs no data; others are
      names of LIBSVM or csv files.
    targets: columns to be predicted of a file of your own, two or more: names
      in its header, or numbers from 1.
    header: whether such a csv file has one; by default if no number is in it.
    methods: what is compared; those that cost too much with 139 objectives are
      left out there.
    steps: of Adam.
    chunk: steps between two records.
    batch: examples in a batch; for School, of each school.
    hidden: units of each of the two hidden layers of the trunk.
    rates: the learning rates that are tried by a method without a
      hyperparameter of its own.
    rates_beside_own: by the others, a third as many, at each value of theirs.
    widen: how often the rates may be widened where the best is at an end.
    bias_batches: sizes of a batch at which biases are measured; the last, as a
      rule that of the training, gives the metrics `bias_ratio`. None: of none.
    seeds: of first weights and batches.
  """

  datasets: tuple[str, ...] = ('sarcos', 'adult')
  targets: Annotated[tuple[str, ...], harness.Allowed(empty=True)] = ()
  header: bool | None = None
  methods: tuple[str, ...] = methods.EVERY
  steps: int = 500
  chunk: int = 100
  batch: int = 64
  hidden: int = 32
  rates: tuple[float, ...] = (2e-3, 5e-3, 1e-2, 2e-2, 3e-2, 5e-2)
  rates_beside_own: tuple[float, ...] = (1e-2, 3e-2)
  widen: Annotated[int, harness.Allowed(0)] = 3
  bias_batches: Annotated[tuple[int, ...], harness.Allowed(empty=True)] = (
    4,
    16,
    64,
  )
  seeds: int = 5


PRESETS = {
  'quick': Settings(),
  'smoke': Settings(
    methods=('mean', 'moco', 'moco_no_memory', 'moco_exact'),
    steps=100,
    chunk=50,
    batch=32,
    hidden=16,
    rates=(1e-2, 2e-2, 3e-2),
    rates_beside_own=(2e-2,),
    widen=0,
    bias_batches=(32,),
    seeds=3,
  ),
  'paper': Settings(
    datasets=('sarcos', 'adult', 'school'),
    steps=10_000,
    chunk=500,
    batch=256,
    hidden=128,
    rates=(3e-4, 1e-3, 2e-3, 3e-3, 5e-3, 1e-2),
    rates_beside_own=(1e-3, 3e-3),
    bias_batches=(16, 64, 256),
  ),
}


def _model(inputs: int, hidden: int, outputs: int) -> Any:
  init_trunk, trunk = problems.mlp_trunk((inputs, hidden, hidden))

  def init(key):
    one, two = jax.random.split(key)
    head = problems.dense(two, hidden, outputs)
    heads = {'w': head['w'].T / 2, 'b': head['b']}
    return bj.sequences(trunk=init_trunk(one), heads=heads)

  return init, trunk


def _rows_batch(batch: int) -> Any:
  def draw(key, data):
    inputs, targets = data['train']
    rows = jax.random.randint(key, (batch,), 0, len(inputs))
    return inputs[rows], targets[rows]

  return draw


def regression_problem(
  name: str, data: dict[str, Any], settings: Settings
) -> problems.Problem:
  """Several targets of the same inputs, each with a head."""
  inputs, outputs = (z.shape[1] for z in data['train'])
  init, trunk = _model(inputs, settings.hidden, outputs)
  features = lambda params, batch: trunk(params.trunk, batch[0])

  def errors(params, hidden, batch):
    found = hidden @ params.heads['w'].T + params.heads['b']
    return jnp.mean((found - batch[1]) ** 2, axis=0)

  losses = lambda params, batch: errors(params, features(params, batch), batch)
  task = 'target' if settings.targets else 'torque'
  tasks = tuple(f'{task}{i + 1}' for i in range(outputs))
  return problems.Problem(
    name=name,
    tasks=tasks,
    metric='error',
    higher_is_better=False,
    init=init,
    oracle=lambda: bj.multi_objective(
      errors, tasks, trunk=features, rest=('heads',)
    ),
    losses=losses,
    batch=_rows_batch(settings.batch),
    split=bj.evaluation.deal_batch,
    score=losses,
    data=data,
  )


def adult_problem(data: dict[str, Any], settings: Settings) -> problems.Problem:
  """Income from census features, and scores that do not tell the sexes apart.

  Both objectives are of one output. The second is the squared difference of the
  mean scores of the two sexes; its metric is one less the difference of the
  shares that are predicted to have a high income.
  """
  inputs = data['train'][0].shape[1]
  init, trunk = _model(inputs, settings.hidden, 1)
  features = lambda params, batch: trunk(params.trunk, batch[0])

  def gap(values, sex):
    mean = lambda w: jnp.sum(values * w) / jnp.maximum(jnp.sum(w), 1)
    return mean(sex) - mean(1 - sex)

  def both(params, hidden, batch):
    logits = hidden @ params.heads['w'][0] + params.heads['b'][0]
    income, sex = batch[1].T
    fit = optax.losses.sigmoid_binary_cross_entropy(logits, income).mean()
    return jnp.stack([fit, gap(jax.nn.sigmoid(logits), sex) ** 2])

  losses = lambda params, batch: both(params, features(params, batch), batch)

  def score(params, part):
    hidden = features(params, part)
    high = hidden @ params.heads['w'][0] + params.heads['b'][0] > 0
    income, sex = part[1].T
    right = jnp.mean(high == (income > 0.5))
    return jnp.stack([right, 1 - jnp.abs(gap(high.astype(jnp.float32), sex))])

  tasks = ('accuracy', 'parity')
  return problems.Problem(
    name='adult',
    tasks=tasks,
    metric='score',
    higher_is_better=True,
    init=init,
    oracle=lambda: bj.multi_objective(
      both, tasks, trunk=features, rest=('heads',)
    ),
    losses=losses,
    batch=_rows_batch(4 * settings.batch),
    split=bj.evaluation.deal_batch,
    score=score,
    data=data,
  )


def school_problem(
  data: dict[str, Any], settings: Settings
) -> problems.Problem:
  """One regression for each school, with batches of its own pupils."""
  schools, _, inputs = data['train'][0].shape
  init, trunk = _model(inputs, settings.hidden, schools)
  per_school = max(2, settings.batch // 8)

  def loss(params, batch, school):
    x, y = batch
    head = params.heads['w'][school]
    found = trunk(params.trunk, x) @ head + params.heads['b'][school]
    return jnp.mean((found - y) ** 2)

  def losses(params, batch):
    every = jax.vmap(loss, (None, 0, 0))
    return every(params, batch, jnp.arange(schools))

  def batch(key, data):
    x, y, size = data['train']
    rows = jax.random.randint(key, (schools, per_school), 0, size[:, None])
    take = jax.vmap(lambda values, row: values[row])
    return take(x, rows), take(y, rows)

  def score(params, part):
    x, y, size = part
    found = jnp.einsum('snh,sh->sn', trunk(params.trunk, x), params.heads['w'])
    error = (found + params.heads['b'][:, None] - y) ** 2
    inside = jnp.arange(y.shape[1]) < size[:, None]
    return jnp.sum(error * inside, axis=1) / size

  def split(batch, parts):
    deal = lambda x: jnp.moveaxis(
      x.reshape(schools, -1, parts, *x.shape[2:]), 2, 0
    )
    return jax.tree.map(deal, batch)

  return problems.Problem(
    name='school',
    tasks=tuple(f'school{i + 1}' for i in range(schools)),
    metric='error',
    higher_is_better=False,
    init=init,
    oracle=lambda: bj.multi_objective(
      loss, schools, rest=('heads',), per_task=True, by='vmap'
    ),
    losses=losses,
    batch=batch,
    split=split,
    score=score,
    data=data,
  )


def ridge_baseline(data: dict[str, Any]) -> np.ndarray:
  """Test errors of a ridge regression for each school alone.

  With 45 pupils a school a net of its own is no baseline; the penalty is chosen
  on all schools' validation data.
  """
  parts = {k: tuple(map(np.asarray, v)) for k, v in data.items()}
  schools = len(parts['train'][1])

  def errors(penalty, part):
    found = []
    for s in range(schools):
      x, y, size = (v[s] for v in parts['train'])
      x = np.concatenate([x[:size], np.ones((size, 1))], axis=1)
      inner = x.T @ x + penalty * np.eye(x.shape[1])
      weights = np.linalg.solve(inner, x.T @ y[:size])
      x, y, size = (v[s] for v in parts[part])
      found.append(
        np.mean((x[:size] @ weights[:-1] + weights[-1] - y[:size]) ** 2)
      )
    return np.array(found)

  penalties = (1.0, 3.0, 10.0, 30.0, 100.0)
  best = min(penalties, key=lambda p: errors(p, 'validation').mean())
  return errors(best, 'test')


def with_data(
  name: str, data: dict[str, Any], settings: Settings
) -> problems.Problem:
  """A problem by the name of its data."""
  if name == 'adult':
    return adult_problem(data, settings)
  if name == 'school':
    return school_problem(data, settings)
  return regression_problem(name, data, settings)


def check(settings: Settings) -> None:
  """Raises SettingsError for settings that no run can have."""
  compare.check(
    settings.methods, compare.Grid(settings.rates, settings.rates_beside_own)
  )


def _least_bias_ratios(
  names: list[str], metrics: dict[str, float]
) -> dict[str, float]:
  """By method, the least ratio of all data sets, with ends of its interval."""
  least = {}
  for method in bias.MEASURED:
    at = [f'{method}/{name}/bias_ratio' for name in names]
    measured = [key for key in at if key in metrics]
    if not measured:
      continue
    means = np.array([metrics[key] for key in measured])
    halves = np.array([metrics[f'{key}/half_width'] for key in measured])
    for end, values in (
      ('', means),
      ('/low', means - halves),
      ('/high', means + halves),
    ):
      least[f'{method}/bias_ratio{end}'] = harness.reduced(values, 'min')
  return least


def main(options: harness.Options) -> None:
  """Runs the methods on all data sets; writes table, plots and results."""
  start = time.monotonic()
  settings = options.settings
  grid = compare.Grid(settings.rates, settings.rates_beside_own)
  published = [name for name in settings.datasets if name in PUBLISHED]
  names = [
    name
    for name in settings.datasets
    if options.data_dir or name not in PUBLISHED
  ]
  sources, places = [], []
  given = harness.settings_of(settings, *APART)
  metrics, rows, curves = {}, [], {}
  folder = pathlib.Path(options.workdir)
  for name in names or ['made_up']:
    data, source = tabular_data.read(
      name, options.data_dir, targets=settings.targets, header=settings.header
    )
    print(f'Data: {source.words}.', flush=True)
    sources.append(source)
    name = pathlib.Path(name).name
    places.append(name)
    problem = with_data(name, data, settings)
    few = name != 'school'
    chosen = tuple(m for m in settings.methods if few or m in MANY_OBJECTIVES)
    same = {
      batch: with_data(
        name, problem.data, dataclasses.replace(settings, batch=batch)
      )
      for batch in settings.bias_batches
    }
    found, table, outcomes = compare.compare(
      problem,
      chosen,
      options,
      steps=settings.steps,
      chunk=settings.chunk,
      grid=grid,
      settings=given,
      widenings=settings.widen,
      baseline=None if few else ridge_baseline(problem.data),
      by_batch=same if few else {},  # SMG is not for 139 objectives.
    )
    metrics |= found
    rows += [{'data': name, **row} for row in table]
    curves |= {
      f'{name}/{method}': values
      for method, values in compare.curves_of(outcomes).items()
    }
    title = f'{name}, learning rate chosen on validation data'
    label = f'mean test {problem.metric}'
    compare.plot_both(folder, name, outcomes, label, title)
  harness.write_table(options.workdir, rows, compare.columns(rows))
  metrics |= _least_bias_ratios(places, metrics)
  path = harness.write_results(
    options,
    metrics=metrics,
    seconds=time.monotonic() - start,
    curves=curves,
    data=sources,
    published=published or PUBLISHED,
  )
  print(f'Results: {path}')


STUDY = harness.Study(
  main, PRESETS, paper='moco', binary='tabular', check=check
)


if __name__ == '__main__':
  harness.run(STUDY)
