"""Multi-task learning on tabular data: School, SARCOS and Adult.

Paper: Fernando, Shen, Liu, Chaudhury, Murugesan and Chen, Mitigating Gradient
Bias in Multi-objective Learning, 2023.

    python -m experiments.moco.tabular --preset=quick --data_dir=DATA
    python -m experiments.moco.tabular --datasets=mine.csv --targets=one,two

Expected: the bias of SMG is 1.8 (SARCOS) and 1.9 (Adult) times that of MoCo
with exact weights. Time: 4 minutes per data set on 2 cores.

`DATA/multitask` has `school.mat` (of MALSAR), `sarcos_inv_test.mat` and
`adult.csv.gz`. Without --data_dir, the tasks are synthetic: regressions with
shared features, in the shape of SARCOS. Each target column of your own LIBSVM
or csv file is a regression.
"""

import dataclasses
import pathlib
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel_jax as bj
from experiments import harness
from experiments.moco import compare, methods, tabular_data
from experiments.moco import problem as problems

# Data sets of the claims; without a data folder, `made_up` replaces them.
PUBLISHED = ('sarcos', 'adult', 'school')
# Methods with cheap weights for 139 objectives: no active sets, no
# pseudo-inverses.
MANY_OBJECTIVES = (
  *('mean', 'pcgrad', 'grad_drop', 'nash_mtl', 'stch', 'uncertainty', 'modo'),
  *('moco', *methods.SOLVERS),
)

GRID = compare.Grid((2e-3, 5e-3, 1e-2, 2e-2, 3e-2, 5e-2), (1e-2, 3e-2))


@dataclasses.dataclass(frozen=True)
class Settings(compare.Settings):
  """Settings of a run.

  Attributes:
    methods: methods to compare; School skips those too costly for 139
      objectives.
    batch: batch size; School has an eighth of it per school, Adult four times
      as many rows.
    datasets: school, sarcos or adult; made_up, which needs no data; or names of
      LIBSVM or csv files.
    targets: two or more target columns of your own file: names in its header,
      or numbers from 1.
    header: whether your csv file has a header; by default, if its first row has
      no number.
  """

  hidden: int = 32
  grid: compare.Grid = GRID
  datasets: tuple[str, ...] = ('sarcos', 'adult')
  targets: Annotated[tuple[str, ...], harness.Allowed(empty=True)] = ()
  header: bool | None = None


PRESETS = {
  'quick': Settings(),
  'smoke': Settings(
    **compare.SMOKE,
    hidden=16,
    grid=compare.Grid((1e-2, 2e-2, 3e-2), (2e-2,), max_grid_extensions=0),
  ),
  'paper': Settings(
    datasets=('sarcos', 'adult', 'school'),
    steps=10_000,
    chunk=500,
    batch=256,
    hidden=128,
    grid=compare.Grid((3e-4, 1e-3, 2e-3, 3e-3, 5e-3, 1e-2), (1e-3, 3e-3)),
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


def draw_rows(key: Any, data: dict[str, Any], size: int) -> Any:
  """Draws a batch of rows: `(inputs, targets)`."""
  inputs, targets = data['train']
  rows = jax.random.randint(key, (size,), 0, len(inputs))
  return inputs[rows], targets[rows]


def regression_problem(
  name: str, data: dict[str, Any], settings: Settings
) -> problems.Problem:
  """Makes a regression of several targets, with one head per target."""
  inputs, outputs = (z.shape[1] for z in data['train'])
  init, trunk = _model(inputs, settings.hidden, outputs)
  features = lambda params, batch: trunk(params.trunk, batch[0])

  def errors(params, hidden, batch):
    predictions = hidden @ params.heads['w'].T + params.heads['b']
    return jnp.mean((predictions - batch[1]) ** 2, axis=0)

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
    batch=draw_rows,
    split=bj.evaluation.deal_batch,
    score=losses,
    data=data,
  )


def adult_problem(
  name: str, data: dict[str, Any], settings: Settings
) -> problems.Problem:
  """Makes the tasks of Adult: accuracy of the income, and parity of the sexes.

  Both objectives share one output. The second is the squared difference of the
  mean predicted probabilities of the sexes; its metric is 1 minus the absolute
  difference of their fractions predicted to have a high income.
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
    name=name,
    tasks=tasks,
    metric='score',
    higher_is_better=True,
    init=init,
    oracle=lambda: bj.multi_objective(
      both, tasks, trunk=features, rest=('heads',)
    ),
    losses=losses,
    batch=lambda key, data, size: draw_rows(key, data, 4 * size),
    split=bj.evaluation.deal_batch,
    score=score,
    data=data,
  )


def school_problem(
  name: str, data: dict[str, Any], settings: Settings
) -> problems.Problem:
  """Makes one regression per school, with separate batches."""
  schools, _, inputs = data['train'][0].shape
  init, trunk = _model(inputs, settings.hidden, schools)

  def loss(params, batch, school):
    x, y = batch
    head = params.heads['w'][school]
    predictions = trunk(params.trunk, x) @ head + params.heads['b'][school]
    return jnp.mean((predictions - y) ** 2)

  def losses(params, batch):
    return jax.vmap(loss, (None, 0, 0))(params, batch, jnp.arange(schools))

  def batch(key, data, size):
    x, y, pupils = data['train']
    shape = (schools, max(2, size // 8))
    rows = jax.random.randint(key, shape, 0, pupils[:, None])
    take = jax.vmap(lambda values, row: values[row])
    return take(x, rows), take(y, rows)

  def score(params, part):
    x, y, size = part
    products = jnp.einsum(
      'snh,sh->sn', trunk(params.trunk, x), params.heads['w']
    )
    error = (products + params.heads['b'][:, None] - y) ** 2
    inside = jnp.arange(y.shape[1]) < size[:, None]
    return jnp.sum(error * inside, axis=1) / size

  def split(batch, parts):
    deal = lambda x: jnp.moveaxis(
      x.reshape(schools, -1, parts, *x.shape[2:]), 2, 0
    )
    return jax.tree.map(deal, batch)

  return problems.Problem(
    name=name,
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


PROBLEMS = {'adult': adult_problem, 'school': school_problem}


def ridge_baseline(data: dict[str, Any]) -> np.ndarray:
  """Test errors of one ridge regression per school.

  Schools have too few pupils (45 for training) for single-task networks. The
  penalty is chosen on the validation data of all schools.
  """
  parts = {k: tuple(map(np.asarray, v)) for k, v in data.items()}
  schools = len(parts['train'][1])

  def errors(penalty, part):
    values = []
    for s in range(schools):
      x, y, size = (v[s] for v in parts['train'])
      x = np.concatenate([x[:size], np.ones((size, 1))], axis=1)
      inner = x.T @ x + penalty * np.eye(x.shape[1])
      weights = np.linalg.solve(inner, x.T @ y[:size])
      x, y, size = (v[s] for v in parts[part])
      values.append(
        np.mean((x[:size] @ weights[:-1] + weights[-1] - y[:size]) ** 2)
      )
    return np.array(values)

  penalties = (1.0, 3.0, 10.0, 30.0, 100.0)
  best = min(penalties, key=lambda p: errors(p, 'validation').mean())
  return errors(best, 'test')


def smallest_ratio(ratios: list[harness.Interval]) -> harness.Interval:
  """The smallest of several ratios, with the smallest lower end."""
  mean = harness.reduced([x.mean for x in ratios], 'min')
  low = harness.reduced([x.mean - x.half_width for x in ratios], 'min')
  count, total = min(x.count for x in ratios), max(x.total for x in ratios)
  return harness.Interval(mean, mean - low, count, total)


def main(options: harness.Options) -> harness.Report:
  """Runs the methods on all data sets."""
  settings, results = options.settings, harness.Results()
  published = [name for name in settings.datasets if name in PUBLISHED]
  names = [
    name
    for name in settings.datasets
    if options.data_dir or name not in PUBLISHED
  ]
  compared = []
  ratios: dict[str, list[harness.Interval]] = {}
  # Reads all data first: a missing file is an error before any training.
  read = [
    tabular_data.read(
      path, options.data_dir, targets=settings.targets, header=settings.header
    )
    for path in names or ['made_up']
  ]
  sources = [source for _, source in read]
  for path, (data, source) in zip(names or ['made_up'], read):
    print(f'Data: {source.words}.', flush=True)
    name = pathlib.Path(path).name
    make = PROBLEMS.get(name, regression_problem)
    problem = make(name, data, settings)
    few = name != 'school'
    outcomes, bias_ratios = compare.compare(
      compare.Runs(problem, options),
      results,
      [m for m in settings.methods if few or m in MANY_OBJECTIVES],
      baseline=None if few else ridge_baseline(problem.data),
      # SMG is too costly for 139 objectives.
      bias_batches=settings.bias_batches if few else (),
    )
    compared.append((problem, outcomes))
    for method, ratio in bias_ratios.items():
      ratios.setdefault(method, []).append(ratio)
  for method, data_ratios in ratios.items():
    results.add(
      {'method': method}, least_bias_ratio=smallest_ratio(data_ratios)
    )
  return compare.report(
    results, compared, data=sources, published=published or PUBLISHED
  )


STUDY = harness.Study(
  main, PRESETS, check=compare.check, renamed=compare.RENAMED
)


if __name__ == '__main__':
  harness.run(STUDY)
