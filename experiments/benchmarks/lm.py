"""What a step on one of two objectives costs, on a language model.

    python -m experiments.benchmarks.lm --preset=quick

Expected: ALRIGHT as dear as what it chose, with the operations and the memory
of the dearer objective. Time: some minutes on 2 cores.

Fine-tuning (rows with an answer) and preference (as many pairs, so twice the
rows) train adapters of SmolLM2-135M-Instruct, or all weights, by one Adam. A
selecting step (ALRIGHT, MAXRIGHT) is timed against single-objective steps in
the numbers in which it chose them, in turn, in one process:

1. ALRIGHT. Bound: 1.05.
2. MAXRIGHT that refreshes its memo once, before all that is timed, and by its
   own steps; and every 10 steps by the losses of both. Bounds: 1.05, 1.12.
3. The compiler's operations and temporary memory of ALRIGHT's step against the
   dearer objective's. Bounds: 1 %, 1.05. It counts a scanned layer once, in
   both, and the dearest branch.
4. Without a bound: the weighted sum of both (Mix) against ALRIGHT, and how much
   of a plain product's speed, timed in turn with it, a step on demonstrations
   reaches.

Times are medians of paired ratios with their range; compare CPU ratios where
the range is wide. Tokens are random: cost does not depend on them.
"""

import dataclasses
import time
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel_jax as bj
from experiments import harness
from experiments.benchmarks import measure
from experiments.lm import config as config_lib
from experiments.lm import decoder, log_probs, lora, precision, weights

NAMES = ('sft', 'dpo')
BOUNDS = {'alright': 1.05, 'maxright': 1.05, 'maxright_refreshed': 1.12}
BOUND_FLOPS, BOUND_MEMORY = 0.01, 1.05
RATE = 1e-3
TINY = config_lib.tiny(width=64, vocabulary=256)


@dataclasses.dataclass(frozen=True)
class Settings(precision.Precision):
  """Settings of a run.

  Attributes:
    weights: 'smollm2', or 'random' for a tiny model.
    layers: only the first so many.
    rows: demonstrations, and pairs, in a batch.
    length: tokens of a row.
    answer: tokens of its answer, at the end; the head sees only them.
    rank: of adapters of q and v; 0 trains all weights.
    share: how often ALRIGHT takes the comparisons.
    refresh: steps from one refresh of MAXRIGHT to the next.
    steps: in one timing; a multiple of `refresh`.
    rounds: pairs of timings of each comparison.
    product: rows of the square matrices of the plain product.
  """

  weights: str = 'smollm2'
  layers: int = 2
  rows: int = 4
  length: int = 128
  answer: int = 32
  rank: Annotated[int, harness.Allowed(0)] = 16
  share: Annotated[float, harness.Allowed(0, 1)] = 0.5
  refresh: int = 10
  steps: int = 10
  rounds: int = 3
  product: int = 1024


PRESETS = {
  'quick': Settings(),
  'paper': Settings(layers=30, rounds=9),
  'smoke': Settings(
    weights='random',
    layers=2,
    length=32,
    answer=16,
    rank=2,
    rounds=2,
    product=128,
  ),
}


def check(settings: Settings) -> None:
  """What depends on several settings.

  Raises:
    SettingsError: names what is wrong.
  """
  if settings.weights not in ('smollm2', 'random'):
    raise harness.SettingsError(
      f"--weights={settings.weights}: weights are 'smollm2' or 'random'."
    )
  if settings.answer >= settings.length:
    raise harness.SettingsError(
      f'--answer={settings.answer}: an answer is shorter than its row of '
      f'{settings.length} tokens.'
    )
  if settings.steps % settings.refresh:
    raise harness.SettingsError(
      f'--steps={settings.steps}: a multiple of the {settings.refresh} steps '
      'of --refresh, so that each timing has as many of them.'
    )


class Case(NamedTuple):
  """A model with two objectives.

  Attributes:
    config: of the model.
    params: what is trained.
    batch: `frozen` weights, and rows by objective.
    losses: by objective, of (params, {'frozen': ..., 'rows': ...}).
  """

  config: config_lib.Config
  params: Any
  batch: dict[str, Any]
  losses: dict[str, Callable[[Any, Any], jax.Array]]


def make_case(settings: Settings) -> Case:
  """Loads the model, and draws rows."""
  if settings.weights == 'random':
    dtype = settings.stored_dtype or jnp.float32
    config, whole = TINY, decoder.init(TINY, 0, dtype)
  else:
    model = weights.load(weights.smollm2(), settings.stored_dtype)
    config, whole = model.config, model.params
  layers = min(settings.layers, config.layers)
  config = dataclasses.replace(config, layers=layers)
  whole = {
    **whole,
    'layers': {n: w[:layers] for n, w in whole['layers'].items()},
  }
  trained, frozen = optax.tree.cast(whole, jnp.float32), ()
  if settings.rank:
    frozen = whole
    trained = lora.init(whole, jax.random.key(0), rank=settings.rank)

  shape = (3 * settings.rows, settings.length)
  rng = np.random.default_rng(0)
  tokens = rng.integers(0, config.vocabulary, size=shape).astype(np.int32)
  mask = np.zeros(shape, np.int32)
  mask[:, -settings.answer :] = 1
  first = slice(None, settings.rows)
  pairs = slice(settings.rows, None)  # Chosen ones, then rejected ones.
  rows = {
    'sft': {'tokens': tokens[first], 'mask': mask[first]},
    'dpo': {'tokens': tokens[pairs], 'mask': mask[pairs]},
  }

  def of(params, batch):
    own = lora.attach(batch['frozen'], params) if settings.rank else params
    rows = batch['rows']
    return log_probs.of_model(
      config,
      own,
      rows['tokens'],
      rows['mask'],
      longest=settings.answer,
      dtype=settings.compute_dtype,
    )

  def sft(params, batch):
    found = of(params, batch)
    return bj.losses.sft(found.log_probs, found.mask)

  def dpo(params, batch):
    both = jnp.split(of(params, batch).total, 2)
    return bj.losses.dpo(*both, *batch['rows']['reference'])

  fixed = jax.jit(lambda p, b: jnp.split(of(p, b).total, 2))(
    trained, {'frozen': frozen, 'rows': rows['dpo']}
  )
  rows['dpo']['reference'] = np.stack(jax.device_get(fixed))
  batch = {'frozen': frozen, 'rows': jax.tree.map(jnp.asarray, rows)}
  return Case(config, trained, batch, {'sft': sft, 'dpo': dpo})


def program(case: Case, oracle: Any) -> measure.Program:
  """A step of an oracle with Adam; its batch has the rows of both."""
  solver = optax.chain(oracle, optax.adam(RATE, b1=0.9, b2=0.95))

  def step(carry, batch):
    params, state = carry
    updates, state = solver.update(batch, state, params)
    return optax.apply_updates(params, updates), state

  batch = {
    name: {'frozen': case.batch['frozen'], 'rows': rows}
    for name, rows in case.batch['rows'].items()
  }
  return measure.Program(step, (case.params, solver.init(case.params)), batch)


def programs(case: Case, settings: Settings) -> dict[str, measure.Program]:
  """All steps, by name."""
  alone = {
    name: bj.gradient(
      lambda params, batch, name=name, loss=loss: loss(params, batch[name]),
      name=name,
    )
    for name, loss in case.losses.items()
  }
  losses = [case.losses[name] for name in NAMES]
  start = lambda params, batch: [
    case.losses[name](
      params, {'frozen': batch['frozen'], 'rows': batch['rows'][name]}
    )
    for name in NAMES
  ]
  first = jax.jit(start)(case.params, case.batch)
  # Equally far from both at the start: then it takes both.
  optima = [float(loss) - 0.5 for loss in first]
  shares = [1 - settings.share, settings.share]
  maxright = lambda every: bj.solvers.maxright(
    losses, NAMES, weights=[0.5, 0.5], optima=optima, refresh_every=every
  )
  oracles = {
    **alone,
    'alright': bj.solvers.alright(
      losses, NAMES, weights=shares, key=0, even=True
    ),
    'maxright': maxright(None),
    'maxright_refreshed': maxright(settings.refresh),
    'mix': bj.evaluation.mixed(
      {n: bj.gradient(f, name=n) for n, f in case.losses.items()}, shares
    ),
  }
  return {name: program(case, oracle) for name, oracle in oracles.items()}


class Chosen:
  """Runs single-objective steps in the numbers that a program chose last."""

  def __init__(
    self, of: measure.Program, alone: dict[str, measure.Program]
  ) -> None:
    """Takes the selecting program, and those of each objective."""
    self._of, self._alone = of, alone
    self._before = {name: 0 for name in NAMES}
    self._last = dict.fromkeys(NAMES, 1)
    self.rounds: list[dict[str, int]] = []

  def select(self, steps: int) -> None:
    """Runs the selecting program, and sees what it chose."""
    self._of.run(steps)
    counts = bj.counts(self._of.carry[1])
    now = {name: int(counts[f'gradients/{name}']) for name in NAMES}
    self._last = {name: now[name] - self._before[name] for name in NAMES}
    self._before = now

  def same(self, steps: int) -> None:
    """Runs as many steps of each objective."""
    del steps
    for name, count in self._last.items():
      if count:
        self._alone[name].run(count)
    self.rounds.append(self._last)


def model_flops(config: config_lib.Config, settings: Settings) -> float:
  """Operations of a step on demonstrations that its products need."""
  tokens = settings.rows * settings.length
  head = 2 * config.width * config.vocabulary
  body = config.flops_a_token - head
  attention = 4 * settings.length * config.heads * config.head_width
  attention *= config.layers
  # Backward once more for the inputs, and once for weights that are trained.
  times = 2 if settings.rank else 3
  return float(
    times * (tokens * body + settings.rows * settings.answer * head)
    + 3 * tokens * attention
  )


def product(settings: Settings) -> measure.Program:
  """A plain product of square matrices, whose numbers stay of one size."""
  size = settings.product
  matrix = jax.random.normal(jax.random.key(0), (size, size)) / size**0.5
  return measure.Program(lambda carry, batch: carry @ batch, matrix, matrix)


def compiled_costs(made: dict[str, measure.Program]) -> dict[str, float]:
  """What the compiler counts, printed, and by name and objective."""
  metrics: dict[str, float] = {}
  for name, one in made.items():
    metrics[f'{name}/flops'] = one.flops
    metrics[f'{name}/temporary_bytes'] = one.temporary
  for what in ('flops', 'temporary_bytes'):
    dearer = max(metrics[f'{name}/{what}'] for name in NAMES)
    for name in (*BOUNDS, 'mix'):
      metrics[f'{name}/{what}_ratio'] = metrics[f'{name}/{what}'] / dearer
  flops = metrics['alright/flops_ratio']
  memory = metrics['alright/temporary_bytes_ratio']
  verdict = lambda holds: 'holds' if holds else 'EXCEEDED'
  print(
    f'ALRIGHT / dearer objective: operations {flops:.4f} (within '
    f'{BOUND_FLOPS:.0%}: {verdict(abs(flops - 1) <= BOUND_FLOPS)}), temporary '
    f'memory {memory:.3f} (<= {BOUND_MEMORY}: '
    f'{verdict(memory <= BOUND_MEMORY)}); Mix: operations '
    f'{metrics["mix/flops_ratio"]:.2f}, memory '
    f'{metrics["mix/temporary_bytes_ratio"]:.2f}.',
    flush=True,
  )
  return metrics


def main(options: harness.Options) -> dict[str, float]:
  """Measures, prints and writes down."""
  start = time.perf_counter()
  settings = options.settings
  case = make_case(settings)
  made = programs(case, settings)
  alone = {name: made[name] for name in NAMES}
  metrics = compiled_costs(made)
  rows: list[dict[str, Any]] = []

  def add(name, compared, ratio, bound=None, note=''):
    metrics[f'{name}/wall'], metrics[f'{name}/cpu'] = ratio.wall, ratio.cpu
    metrics[f'{name}/seconds'] = ratio.seconds
    told = ''
    if bound is not None:
      told = f'CPU <= {bound}: {"holds" if ratio.cpu <= bound else "EXCEEDED"}'
    rows.append(
      {
        'compared': compared,
        'CPU': f'{ratio.cpu:.3f}',
        'wall (range)': str(ratio),
        'ms a step': f'{1e3 * ratio.seconds:.0f}',
        'bound': told,
        'note': note,
      }
    )
    print(f'{compared}: CPU {ratio.cpu:.3f}', flush=True)

  timed = {'rounds': settings.rounds, 'steps': settings.steps}
  shown = {
    'alright': 'ALRIGHT',
    'maxright': 'MAXRIGHT, without refresh',
    'maxright_refreshed': f'MAXRIGHT, refreshed every {settings.refresh} steps',
  }
  for name, title in shown.items():
    chosen = Chosen(made[name], alone)
    ratio = measure.time_ratio(chosen.select, chosen.same, **timed)
    taken = chosen.rounds[1:]  # Before them, a step to get warm.
    share = sum(one['dpo'] for one in taken) / (len(taken) * settings.steps)
    metrics[f'{name}/share'] = share
    note = f'took comparisons in {share:.0%}'
    add(name, f'{title} / what it chose', ratio, BOUNDS[name], note)
  ratio = measure.time_ratio(made['mix'].run, made['alright'].run, **timed)
  add('mix', 'Mix, both objectives a step / ALRIGHT', ratio)

  plain = product(settings)
  ratio = measure.time_ratio(made['sft'].run, plain.run, **timed)
  speed = model_flops(case.config, settings) / ratio.seconds
  peak = plain.flops / ratio.base_seconds
  metrics['sft/utilisation'] = speed / peak
  metrics['sft/gflops'], metrics['product/gflops'] = speed / 1e9, peak / 1e9
  metrics['sft/seconds'] = ratio.seconds
  harness.write_table(options.workdir, rows)
  print(
    f'A step on demonstrations: {speed / 1e9:.1f} GFLOP/s, '
    f'{metrics["sft/utilisation"]:.0%} of a plain product.'
  )
  harness.write_results(
    options, metrics=metrics, seconds=time.perf_counter() - start
  )
  return metrics


STUDY = harness.Study(
  main, PRESETS, paper='benchmarks', binary='lm', check=check
)


if __name__ == '__main__':
  harness.run(STUDY)
