"""A problem of one's own, to copy: training digits with wrong labels.

    python -m experiments.custom_problem --workdir=/tmp/custom
    python -m experiments.custom_problem evaluate --workdir=/tmp/custom

Expected: 93 % test accuracy; 77 % where all digits count alike (--rate=1e-9).
Time: half a minute on 2 cores; it resumes within 10 seconds.

A perceptron learns 600 digits, 240 of them with a random label; 300 clean ones
say how much each is to count.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn import datasets

import bilevel_jax as bj
from experiments import harness

TRAIN, NOISY, VALIDATE = 600, 240, 300


@dataclasses.dataclass(frozen=True)
class Settings:
  """Each field is a flag, a number above zero; see `harness.Allowed`."""

  steps: int = 2_000  # May be raised later: the run goes on.
  chunk: int = 50  # Steps between two records.
  hidden: int = 64
  penalty: float = 3.0
  rate: float = 0.1  # Of the weights of the digits.
  seeds: int = 3


PRESETS = {'quick': Settings(), 'smoke': Settings(steps=100, seeds=2)}


def load_digits() -> dict[str, tuple[np.ndarray, np.ndarray]]:
  """Pixels (rows, 64) and labels (rows,); the first `NOISY` are random."""
  pixels, labels = datasets.load_digits(return_X_y=True)
  rng = np.random.default_rng(0)
  order = rng.permutation(len(labels))
  labels[order[:NOISY]] = rng.integers(0, 10, NOISY)
  rows = np.split(order, [TRAIN, TRAIN + VALIDATE])
  parts = zip(('train', 'validate', 'test'), rows, strict=True)
  return {part: (np.float32(pixels[r] / 16), labels[r]) for part, r in parts}


def main(options: harness.Options) -> harness.Report:
  """Trains; what it returns becomes a table, a plot and `results.json`."""
  settings = options.settings
  model = nn.Sequential([nn.Dense(settings.hidden), nn.relu, nn.Dense(10)])

  def losses(y, part):
    logits = model.apply(y, part[0])
    return optax.softmax_cross_entropy_with_integer_labels(logits, part[1])

  def lower(x, y, data):
    weighted = jnp.mean(jax.nn.sigmoid(x) * losses(y, data['train']))
    return weighted + 1e-4 * optax.tree.norm(y, squared=True)

  def measure(context, params, state):
    pixels, labels = context.data['test']
    named = jnp.argmax(model.apply(params.lower, pixels), axis=-1)
    return {'accuracy': jnp.mean(named == labels)}

  upper = lambda x, y, data: losses(y, data['validate']).mean()
  rates = {'upper': settings.rate, 'lower': 3e-3, 'value': 3e-3}
  trained = harness.train(
    bj.v_pbgd(
      bj.BilevelProblem(upper, lower),
      penalty=settings.penalty,
      **{name: optax.adam(rate) for name, rate in rates.items()},
    ),
    harness.Task(
      init=lambda context: bj.BilevelParams(
        upper=jnp.zeros(TRAIN), lower=model.init(context.key, jnp.ones(64))
      ),
      batch=lambda context: context.data,
      data=load_digits(),
    ),
    harness.Training.from_options(
      options,
      steps=settings.steps,
      chunk=settings.chunk,
      settings=harness.settings_of(settings, 'steps'),
    ),
    harness.Measure(measure),
  )
  accuracy = trained.history['accuracy']  # (records, seeds)
  results = harness.Results()
  results.add({'method': 'v_pbgd'}, accuracy=accuracy[-1])
  curves = {'V-PBGD': (trained.steps, accuracy)}
  figure = harness.draw_curves(curves, xlabel='steps', ylabel='test accuracy')
  return harness.Report(results, plots={'accuracy.png': figure})


def evaluate(options: harness.Options) -> None:
  """Says which digits the run so far counts least."""
  loaded = harness.load(options.workdir)
  least = np.argsort(loaded.params['upper'].mean(axis=0))[:NOISY]
  share = f'{np.mean(least < NOISY):.0%} have a random label'
  print(f'step {loaded.step}: of the {NOISY} that count least, {share}.')


STUDY = harness.Study(
  main,
  PRESETS,
  paper='custom',
  binary='problem',
  modes={'evaluate': evaluate},
)


if __name__ == '__main__':
  harness.run(STUDY)
