"""Runs of a method on a problem, and settings of the binaries."""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

import jax
import optax

from experiments import harness
from experiments.lm import config as config_lib
from experiments.lm import lora, precision, training_metrics
from experiments.lm import tuning as tuning_lib
from experiments.xright import methods
from experiments.xright import problem as problem_lib


@dataclasses.dataclass(frozen=True)
class Adapters:
  """Adapters of low rank (LoRA).

  Attributes:
    rank: rank of the adapters; 0 trains all weights. 32 in the paper.
    alpha: adapters are scaled by alpha / rank.
    weights: weights of each layer with adapters: q, k, v, o, gate, up, down,
      also written q_proj and so on.
    layers: number of layers with adapters, the last ones; 0 for all. Outputs of
      the layers below are computed once per row.
    remat: whether to recompute activations in the backward pass, for memory;
      'auto' for batches whose activations exceed 2 GiB.
  """

  rank: Annotated[int, harness.Allowed(low=0)] = 16
  alpha: float = 16.0
  weights: tuple[str, ...] = ('q', 'v')
  layers: Annotated[int, harness.Allowed(low=0)] = 0
  remat: bool | Literal['auto'] = 'auto'


@dataclasses.dataclass(frozen=True)
class Optimiser:
  """Adam, with decoupled weight decay.

  Attributes:
    learning_rate: step size of Adam after the warm-up; 5e-5 in the paper.
    schedule: after the warm-up: 'constant' as in the paper, or a 'linear' or
      'cosine' decay to 0 at the last update.
    warmup: updates in which the learning rate rises linearly.
    weight_decay: decay per update and learning rate, of all trained weights.
    clip: largest norm of a gradient.
  """

  learning_rate: float = 2e-4
  schedule: Literal['constant', 'linear', 'cosine'] = 'constant'
  warmup: Annotated[int, harness.Allowed(low=0)] = 0
  weight_decay: Annotated[float, harness.Allowed(low=0)] = 0.0
  clip: float = 1.0

  def rate(self, steps: int) -> float | optax.Schedule:
    """Returns the learning rate of a run: a number, or a function of updates.

    Args:
      steps: number of updates of the run.
    """
    peak, later = self.learning_rate, steps - self.warmup
    if self.schedule == 'linear':
      then = optax.linear_schedule(peak, 0.0, later)
    elif self.schedule == 'cosine':
      then = optax.cosine_decay_schedule(peak, later)
    elif self.warmup:
      then = optax.constant_schedule(peak)
    else:
      return peak
    rise = optax.linear_schedule(
      peak / (self.warmup + 1), peak, max(self.warmup, 1)
    )
    return optax.join_schedules([rise, then], [self.warmup])

  def make(
    self, steps: int, learning_rate: Any = None
  ) -> optax.GradientTransformation:
    """Makes the optimiser of a run; see `rate`.

    Args:
      steps: number of updates of the run.
      learning_rate: replaces that of the settings, and may be traced.
    """
    if learning_rate is not None:
      tuned = dataclasses.replace(self, learning_rate=learning_rate)
      return tuned.make(steps)
    return optax.chain(
      optax.clip_by_global_norm(self.clip),
      optax.adamw(
        self.rate(steps), b1=0.9, b2=0.95, weight_decay=self.weight_decay
      )
      if self.weight_decay
      else optax.adam(self.rate(steps), b1=0.9, b2=0.95),
    )


@dataclasses.dataclass(frozen=True)
class Maxright:
  """Parameters of MAXRIGHT.

  Attributes:
    refresh_every: updates between two evaluations of both losses.
    cached_losses_rate: step of a cached loss towards a training loss; 0 keeps
      the last evaluation, 1 replaces it.
  """

  refresh_every: int = 10
  cached_losses_rate: Annotated[float, harness.Allowed(low=0, high=1)] = 0.1


_SIZES = problem_lib.Sizes()
# Former flags.
RENAMED = {
  'parts': 'rows.micro_batches',
  'rows.parts': 'rows.micro_batches',
  'memo': 'maxright.cached_losses_rate',
  'maxright.memo': 'maxright.cached_losses_rate',
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(precision.Precision):
  """Settings of all binaries that train a language model.

  Attributes:
    model: folder of Hugging Face or .gguf file; '' for SmolLM2-135M-Instruct,
      in the preset smoke for a small random model.
    steps: number of updates. A finished run continues if they are raised, but
      not in stages or with a decay, which depend on them.
    chunk: updates between two measurements on held-out rows.
    seeds: of the adapters, of the order of rows and of ALRIGHT's draws.
    rows: how rows become batches.
    adapters: of the model.
    optimiser: of all methods.
    maxright: parameters of MAXRIGHT.
  """

  model: str = ''
  steps: int = 200
  chunk: int = 20
  seeds: int = 1
  rows: problem_lib.Sizes = _SIZES
  adapters: Adapters = Adapters()
  optimiser: Optimiser = Optimiser()
  maxright: Maxright = Maxright()

  def tuning(
    self, config: config_lib.Config, rows: Any = None
  ) -> tuning_lib.Tuning:
    """Which weights are trained; `rows` is the sharding of a batch, if any."""
    adapters = self.adapters
    return tuning_lib.Tuning(
      config,
      rank=adapters.rank,
      weights=lora.weight_names(adapters.weights),
      alpha=adapters.alpha,
      layers=adapters.layers or None,
      remat=adapters.remat,
      dtype=self.compute_dtype,
      rows=rows,
    )

  def plan(self, mixing_ratio: float, optima: Any) -> methods.Plan:
    """The parameters of a method."""
    return methods.Plan(
      mixing_ratio=mixing_ratio,
      steps=self.steps,
      optima=optima,
      refresh_every=self.maxright.refresh_every,
      cached_losses_rate=self.maxright.cached_losses_rate,
      micro_batches=self.rows.micro_batches,
    )


def check(settings: Settings) -> None:
  """Raises SettingsError for settings that contradict each other."""
  lora.weight_names(settings.adapters.weights)
  size, micro_batches = settings.rows.batch_size, settings.rows.micro_batches
  if size % micro_batches:
    raise harness.SettingsError(
      f'batch_size={size} is no multiple of micro_batches={micro_batches}.'
    )
  optimiser = settings.optimiser
  if optimiser.schedule != 'constant' and optimiser.warmup >= settings.steps:
    raise harness.SettingsError(
      f'--warmup={optimiser.warmup} leaves none of --steps={settings.steps} '
      'updates for the decay.'
    )
  buckets = settings.rows.buckets
  if any(a >= b for a, b in itertools.pairwise(buckets)):
    raise harness.SettingsError(
      f'--buckets takes rising lengths, got {buckets}.'
    )


def run(
  options: harness.Options,
  problem: problem_lib.Problem,
  method: str,
  plan: methods.Plan,
  *,
  name: str,
  identity: Any,
  record_start: bool = True,
  layout: harness.Layout | None = None,
  select: bool = False,
  on_record: Callable[..., Any] | None = None,
  step_metrics: bool = False,
) -> harness.Trained:
  """Trains and measures on held-out rows.

  Args:
    options: of the binary, with the seeds of the run.
    problem: the problem.
    method: name of the method.
    plan: parameters of the method.
    name: of the run.
    identity: settings on which the run depends.
    record_start: whether to measure before the first step too.
    layout: sharding of the weights on a mesh of devices.
    select: whether to keep the weights with the best score, see `train`.
    on_record: see `harness.Measure`.
    step_metrics: see `train`.

  Returns:
    A `Trained`; `history` has held-out losses as `held_out/NAME`.
  """
  return train(
    problem,
    method,
    harness.Training.from_options(
      options,
      steps=plan.steps,
      chunk=options.settings.chunk,
      name=name,
      settings=identity,
      layout=layout,
    ),
    plan=lambda hyper: plan,
    optimiser=lambda hyper: options.settings.optimiser.make(plan.steps),
    record_start=record_start,
    select=select,
    on_record=on_record,
    step_metrics=step_metrics,
  )


def train(
  problem: problem_lib.Problem,
  method: str,
  training: harness.Training,
  *,
  plan: Callable[[Any], methods.Plan],
  optimiser: Callable[[Any], optax.GradientTransformation],
  hyper: Any = (),
  splits: Sequence[str] = ('held_out',),
  record_start: bool = True,
  select: bool = False,
  on_record: Callable[..., Any] | None = None,
  step_metrics: bool = False,
) -> harness.Trained:
  """Trains the members of a run, and measures them on rows.

  Args:
    problem: the problem.
    method: name of the method.
    training: length, seeds and folder of the run.
    plan: from a member's hyperparameters to the parameters of the method.
    optimiser: from a member's hyperparameters to its optimiser.
    hyper: hyperparameters with a leading axis of members.
    splits: rows to measure on.
    record_start: whether to measure before the first step too.
    select: whether to keep the weights with the best `score`: the negative sum
      of held-out losses, weighted by the mixing ratio.
    on_record: see `harness.Measure`.
    step_metrics: whether to record metrics of the training batches, see
      `training_metrics`, as `loss/METRIC`. The weights do not depend on it.

  Returns:
    A `Trained`; `history` has losses as `SPLIT/NAME`.
  """

  def solver(context):
    key = context.seed_key
    losses = problem.losses(
      context.data['train'],
      context.frozen,
      jax.random.fold_in(key, 1),
      measure=training_metrics.sum_metrics if step_metrics else None,
    )
    oracle = methods.oracle(
      method,
      losses,
      plan(context.hyper),
      key=jax.random.fold_in(key, 2),
      outputs=training_metrics.outputs(losses) if step_metrics else None,
    )
    if step_metrics:
      return training_metrics.with_metrics(oracle, optimiser(context.hyper))
    return optax.chain(oracle, optimiser(context.hyper))

  def evaluate(context, params, state):
    del state
    metrics = {}
    for split in splits:
      measures = problem_lib.measure(
        problem, params, context.frozen, context.data[split]
      )
      metrics |= {f'{split}/{n}': value for n, value in measures.items()}
    if select:
      shares = problem.weights(plan(context.hyper).mixing_ratio)
      losses = [s * metrics[f'held_out/{n}'] for n, s in shares.items()]
      metrics['score'] = -sum(losses)
    return metrics

  return harness.train(
    solver,
    harness.Task(
      lambda context: problem.tuning.init(context.frozen, context.key),
      lambda context: methods.batch(
        method, context.step, context.data['refresh']
      ),
      data=problem.tables,
      shard=False,
      frozen=problem.frozen,
      hyper=hyper,
    ),
    # Mapped seeds would evaluate all objectives in each step.
    training._replace(at_once=1),
    harness.Measure(
      evaluate,
      record_start=record_start,
      select='score' if select else None,
      on_record=on_record,
    ),
  )
