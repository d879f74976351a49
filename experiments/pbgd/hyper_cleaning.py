"""Data hyper-cleaning on digits: penalty methods beside strong simple controls.

    python -m experiments.pbgd.hyper_cleaning --preset=quick
    python -m experiments.pbgd.hyper_cleaning --preset=paper --data_dir=MNIST

Every method gets the same number of steps and the same grid of step sizes,
tuned on digits and a noise seed that no number in the table uses.
"""

import dataclasses
import pathlib
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

import bilevel_jax as bj
from experiments import harness
from experiments.pbgd import cleaning

BILEVEL = ('v_pbgd', 'g_pbgd')
CONTROLS = ('val_only', 'noisy_train', 'clean_part')
# Noise and first weights of the tuning runs; seeds count up from 0.
TUNING_SEED = 1_000_000


@dataclasses.dataclass(frozen=True)
class Settings:
  """Settings of a run; the paper's sizes are those of `paper`.

  Attributes:
    model: linear (784-10) or mlp (784-300-10).
    methods: what is compared.
    steps: gradient steps of every method, and of retraining. The paper has
      40,000 (linear) and 80,000 (MLP).
    chunk: steps between two measurements.
    tuning_steps: first steps of a run that tuning looks at.
    scales: tried factors of all of a method's published step sizes.
    train: polluted digits, the paper's 5,000.
    validation: clean digits of the upper loss, the paper's 5,000.
    selection: clean digits that choose steps and step sizes.
    test: digits of the reported accuracy, the paper's 10,000.
    polluted_fraction: share of the training digits exposed to noise.
    noise_rate: probability that an exposed digit's label is redrawn.
    noise_rule: redraw (from all classes, as released) or exclude (from the
      nine wrong ones).
    seeds: of noise and first weights.
  """

  model: str = 'linear'
  methods: tuple[str, ...] = BILEVEL + CONTROLS
  steps: int = 1_000
  chunk: int = 50
  tuning_steps: int = 300
  scales: tuple[float, ...] = (0.3, 1.0, 3.0, 10.0)
  train: int = 2_000
  validation: int = 1_000
  selection: int = 500
  test: int = 1_500
  polluted_fraction: float = 0.5
  noise_rate: float = 1.0
  noise_rule: str = 'redraw'
  seeds: int = 3


PRESETS = {
  'quick': Settings(),
  'paper': Settings(
    steps=40_000,
    chunk=100,
    tuning_steps=4_000,
    train=5_000,
    validation=5_000,
    selection=5_000,
    test=10_000,
  ),
  'smoke': Settings(
    methods=('v_pbgd', 'noisy_train', 'clean_part'),
    steps=200,
    chunk=50,
    tuning_steps=100,
    scales=(3.0, 10.0),
    seeds=2,
  ),
}


class Outcome(NamedTuple):
  """What a method came to, one value for each seed.

  Attributes:
    trained: the run.
    scale: the chosen factor of its step sizes.
    retrained: the run of a model trained anew on the kept digits, or None.
    seconds: of everything, tuning included.
  """

  trained: harness.Trained
  scale: float
  retrained: harness.Trained | None
  seconds: float


def check(settings: Settings) -> None:
  """Raises SettingsError for settings that no run can have."""
  known = BILEVEL + CONTROLS
  for method in settings.methods:
    if method not in known:
      raise harness.SettingsError(
        f'unknown method {method!r}; known: {", ".join(known)}.'
      )
  if settings.noise_rule not in ('redraw', 'exclude'):
    raise harness.SettingsError(
      f'noise_rule is redraw or exclude, got {settings.noise_rule!r}.'
    )
  for name in ('polluted_fraction', 'noise_rate'):
    if not 0 <= getattr(settings, name) <= 1:
      raise harness.SettingsError(
        f'{name} is in [0, 1], got {getattr(settings, name)}.'
      )
  for name in ('steps', 'tuning_steps'):
    if getattr(settings, name) % settings.chunk:
      raise harness.SettingsError(
        f'{name}={getattr(settings, name)} is no multiple of chunk='
        f'{settings.chunk}.'
      )


class Comparison:
  """Runs methods on one split of the digits.

  Args:
    options: what the flags say.
    parts: the digits.
  """

  def __init__(
    self, options: harness.Options, parts: dict[str, cleaning.Part]
  ) -> None:
    self._options = options
    self._settings = options.settings
    self._parts = parts
    self._classifier = cleaning.make_classifier(self._settings.model)

  def noise(self, seeds: tuple[int, ...]) -> tuple[Any, Any]:
    """Polluted labels and dirty flags, (seeds, train) each."""
    settings = self._settings
    pollute = lambda seed: cleaning.pollute(
      jax.random.fold_in(jax.random.key(seed), 0),
      self._parts['train'].labels,
      fraction=settings.polluted_fraction,
      rate=settings.noise_rate,
      rule=settings.noise_rule,
    )
    return jax.vmap(pollute)(jnp.asarray(seeds, jnp.uint32))

  def run(self, method: str) -> Outcome:
    """Tunes and runs a method, and retrains on what it keeps."""
    start = time.monotonic()
    scale, tuned = self._tune(method, method, None)
    trained = self._train(method, method, None, self._options.seeds, scale)
    retrained = None
    if method in BILEVEL:
      name = f'{method}_retrained'
      kept = tuned.best.params.upper >= 0
      plain_scale, _ = self._tune('plain', name, kept)
      kept = trained.best.params.upper >= 0
      seeds = self._options.seeds
      retrained = self._train('plain', name, kept, seeds, plain_scale)
    return Outcome(trained, scale, retrained, time.monotonic() - start)

  def _tune(self, method, name, kept):
    """Chooses a scale on the selection digits; the seed is used for no result.

    Returns the scale and the tuning run's member of that scale.
    """
    scales = self._settings.scales
    seeds = (TUNING_SEED,) * len(scales)
    if kept is not None:
      kept = jnp.broadcast_to(kept, (len(scales), kept.shape[-1]))
    tuned = self._train(
      method, f'{name}/tuning', kept, seeds, scales, tuning=True
    )
    winner = int(np.argmax(np.asarray(tuned.best.score)))
    chosen = jax.tree.map(lambda x: x[winner], tuned.best)
    return scales[winner], tuned._replace(best=chosen)

  def _train(self, method, name, kept, seeds, scale, *, tuning=False):
    settings, classifier = self._settings, self._classifier
    kind = method if method in BILEVEL else 'plain'
    labels, dirty = self.noise(seeds)
    weights = jnp.ones_like(labels, jnp.float32)
    if method == 'clean_part':
      weights = (~dirty).astype(jnp.float32)
    elif kept is not None:
      weights = kept.astype(jnp.float32)
    own = {'labels': labels, 'dirty': dirty, 'weights': weights}

    def solver(hyper):
      return cleaning.make_solver(
        kind,
        settings.model,
        classifier,
        steps=settings.steps,
        scale=hyper['scale'],
      )

    def init(context):
      weights = classifier.init(context.seed_key)
      if kind == 'plain':
        return weights
      return bj.BilevelParams(jnp.zeros(settings.train), weights)

    def batch(context):
      train, validation = context.data['train'], context.data['validation']
      if kind != 'plain':
        return cleaning.CleaningBatch(
          train.images, context.own['labels'], validation
        )
      if method == 'val_only':
        ones = jnp.ones(settings.validation)
        return cleaning.WeightedBatch(*validation, ones)
      return cleaning.WeightedBatch(
        train.images, context.own['labels'], context.own['weights']
      )

    def evaluate(context, params, state):
      del state
      weights = params if kind == 'plain' else params.lower
      measured = {
        f'{part}_accuracy': cleaning.accuracy(
          classifier.logits(weights, context.data[part].images),
          context.data[part].labels,
        )
        for part in ('selection', 'test')
      }
      if kind != 'plain':
        keep = params.upper >= 0
        measured['f1'] = cleaning.f1_score(keep, context.own['dirty'])
        measured['kept'] = jnp.mean(keep)
      return measured

    return harness.train(
      solver,
      init,
      batch,
      steps=settings.tuning_steps if tuning else settings.steps,
      chunk=settings.chunk,
      seeds=seeds,
      workdir=self._options.workdir,
      name=f'{settings.model}/{name}',
      data=self._parts,
      own=own,
      hyper={'scale': jnp.broadcast_to(jnp.float32(scale), (len(seeds),))},
      evaluate=evaluate,
      select='selection_accuracy',
      settings=_settings_of_one_run(settings),
    )


def _settings_of_one_run(settings: Settings) -> dict[str, Any]:
  """What one method's run depends on: not which others run beside it."""
  given = dataclasses.asdict(settings)
  return {k: v for k, v in given.items() if k not in ('methods', 'seeds')}


def at_best(trained: harness.Trained, metric: str, by: str) -> np.ndarray:
  """A metric where another is highest for the first time, one a seed."""
  score = np.where(np.isnan(trained.history[by]), -np.inf, trained.history[by])
  rows = np.argmax(score, axis=0)
  return trained.history[metric][rows, np.arange(score.shape[1])]


def summarise(
  outcomes: dict[str, Outcome], model: str
) -> tuple[dict[str, float], list[dict[str, Any]]]:
  """Metrics by stable name, and rows of the table.

  Args:
    outcomes: by method.
    model: name of the model.

  Returns:
    Means over seeds with their 95 % intervals. Without a further word, a metric
    is at the step chosen on the selection digits.
  """
  metrics, rows = {}, []

  def put(name, values):
    interval = harness.mean_interval(values)
    metrics[name] = interval.mean
    metrics[f'{name}/half_width'] = interval.half_width
    return interval

  for method, (trained, scale, retrained, seconds) in outcomes.items():
    prefix = f'{method}/{model}'
    row: dict[str, Any] = {'method': method}
    for metric, short in (('test_accuracy', 'accuracy'), ('f1', 'F1')):
      if metric not in trained.history:
        continue
      last = trained.history[metric][-1]
      selected = at_best(trained, metric, 'selection_accuracy')
      flattered = at_best(trained, metric, 'test_accuracy')
      row[f'{short}, selected'] = put(f'{prefix}/{metric}', selected)
      row[f'{short}, last'] = put(f'{prefix}/last/{metric}', last)
      best = put(f'{prefix}/best_on_test/{metric}', flattered)
      row[f'{short}, best on test'] = best
    if retrained is not None:
      again = at_best(retrained, 'test_accuracy', 'selection_accuracy')
      row['retrained'] = put(f'{prefix}/retrained_accuracy', again)
      last = retrained.history['test_accuracy'][-1]
      put(f'{prefix}/last/retrained_accuracy', last)
    metrics[f'{prefix}/scale'] = scale
    step = np.asarray(trained.best.step, np.float64)
    row['step'] = metrics[f'{prefix}/selected_step'] = float(step.mean())
    for name, values in trained.history.items():
      if name.startswith('count/'):
        metrics[f'{prefix}/{name}'] = float(values[-1].max())
    row['scale'], row['seconds'] = scale, round(seconds)
    rows.append(row)
  return metrics, rows


COLUMNS = (
  'method',
  'F1, selected',
  'retrained',
  'accuracy, selected',
  'F1, last',
  'accuracy, last',
  'F1, best on test',
  'accuracy, best on test',
  'step',
  'scale',
  'seconds',
)


def main(options: harness.Options) -> None:
  """Runs the methods and writes the table, the plots and the results."""
  start = time.monotonic()
  settings = options.settings
  check(settings)
  sizes = {part: getattr(settings, part) for part in cleaning.PARTS}
  parts, source = cleaning.load_parts(options.data_dir, sizes)
  print(f'Data: {source}')
  comparison = Comparison(options, parts)
  outcomes = {}
  for method in settings.methods:
    outcomes[method] = comparison.run(method)
    logging.info('%s done', method)
  metrics, rows = summarise(outcomes, settings.model)
  harness.write_table(options.workdir, rows, COLUMNS)
  folder = pathlib.Path(options.workdir)
  _plot(folder / 'accuracy.png', outcomes, 'test_accuracy', 'test accuracy')
  bilevel = {m: o for m, o in outcomes.items() if m in BILEVEL}
  if bilevel:
    _plot(folder / 'f1.png', bilevel, 'f1', 'F1 of keeping clean digits')
  path = harness.write_results(
    options,
    metrics=metrics,
    seconds=time.monotonic() - start,
    data=source,
    substituted='packaged digits' if options.data_dir is None else '',
    method_seconds={m: o.seconds for m, o in outcomes.items()},
  )
  print(f'Results: {path}')


def _plot(path, outcomes, metric, label):
  curves = {
    method: (outcome.trained.steps, outcome.trained.history[metric])
    for method, outcome in outcomes.items()
  }
  harness.plot_curves(path, curves, xlabel='step', ylabel=label)


if __name__ == '__main__':
  harness.run(main, PRESETS, paper='pbgd', binary='hyper_cleaning')
