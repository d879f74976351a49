"""Weight decays and augmentation of a network, and the network they give.

Paper: Shen and Chen, On Penalty-based Bilevel Gradient Descent Method, 2023,
whose method is compared with what users of other methods would run.

    python -m experiments.pbgd.network --preset=quick
    python -m experiments.pbgd.network --preset=quick --data_dir=FASHION

Expected: random search finds hyperparameters with which a new network is
3 points better than without any. Time: an hour of 2 cores; `cnn` is a small
convolutional network.

The upper variable holds one weight decay per layer and two strengths of
augmentation, each as a decimal logarithm. Penalty methods, unrolled and
implicit gradients and two tuners without gradients get the same number of
gradients. Then a new network is trained with the hyperparameters found; only
its accuracy is reported, since the network within a bilevel method has seen the
validation digits (penalty) or has been trained differently (unrolled).
"""

import dataclasses
import functools
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel_jax as bj
from experiments import harness, vision
from experiments.harness.study import comparison
from experiments.pbgd import network_problem, tuners
from experiments.vision import classifiers

PENALTIES = {'v_pbgd_1': 1.0, 'v_pbgd_10': 10.0, 'v_pbgd_100': 100.0}
BILEVEL = (*PENALTIES, 't_rhg', 'rhg', 'aid')
TUNERS = ('random', 'tpe')
CONTROLS = ('none', 'start', 'by_hand')
MEANINGS = {
  **{name: f'v_pbgd with the penalty {p:g}.' for name, p in PENALTIES.items()},
  't_rhg': 'unrolled, derivative through the last tenth of the inner steps.',
  'rhg': 'unrolled, derivative through all inner steps in mixed mode.',
  'aid': 'implicit gradient with a Nyström sketch of the Hessian.',
  'random': 'random search, each trial a full training.',
  'tpe': "Bayesian search by optuna's TPE, each trial a full training.",
  'none': 'control: the smallest decays and no augmentation.',
  'start': 'control: the hyperparameters at which gradient methods start.',
  'by_hand': 'control: the best of five equal decays, by the validation loss.',
}
RANK, DAMPING = 10, 0.1  # Of the sketch.
TUNING_SEED = 1_000_000


@dataclasses.dataclass(frozen=True)
class Digits:
  """Sizes of the parts.

  Attributes:
    train: training digits.
    validation: digits of the upper loss.
    test: digits of the reported accuracy.
  """

  train: int = 500
  validation: int = 1_000
  test: int = 3_000


@dataclasses.dataclass(frozen=True)
class Settings:
  """Settings of a run.

  Attributes:
    model: mlp (784-300-10) or cnn (two convolutions and a dense layer).
    methods: methods to compare.
    training_steps: steps of a training, each on `batch` digits.
    trainings: trainings that a tuner affords; every method gets as many
      gradients, a Hessian-vector product counted as two.
    inner_steps: inner steps of an update of `rhg` and `t_rhg`.
    batch: digits of a gradient.
    rate: step size of Adam on the weights.
    rates: step sizes of Adam on the hyperparameters, one is chosen.
    seeds: number of seeds, for weights, batches and augmentation.
    digits: sizes of the parts.
  """

  model: Literal['mlp', 'cnn'] = 'mlp'
  methods: Annotated[
    tuple[str, ...],
    harness.Among((*BILEVEL, *TUNERS, *CONTROLS), MEANINGS),
  ] = (*BILEVEL, *TUNERS, *CONTROLS)
  training_steps: int = 500
  trainings: int = 12
  inner_steps: int = 100
  batch: int = 100
  rate: float = 3e-3
  rates: tuple[float, ...] = (0.01, 0.03, 0.1)
  seeds: int = 5
  digits: Digits = Digits()

  @property
  def budget(self) -> int:
    """Gradients of a search."""
    return self.training_steps * self.trainings


PRESETS = {
  'quick': Settings(),
  'cnn': Settings(model='cnn'),
  'smoke': Settings(
    methods=('v_pbgd_10', 't_rhg', 'random', 'tpe', 'none'),
    training_steps=20,
    trainings=3,
    inner_steps=10,
    rates=(0.1,),
    seeds=2,
    digits=Digits(200, 100, 200),
  ),
}


def check(settings: Settings) -> None:
  """Raises SettingsError for invalid settings."""
  if settings.batch > settings.digits.train:
    raise harness.SettingsError(
      f'batch={settings.batch} is more than digits.train='
      f'{settings.digits.train}.'
    )


def cost(method: str, inner_steps: int) -> int:
  """Gradients of one update; a Hessian-vector product counts as two."""
  return {
    't_rhg': 1 + inner_steps + 2 * max(1, inner_steps // 10),
    'rhg': 1 + 3 * inner_steps,
    'aid': 1 + inner_steps // 5 + 2 * (RANK + 1),
  }.get(method, 4)


class Study:
  """Trains networks and searches hyperparameters on one split of the digits.

  Args:
    options: options of the run.

  Attributes:
    problem: the bilevel problem.
    space: the box of hyperparameters.
    source: source of the digits.
  """

  def __init__(self, options: harness.Options) -> None:
    self._settings = settings = options.settings
    parts, self.source = vision.load_digits(
      options.data_dir, dataclasses.asdict(settings.digits)
    )
    self._parts = {name: part.pixels() for name, part in parts.items()}
    print(f'Data: {self.source.words}.')
    self._classifier = classifiers.make_classifier(settings.model)
    self.problem = network_problem.make(self._classifier, settings.batch)
    self.space = network_problem.space(self._classifier)
    self._rules = comparison.Rules(
      options,
      settings=harness.run_settings(settings, 'methods', 'rates'),
      # Tuned on the validation loss of the new network, with other seeds.
      score=lambda trained: -trained.history['validation_loss'][-1],
      tuning_seeds=(TUNING_SEED, TUNING_SEED + 1),
    )
    self._train_functions = functools.cache(self._make_training)

  def compare(self) -> dict[str, comparison.Outcome]:
    """Tunes and runs all methods."""
    grid = lambda method: (
      {'rate': self._settings.rates} if method in BILEVEL else {'rate': (1.0,)}
    )
    return comparison.compare(
      self._rules, self._settings.methods, self._search_and_train, grid
    )

  def _search_and_train(self, job):
    """Searches hyperparameters, then trains a new network with them."""
    members = len(job.seeds)
    start = np.tile(self.space.middle, (members, 1))
    if job.method in BILEVEL:
      hyper = self._descend(job, start)
    elif job.method in TUNERS:
      hyper = self._tune(job)
    elif job.method == 'by_hand':
      tried = network_problem.by_hand(self.space)
      hyper = self._best_tried(job, np.tile(tried, (members, 1, 1)))
    else:
      hyper = start if job.method == 'start' else start * 0 + self.space.low
    return self._train(job, hyper, job.name)

  def _best_tried(self, job, tried):
    """The best of points (members, trials, numbers), by a training of each."""
    losses = [self._try(job, tried[:, i], i) for i in range(tried.shape[1])]
    best = np.argmin(np.where(np.isnan(losses), np.inf, losses), axis=0)
    return tried[np.arange(len(tried)), best]

  def _try(self, job, point, trial):
    """Validation losses of trained networks, (members,)."""
    trained = self._train(job, point, f'{job.name}/trial_{trial}', draw=0)
    return trained.history['validation_loss'][-1]

  def _tune(self, job):
    """Tries points one after the other, all seeds at once."""
    search = tuners.make(job.method, self.space, job.seeds)
    for i in range(self._settings.trainings):
      search.tell(self._try(job, search.ask(), i))
    return search.best()

  def _descend(self, job, start):
    """The last hyperparameters of a bilevel method, (members, numbers)."""
    settings = self._settings
    steps = settings.budget // cost(job.method, settings.inner_steps)
    trained = harness.train(
      functools.partial(self._solver, job.method),
      harness.Task(
        lambda context: bj.BilevelParams(
          context.own, self._classifier.init(context.seed_key)
        ),
        self._batch,
        data=self._parts,
        own=jnp.asarray(start, jnp.float32),
        hyper=job.hyper,
      ),
      job.training(
        steps, max(1, steps // 10), name=f'{job.name}/search', at_once=1
      ),
      harness.Measure(self._evaluate_search),
    )
    return np.asarray(trained.params.upper)

  def _batch(self, context):
    train, validation = context.data['train'], context.data['validation']
    return network_problem.Batch(context.key, train, validation)

  def _solver(self, method, context):
    settings = self._settings
    upper = bj.Sequence(
      optax.adam(context.hyper['rate']), set=self.space.project
    )
    inner = settings.inner_steps
    weights = optax.adam(settings.rate)
    first = self._classifier.init(context.seed_key)
    later = network_problem.Batch.later
    if method in PENALTIES:
      return bj.v_pbgd(
        self.problem, penalty=PENALTIES[method], upper=upper, lower=weights
      )
    if method == 'aid':
      lower = bj.Sequence(weights, steps=inner // 5, batch_at=later)
      solve = bj.linear_solvers.nystrom(RANK, DAMPING)
      return bj.aid_bilevel(self.problem, upper=upper, lower=lower, solve=solve)
    lower = bj.Sequence(
      weights,
      steps=inner,
      batch_at=later,
      start=lambda params: first,
      restart=True,
    )
    if method == 'rhg':
      return bj.rhg(self.problem, upper=upper, lower=lower, mode='mixed')
    truncate = max(1, inner // 10)
    return bj.t_rhg(self.problem, truncate=truncate, upper=upper, lower=lower)

  def _evaluate_search(self, context, params, state):
    del state
    metrics = self._scores(context.data, params.lower)
    return metrics | self.space.named(params.upper)

  def _train(self, job, hyper, name, draw=1):
    """Trains new networks with the hyperparameters (members, numbers).

    The reported network has other first weights than those of the search, which
    are draw 0 of a seed.
    """
    solver, task, measure = self._train_functions()
    settings = self._settings
    own = {'hyper': jnp.asarray(hyper, jnp.float32)}
    own['draw'] = jnp.full(len(hyper), draw)
    return harness.train(
      solver,
      task._replace(own=own),
      job.training(
        settings.training_steps,
        settings.training_steps,
        name=name,
        at_once=1,
        save_seconds=60.0,
      ),
      measure,
    )

  def _make_training(self):
    lower, rate = self.problem.lower, self._settings.rate

    def solver(context):
      hyper = context.own['hyper']
      loss = lambda weights, batch: lower(hyper, weights, batch)
      return optax.chain(bj.gradient(loss), optax.adam(rate))

    def evaluate(context, params, state):
      del state
      hyper = self.space.named(context.own['hyper'])
      return self._scores(context.data, params) | hyper

    task = harness.Task(
      lambda context: self._classifier.init(
        jax.random.fold_in(context.seed_key, context.own['draw'])
      ),
      self._batch,
      data=self._parts,
    )
    return solver, task, harness.Measure(evaluate)

  def _scores(self, data, weights):
    losses = lambda part: classifiers.cross_entropy(
      self._classifier.apply(weights, part.images), part.labels
    )
    logits = self._classifier.apply(weights, data['test'].images)
    return {
      'validation_loss': jnp.mean(losses(data['validation'])),
      'test_accuracy': classifiers.accuracy(logits, data['test'].labels),
    }


def main(options: harness.Options) -> harness.Report:
  """Searches hyperparameters by all methods, and trains with them."""
  study = Study(options)
  outcomes = study.compare()
  names = ('test_accuracy', 'validation_loss', *study.space.names)

  def measure(outcome: comparison.Outcome) -> dict[str, Any]:
    return {name: outcome.last(name) for name in names}

  results = harness.Results()
  comparison.add_outcomes(results, outcomes, measure)
  return harness.Report(
    results, columns=(*names, 'rate', 'trials', 'seconds'), data=(study.source,)
  )


STUDY = harness.Study(main, PRESETS, check=check)

if __name__ == '__main__':
  harness.run(STUDY)
