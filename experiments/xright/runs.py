"""One run of one method on a problem, and the settings of those that run it."""

import dataclasses
import itertools
from typing import Annotated, Any

import jax
import optax

from experiments import harness
from experiments.lm import config as config_lib
from experiments.lm import lora, precision
from experiments.lm import tuning as tuning_lib
from experiments.xright import methods
from experiments.xright import problem as problem_lib


@dataclasses.dataclass(frozen=True)
class Adapters:
  """What is trained of a model.

  Attributes:
    rank: of the adapters; 0 trains all weights. The paper has 32.
    alpha: adapters count alpha / rank.
    weights: which weights of each layer get adapters: q, k, v, o, gate, up,
      down, also with _proj behind.
    layers: how many layers are trained, the last ones; 0 for all. The output of
      the others is then computed once for each row.
    remat: whether to trade time for memory in the backward pass.
  """

  rank: Annotated[int, harness.Allowed(low=0)] = 16
  alpha: float = 16.0
  weights: tuple[str, ...] = ('q', 'v')
  layers: Annotated[int, harness.Allowed(low=0)] = 0
  remat: bool = False


@dataclasses.dataclass(frozen=True)
class Optimiser:
  """Adam.

  Attributes:
    learning_rate: constant; in the paper 5e-5.
    clip: the largest norm of a gradient.
  """

  learning_rate: float = 2e-4
  clip: float = 1.0


@dataclasses.dataclass(frozen=True)
class Maxright:
  """Numbers of MAXRIGHT.

  Attributes:
    refresh_every: updates between two evaluations of both losses.
    memo: how far a training loss moves what MAXRIGHT knows.
  """

  refresh_every: int = 10
  memo: Annotated[float, harness.Allowed(low=0, high=1)] = 0.1


_SIZES = problem_lib.Sizes()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(precision.Precision):
  """Settings of all binaries that train a language model.

  Attributes:
    model: a folder of Hugging Face or a .gguf file; '' for
      SmolLM2-135M-Instruct, and in the preset smoke for a small random one.
    steps: updates. May be raised later, but not of stages, which are parts of
      them.
    chunk: updates between two measurements on held-out rows.
    seeds: of the adapters, the order of the rows and of ALRIGHT.
    rows: how rows become batches.
    adapters: what is trained.
    optimiser: how.
    maxright: numbers of MAXRIGHT.
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
    """What of a model is trained; `rows` says how a batch lies on a mesh."""
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

  def plan(self, share: float, optima: Any) -> methods.Plan:
    """The numbers of a method."""
    return methods.Plan(
      share=share,
      steps=self.steps,
      optima=optima,
      refresh_every=self.maxright.refresh_every,
      memo=self.maxright.memo,
      parts=self.rows.parts,
    )


def check(settings: Settings) -> None:
  """Raises SettingsError for settings that no run can have."""
  lora.weight_names(settings.adapters.weights)
  size, parts = settings.rows.batch_size, settings.rows.parts
  if size % parts:
    raise harness.SettingsError(
      f'batches of {size} do not divide into parts={parts}.'
    )
  buckets = settings.rows.buckets
  if any(a >= b for a, b in itertools.pairwise(buckets)):
    raise harness.SettingsError(f'buckets are rising lengths, got {buckets}.')


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
) -> harness.Trained:
  """Trains, and measures on the rows that are held out.

  Args:
    options: of the binary, with the seeds of the run.
    problem: the problem.
    method: its name.
    plan: its numbers.
    name: of the run.
    identity: what tells this run from others in its folder.
    record_start: whether to measure before the first step too.
    layout: how weights lie on a mesh of devices.

  Returns:
    A `Trained`; `history` has the losses on held-out rows as `held_out/NAME`.
  """
  optimiser = options.settings.optimiser

  def solver(context):
    key = context.seed_key
    losses = problem.losses(
      context.data['train'], context.frozen, jax.random.fold_in(key, 1)
    )
    return optax.chain(
      methods.oracle(method, losses, plan, key=jax.random.fold_in(key, 2)),
      optax.clip_by_global_norm(optimiser.clip),
      optax.adam(optimiser.learning_rate, b1=0.9, b2=0.95),
    )

  def evaluate(context, params, state):
    del state
    found = problem_lib.measure(
      problem, params, context.frozen, context.data['held_out']
    )
    return {f'held_out/{n}': value for n, value in found.items()}

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
    ),
    harness.Training.from_options(
      options,
      steps=plan.steps,
      chunk=options.settings.chunk,
      name=name,
      settings=identity,
      # The branch that is not taken is to cost nothing.
      at_once=1,
      layout=layout,
    ),
    harness.Measure(evaluate, record_start=record_start),
  )
