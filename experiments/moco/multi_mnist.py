"""Two overlapping digits, two tasks: which digit is left, which is right.

Paper: Fernando, Shen, Liu, Chaudhury, Murugesan and Chen, Mitigating Gradient
Bias in Multi-objective Learning, 2023.

    python -m experiments.moco.multi_mnist --preset=quick
    python -m experiments.moco.multi_mnist --preset=paper --data_dir=MNIST

Expected: MoCo level with the mean of the losses (dm 3.0 and 3.1 %); the bias of
SMG is 1.2 times that of MoCo with exact weights. Time: 10 minutes for quick on
2 cores.

Pairs are drawn anew for every batch. Without --data_dir the digits are the
5,000 packaged ones; with the folder of Fashion-MNIST it is Multi-Fashion.
"""

import dataclasses
import pathlib
import time
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import optax

import bilevel_jax as bj
from experiments import harness
from experiments.moco import compare, methods
from experiments.moco import problem as problems

SIDE, CANVAS, SHIFT, CLASSES = 28, 36, 8, 10
TASKS = ('left', 'right')
# What a run of one method and seed does not depend on.
APART = ('methods', 'bias_batches', *compare.APART)


@dataclasses.dataclass(frozen=True)
class Settings:
  """Settings of a run.

  Attributes:
    methods: what is compared, of `methods.EVERY`.
    steps: of Adam.
    chunk: steps between two records.
    batch: pairs in a batch.
    hidden: units of each of the two hidden layers of the trunk.
    pool: the canvas of 36 x 36 is averaged over squares of this side.
    rates: the learning rates that are tried by a method without a
      hyperparameter of its own.
    rates_beside_own: by the others, a third as many, at each value of theirs.
    widen: how often the rates may be widened where the best is at an end.
    bias_batches: sizes of a batch at which biases are measured; the last, as a
      rule that of the training, gives the metrics `bias_ratio`. None: of none.
    evaluated: pairs of the validation and of the test data each.
    seeds: of first weights and batches.
  """

  methods: tuple[str, ...] = methods.EVERY
  steps: int = 600
  chunk: int = 100
  batch: int = 64
  hidden: int = 64
  pool: int = 2
  rates: tuple[float, ...] = (1e-3, 2e-3, 3e-3, 5e-3, 1e-2, 2e-2)
  rates_beside_own: tuple[float, ...] = (3e-3, 1e-2)
  widen: Annotated[int, harness.Allowed(0)] = 3
  evaluated: int = 2_000
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
    hidden=32,
    pool=4,
    rates=(5e-3, 1e-2, 2e-2),
    rates_beside_own=(1e-2,),
    widen=0,
    evaluated=500,
    bias_batches=(32,),
    seeds=3,
  ),
  'paper': Settings(
    steps=20_000,
    chunk=1_000,
    batch=256,
    hidden=512,
    pool=1,
    rates=(3e-4, 5e-4, 1e-3, 2e-3, 3e-3, 5e-3),
    rates_beside_own=(1e-3, 3e-3),
    bias_batches=(16, 64, 256),
    evaluated=10_000,
  ),
}


def overlay(left: Any, right: Any, pool: int) -> Any:
  """Digits on one canvas, the second shifted down and to the right.

  Args:
    left: (n, 28, 28) in [0, 1].
    right: likewise.
    pool: side of the squares that are averaged; it divides 36.

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
  """Pairs of random digits: `(images, labels)`, labels (n, 2)."""
  rows = jax.random.randint(key, (2, count), 0, len(digits.labels))
  left, right = digits.images[rows[0]], digits.images[rows[1]]
  scale = lambda x: x.astype(jnp.float32) / 255
  images = overlay(scale(left), scale(right), pool)
  return images, digits.labels[rows].T


def load(
  data_dir: str | None, validation: int = 10_000
) -> tuple[dict[str, harness.DigitPart], harness.Source]:
  """Digits for training, validation and test, and where they are from.

  Args:
    data_dir: of the four files of MNIST or of a data set in their format;
      None for the packaged digits, of which 1,000 are for each of the last two.
    validation: how many training images are set aside.

  Returns:
    The parts by name, and the source.
  """
  held_out = 1_000 if data_dir is None else validation
  sizes = {'train': None, 'validation': held_out, 'test': 1_000}
  return harness.load_digits(data_dir, sizes, own_test=True)


def make_problem(
  settings: Settings, digits: dict[str, harness.DigitPart]
) -> problems.Problem:
  """The two tasks on one perceptron."""
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

  def head_loss(task):
    def loss(params, hidden, batch):
      head = jax.tree.map(lambda x: x[task], params.heads)
      logits = harness.thin_product(hidden, head['w']) + head['b']
      losses = optax.losses.softmax_cross_entropy_with_integer_labels(
        logits, batch[1][:, task]
      )
      return losses.mean()

    return loss

  heads = tuple(head_loss(task) for task in range(len(TASKS)))

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
    batch=lambda key, data: draw_pairs(
      key, data['train'], settings.batch, settings.pool
    ),
    split=bj.evaluation.deal_batch,
    score=score,
    data=data,
  )


def check(settings: Settings) -> None:
  """Raises SettingsError for settings that no run can have."""
  compare.check(
    settings.methods, compare.Grid(settings.rates, settings.rates_beside_own)
  )
  if CANVAS % settings.pool:
    raise harness.SettingsError(f'pool divides {CANVAS}, got {settings.pool}.')


def main(options: harness.Options) -> None:
  """Runs the methods and writes the table, the plots and the results."""
  start = time.monotonic()
  settings = options.settings
  digits, source = load(options.data_dir)
  print(f'Data: {source.words}.')
  metrics, rows, outcomes = compare.compare(
    make_problem(settings, digits),
    settings.methods,
    options,
    steps=settings.steps,
    chunk=settings.chunk,
    grid=compare.Grid(settings.rates, settings.rates_beside_own),
    settings=harness.settings_of(settings, *APART),
    widenings=settings.widen,
    by_batch={
      batch: make_problem(dataclasses.replace(settings, batch=batch), digits)
      for batch in settings.bias_batches
    },
  )
  harness.write_table(options.workdir, rows, compare.columns(rows))
  folder = pathlib.Path(options.workdir)
  title = 'Multi-MNIST, learning rate chosen on validation data'
  label = 'mean test accuracy'
  compare.plot_both(folder, 'accuracy', outcomes, label, title)
  path = harness.write_results(
    options,
    metrics=metrics,
    seconds=time.monotonic() - start,
    curves=compare.curves_of(outcomes),
    data=(source,),
    published=('MNIST',),
  )
  print(f'Results: {path}')


STUDY = harness.Study(
  main, PRESETS, paper='moco', binary='multi_mnist', check=check
)


if __name__ == '__main__':
  harness.run(STUDY)
