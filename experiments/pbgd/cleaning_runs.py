"""Runs of hyper-cleaning: tuning, training and retraining."""

import copy
import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

import bilevel_jax as bj
from experiments import harness, vision
from experiments.harness.study import comparison
from experiments.pbgd import cleaning, cleaning_methods, cleaning_report
from experiments.pbgd.cleaning_methods import BILEVEL
from experiments.vision import classifiers

# Seed of the tuning runs; reported seeds start at 0.
TUNING_SEED = 1_000_000
# Of a polluted digit in `both`; a clean one has weight 1.
WEIGHTS = (0.1, 0.3, 1.0)


class Cleaning:
  """Runs methods on one split of the digits.

  Args:
    options: options of the run.
    fractions: fraction of polluted digits per seed of `options`; if empty,
      `digits.polluted` for all seeds. Tuning always uses `digits.polluted`.
    clean: per seed, the number of clean digits of the upper loss, and at most
      as many for the selection; if empty, all. Tuning always uses all.

  Attributes:
    source: source of the digits.
  """

  def __init__(
    self,
    options: harness.Options,
    fractions: Sequence[float] = (),
    clean: Sequence[int] = (),
  ) -> None:
    self._settings = settings = options.settings
    self._fractions = fractions
    self._clean = clean
    self._methods, self._folder = settings.methods, settings.model
    # Fraction of polluted digits and number of clean ones of the tuning.
    self._tuned_at = settings.digits.polluted, settings.digits.validation
    sizes = {part: getattr(settings.digits, part) for part in cleaning.PARTS}
    parts, self.source = vision.load_digits(options.data_dir, sizes)
    self._parts = {name: part.pixels() for name, part in parts.items()}
    print(f'Data: {self.source.words}.')
    self._classifier = classifiers.make_classifier(settings.model)
    self._rules = comparison.Rules(
      options,
      settings=harness.run_settings(
        settings, 'methods', 'grid.scales', 'grid.max_grid_extensions'
      ),
      score=lambda trained: trained.best.score,
      tuning_seeds=(TUNING_SEED,),
      widenings=settings.grid.max_grid_extensions,
      keep=True,  # Retraining needs the logits of the tuning runs.
    )
    self._functions = functools.cache(self._make_functions)
    self._pollute = jax.jit(jax.vmap(self._pollute_one))

  def at_point(
    self, name: str, seeds: Sequence[int], method: str, **point: float
  ) -> comparison.Outcome:
    """Tunes and runs a method at one point of a sweep.

    Args:
      name: subfolder of the runs.
      seeds: reported seeds.
      method: the method.
      **point: `fractions` or `clean`, the value at the point.
    """
    part = copy.copy(self)  # Shares the digits and the compiled programs.
    part._methods, part._folder = (method,), f'{self._folder}/{name}'
    part._fractions, part._clean = (
      (point[k],) * len(seeds) if k in point else ()
      for k in ('fractions', 'clean')
    )
    fraction, clean = self._tuned_at
    part._tuned_at = point.get('fractions', fraction), point.get('clean', clean)
    options = self._rules.options._replace(seeds=tuple(seeds))
    part._rules = dataclasses.replace(self._rules, options=options)
    return part.compare().by_method[method]

  def compare(self) -> cleaning_report.Outcomes:
    """Tunes and runs the methods, then retrains on the digits they keep."""
    run = functools.partial(comparison.run, self._rules)
    outcomes = {
      method: run(method, self._train, self._grid(method))
      for method in self._methods
      if method != 'agreement'
    }
    retrained, at_last, f1 = {}, {}, {}
    for method in self._methods:
      outcome = outcomes['val_only' if method == 'agreement' else method]
      if method not in (*BILEVEL, 'agreement') or outcome.failure:
        continue
      retrained[method] = run(
        f'{method}_retrained', self._retrain(outcome), self._grid(method)
      )
      if method == 'agreement':
        f1[method] = self._f1(outcome)
        continue
      at_last[method] = run(
        f'{method}_retrained_last',
        self._retrain(outcome, last=True),
        {'scale': (retrained[method].point.get('scale', 1.0),)},
      )
    return cleaning_report.Outcomes(outcomes, retrained, at_last, f1)

  def _grid(self, method):
    scales = (1.0,) if method == 'suggested' else self._settings.grid.scales
    return {'scale': scales} | ({'weight': WEIGHTS} if method == 'both' else {})

  def _noise(self, seeds, *, tuning):
    """Polluted labels and dirty flags, each (members, train)."""
    fractions = () if tuning else self._fractions
    fractions = fractions or self._tuned_at[:1] * len(seeds)
    seeds = jnp.asarray(seeds, jnp.uint32)
    return self._pollute(seeds, jnp.asarray(fractions))

  def _pollute_one(self, seed, fraction):
    settings = self._settings
    return vision.pollute_labels(
      jax.random.fold_in(jax.random.key(seed), 0),
      self._parts['train'].labels,
      fraction=fraction,
      rate=settings.digits.rate,
      rule=settings.digits.rule,
    )

  def _counted(self, seeds, *, tuning):
    """Weights 1 of the clean digits that count, (members, digits) by part."""
    if not self._clean:
      return {}
    digits = self._settings.digits
    counts = self._tuned_at[1:] * len(seeds) if tuning else self._clean
    first = lambda size: np.arange(size) < np.asarray(counts)[:, None]
    return {
      'validation_counted': first(digits.validation).astype(np.float32),
      'selection_counted': first(digits.selection).astype(np.float32),
    }

  def _suggest(self):
    """Recipe from curvatures, with the noise of the tuning seed."""
    labels, _ = self._noise((TUNING_SEED,), tuning=True)
    batch = cleaning.CleaningBatch(
      self._parts['train'].images, labels[0], self._parts['validation']
    )
    key = jax.random.key(TUNING_SEED)
    return cleaning_methods.suggested_recipe(self._classifier, batch, key)

  def _retrain(self, outcome, *, last=False):
    """Retrains on the kept digits of the selected or the last step."""

    def train(job):
      if job.tuning:
        chosen = outcome.chosen
        params = _take(chosen.trained.best.params, chosen.members)
        copies = len(job.seeds) // len(chosen.members)
        params = jax.tree.map(lambda x: jnp.repeat(x, copies, 0), params)
      else:
        params = outcome.trained.params if last else outcome.trained.best.params
        params = _take(params, outcome.members)
      return self._train(job, self._keep(params, job.seeds, tuning=job.tuning))

    return train

  def _keep(self, params, seeds, *, tuning=False):
    """The digits that are kept, bool (members, train).

    A classifier keeps those whose given label it predicts.
    """
    if isinstance(params, bj.BilevelParams):
      return params.upper >= 0
    labels, _ = self._noise(seeds, tuning=tuning)
    images = self._parts['train'].images
    logits = jax.vmap(self._classifier.apply, (0, None))(params, images)
    return jnp.argmax(logits, axis=-1) == labels

  def _f1(self, outcome):
    """F1 of the digits that the selected classifiers keep, (members,)."""
    seeds = self._rules.options.seeds
    keep = self._keep(
      _take(outcome.trained.best.params, outcome.members), seeds
    )
    _, dirty = self._noise(seeds, tuning=False)
    return np.asarray(jax.vmap(cleaning.f1_score)(keep, dirty), np.float64)

  def _train(self, job, keep=None):
    settings, method = self._settings, job.method
    kind = method if method in BILEVEL else 'plain'
    labels, dirty = self._noise(job.seeds, tuning=job.tuning)
    weights = jnp.ones_like(labels, jnp.float32)
    if method == 'clean_part':
      weights = (~dirty).astype(jnp.float32)
    elif keep is not None:
      weights = keep.astype(jnp.float32)
    own = {'labels': labels, 'dirty': dirty, 'weights': weights}
    own |= self._counted(job.seeds, tuning=job.tuning)
    data = self._parts
    if method == 'both':
      own, data = self._pooled(own, job.hyper['weight'])
    steps, chunk = self._updates(kind)
    tuning_steps = settings.grid.steps // settings.chunk * chunk
    solver, init, batch, evaluate = self._functions(
      kind, method if method in ('val_only', 'both') else ''
    )
    return harness.train(
      solver,
      harness.Task(
        init,
        batch,
        data=data,
        own=own,
        hyper=job.hyper,
      ),
      job.training(
        tuning_steps if job.tuning else steps,
        chunk,
        name=f'{self._folder}/{job.name}',
        # Linear models of all seeds share one matrix product. MLPs are faster
        # one seed at a time, because a single one fills the caches.
        at_once=None if settings.model == 'linear' else 1,
      ),
      harness.Measure(evaluate, select='selection_accuracy'),
    )

  def _pooled(self, own, weight):
    """Clean and polluted digits as one part: `own`, and the data."""
    clean, polluted = self._parts['validation'], self._parts['train']
    members = len(own['labels'])
    of_all = np.ones((members, len(clean.labels)), np.float32)
    clean_labels = np.tile(clean.labels, (members, 1))
    pooled = {
      'labels': np.concatenate([clean_labels, own['labels']], 1),
      'weights': np.concatenate(
        [
          own.get('validation_counted', of_all),
          weight[:, None] * own['weights'],
        ],
        axis=1,
      ),
    }
    images = jnp.concatenate([clean.images, polluted.images])
    tested = {name: self._parts[name] for name in ('selection', 'test')}
    return own | pooled, tested | {'pooled': images}

  def _updates(self, kind):
    settings = self._settings
    return cleaning_methods.updates(
      kind, settings.model, steps=settings.steps, chunk=settings.chunk
    )

  def _make_functions(self, kind, control):
    """Functions to compile, shared by all runs of a kind."""
    settings, classifier = self._settings, self._classifier
    steps, _ = self._updates(kind)
    recipe = self._suggest() if kind == 'suggested' else None

    def solver(context):
      scale = context.hyper['scale']
      return cleaning_methods.make_solver(
        kind,
        settings.model,
        classifier,
        updates=steps,
        scale=scale,
        recipe=recipe,
      )

    def init(context):
      weights = classifier.init(context.seed_key)
      if kind == 'plain':
        return weights
      return bj.BilevelParams(jnp.zeros(settings.digits.train), weights)

    def batch(context):
      own = context.own
      if control == 'both':
        return cleaning.WeightedBatch(
          context.data['pooled'], own['labels'], own['weights']
        )
      train, validation = context.data['train'], context.data['validation']
      counted = own.get('validation_counted')
      if kind != 'plain':
        return cleaning.CleaningBatch(
          train.images, own['labels'], validation, counted
        )
      if control == 'val_only':
        if counted is None:
          counted = jnp.ones(settings.digits.validation)
        return cleaning.WeightedBatch(*validation, counted)
      return cleaning.WeightedBatch(train.images, own['labels'], own['weights'])

    def evaluate(context, params, state):
      del state
      weights = params if kind == 'plain' else params.lower
      metrics = {
        f'{part}_accuracy': classifiers.accuracy(
          classifier.apply(weights, context.data[part].images),
          context.data[part].labels,
          context.own.get(f'{part}_counted'),
        )
        for part in ('selection', 'test')
      }
      if kind != 'plain':
        keep = params.upper >= 0
        metrics['f1'] = cleaning.f1_score(keep, context.own['dirty'])
        metrics['kept'] = jnp.mean(keep)
      return metrics

    return solver, init, batch, evaluate


def _take(params, members):
  """Rows of the leaves."""
  return jax.tree.map(lambda x: x[members], params)
