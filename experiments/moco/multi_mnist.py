"""Multi-MNIST: classification of two overlapping digits, as two tasks.

Paper: Fernando, Shen, Liu, Chaudhury, Murugesan and Chen, Mitigating Gradient
Bias in Multi-objective Learning, 2023.

    python -m experiments.moco.multi_mnist --preset=quick
    python -m experiments.moco.multi_mnist --preset=paper --data_dir=MNIST

Expected: MoCo level with the mean of the losses (dm 3.0 and 3.1 %); the bias of
SMG is 1.2 times that of MoCo with exact weights. Time: 10 minutes for quick on
2 cores.

Each batch has new random pairs. Without --data_dir, the digits are the 5,000
packaged ones; with the folder of Fashion-MNIST, this is Multi-Fashion.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

import bilevel_jax as bj
from experiments import harness, vision
from experiments.moco import compare
from experiments.moco import problem as problems

SIDE, CANVAS, SHIFT, CLASSES = 28, 36, 8, 10
TASKS = ('left', 'right')

GRID = compare.Grid((1e-3, 2e-3, 3e-3, 5e-3, 1e-2, 2e-2), (3e-3, 1e-2))


@dataclasses.dataclass(frozen=True)
class Settings(compare.Settings):
  """Settings of a run.

  Attributes:
    batch: pairs per batch.
    pool: side of the average-pooling window on the canvas of 36 x 36.
    evaluated: pairs of the validation data, and of the test data.
  """

  steps: int = 600
  grid: compare.Grid = GRID
  pool: int = 2
  evaluated: int = 2_000


PRESETS = {
  'quick': Settings(),
  'smoke': Settings(
    **compare.SMOKE,
    hidden=32,
    pool=4,
    grid=compare.Grid((5e-3, 1e-2, 2e-2), (1e-2,), max_grid_extensions=0),
    evaluated=500,
  ),
  'paper': Settings(
    steps=20_000,
    chunk=1_000,
    batch=256,
    hidden=512,
    pool=1,
    grid=compare.Grid((3e-4, 5e-4, 1e-3, 2e-3, 3e-3, 5e-3), (1e-3, 3e-3)),
    bias_batches=(16, 64, 256),
    evaluated=10_000,
  ),
}


def overlay(left: Any, right: Any, pool: int) -> Any:
  """Overlays digits on a canvas, the second shifted down and to the right.

  Args:
    left: (n, 28, 28) in [0, 1].
    right: (n, 28, 28) in [0, 1].
    pool: side of the average-pooling window, a divisor of 36.

  Returns:
    (n, pixels).
  """
  room = ((0, 0), (0, SHIFT), (0, SHIFT))
  other = ((0, 0), (SHIFT, 0), (SHIFT, 0))
  canvas = jnp.maximum(jnp.pad(left, room), jnp.pad(right, other))
  side = CANVAS // pool
  squares = canvas.reshape(-1, side, pool, side, pool)
  return squares.mean((2, 4)).reshape(-1, side * side)


def draw_pairs(key: Any, digits: Any, count: int, pool: int) -> Any:
  """Draws pairs of digits: `(images, labels)`, labels (n, 2)."""
  rows = jax.random.randint(key, (2, count), 0, len(digits.labels))
  left, right = digits.images[rows[0]], digits.images[rows[1]]
  scale = lambda x: x.astype(jnp.float32) / 255
  images = overlay(scale(left), scale(right), pool)
  return images, digits.labels[rows].T


def load(
  data_dir: str | None, validation: int = 10_000
) -> tuple[dict[str, vision.DigitPart], harness.Source]:
  """Loads digits for training, validation and test.

  Args:
    data_dir: folder of MNIST or of a data set in its format; None for the
      packaged digits, with 1,000 digits each for validation and test.
    validation: number of training images for validation, with `data_dir`.

  Returns:
    The parts by name, and the source.
  """
  held_out = 1_000 if data_dir is None else validation
  sizes = {'train': None, 'validation': held_out, 'test': 1_000}
  return vision.load_digits(data_dir, sizes, own_test=True)


def make_problem(
  settings: Settings, digits: dict[str, vision.DigitPart]
) -> problems.Problem:
  """Makes the two tasks with one perceptron."""
  pixels = (CANVAS // settings.pool) ** 2
  hidden = settings.hidden
  init_trunk, trunk = problems.mlp_trunk((pixels, hidden, hidden))

  def init(key):
    one, two = jax.random.split(key)
    heads = jax.vmap(lambda k: problems.dense(k, hidden, CLASSES))(
      jax.random.split(two, len(TASKS))
    )
    return bj.sequences(trunk=init_trunk(one), heads=heads)

  def features(params, batch):
    return trunk(params.trunk, batch[0])

  def head_loss(params, hidden, batch, task):
    head = jax.tree.map(lambda x: x[task], params.heads)
    logits = harness.thin_product(hidden, head['w']) + head['b']
    return optax.losses.softmax_cross_entropy_with_integer_labels(
      logits, batch[1][:, task]
    ).mean()

  heads = tuple(
    functools.partial(head_loss, task=task) for task in range(len(TASKS))
  )

  def losses(params, batch):
    hidden = features(params, batch)
    return jnp.stack([head(params, hidden, batch) for head in heads])

  def score(params, pairs):
    hidden = features(params, pairs)
    logits = jnp.einsum('nh,thc->tnc', hidden, params.heads['w'])
    logits = logits + params.heads['b'][:, None]
    return jnp.mean(jnp.argmax(logits, -1) == pairs[1].T, axis=-1)

  data = {'train': jax.tree.map(jnp.asarray, digits['train'])}
  for i, part in enumerate(('validation', 'test')):
    data[part] = draw_pairs(
      jax.random.key(1_000 + i),
      jax.tree.map(jnp.asarray, digits[part]),
      settings.evaluated,
      settings.pool,
    )
  return problems.Problem(
    name='multi_mnist',
    tasks=TASKS,
    metric='accuracy',
    higher_is_better=True,
    init=init,
    oracle=lambda: bj.multi_objective(
      heads, TASKS, trunk=features, rest=('heads',)
    ),
    losses=losses,
    batch=lambda key, data, size: draw_pairs(
      key, data['train'], size, settings.pool
    ),
    split=bj.evaluation.deal_batch,
    score=score,
    data=data,
  )


def check(settings: Settings) -> None:
  """Raises SettingsError for invalid settings."""
  compare.check(settings)
  if CANVAS % settings.pool:
    raise harness.SettingsError(
      f'pool must divide {CANVAS}, got {settings.pool}.'
    )


def main(options: harness.Options) -> harness.Report:
  """Runs the methods."""
  settings, results = options.settings, harness.Results()
  digits, source = load(options.data_dir)
  print(f'Data: {source.words}.')
  runs = compare.Runs(make_problem(settings, digits), options)
  outcomes, _ = compare.compare(
    runs, results, settings.methods, bias_batches=settings.bias_batches
  )
  return compare.report(
    results, [(runs.problem, outcomes)], data=(source,), published=('MNIST',)
  )


STUDY = harness.Study(main, PRESETS, check=check, renamed=compare.RENAMED)


if __name__ == '__main__':
  harness.run(STUDY)
