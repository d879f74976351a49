"""Steps of fine-tuning language models.

Demonstrations (SFT) and preferences (DPO, the same number of pairs) train
low-rank adapters of a model with SmolLM2-135M's sizes by Adam. Weights and
tokens are random: the cost does not depend on them. Comparisons:

- SFT and DPO / PyTorch with transformers and peft. On both sides the head only
  sees the answers, and the reference's log-probabilities are precomputed.
  Memory is the peak of a process;
- a step of ALRIGHT or MAXRIGHT / the steps on single objectives that it
  selected. MAXRIGHT refreshes its cached losses once before the timing, or
  every 10 steps;
- operations and temporary memory of a step of ALRIGHT / of the costlier
  objective. The compiler counts a scanned layer once, and the costliest branch;
- the weighted sum of both objectives (Mix) / ALRIGHT;
- a step on demonstrations / a matrix product with as many operations.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel_jax as bj
from experiments.benchmarks import environment, measure
from experiments.lm import config as config_lib
from experiments.lm import decoder, log_probs, lora

NAMES = ('sft', 'dpo')
BOUND_PEER, BOUND_PEER_MEMORY = 0.95, 1.1
BOUNDS = {'alright': 1.05, 'maxright': 1.05, 'maxright_refreshed': 1.12}
BOUND_FLOPS, BOUND_MEMORY = 1.01, 1.05

RATE, REFRESH, STEPS = 1e-3, 10, 10
# Sizes of SmolLM2-135M, with the names of transformers.
SMOLLM2 = {
  'hidden_size': 576,
  'intermediate_size': 1536,
  'num_attention_heads': 9,
  'num_key_value_heads': 3,
  'vocab_size': 49_152,
}
TINY = {
  'hidden_size': 64,
  'intermediate_size': 128,
  'num_attention_heads': 4,
  'num_key_value_heads': 2,
  'vocab_size': 256,
}


class Sizes(NamedTuple):
  """Sizes of a step.

  Attributes:
    layers: number of layers.
    rows: number of demonstrations, and of pairs, in a batch.
    length: tokens of a row.
    answer: tokens of the answer at the end of a row.
    rank: rank of the adapters of q and v.
    model: other sizes of the model, with the names of transformers.
  """

  layers: int = 2
  rows: int = 4
  length: int = 128
  answer: int = 32
  rank: int = 16
  model: Any = SMOLLM2

  @property
  def config(self) -> config_lib.Config:
    """The configuration of the model."""
    heads = self.model['num_attention_heads']
    return config_lib.Config(
      family='llama',
      layers=self.layers,
      width=self.model['hidden_size'],
      hidden=self.model['intermediate_size'],
      heads=heads,
      kv_heads=self.model['num_key_value_heads'],
      head_width=self.model['hidden_size'] // heads,
      vocabulary=self.model['vocab_size'],
      rope_base=1e4,
      norm_epsilon=1e-5,
      tied=True,
    )


SMALL = Sizes(length=32, answer=16, rank=2, model=TINY)


class Case(NamedTuple):
  """A model with two objectives.

  Attributes:
    config: configuration of the model.
    params: the adapters.
    batch: `frozen` weights, and `rows` by objective.
    losses: losses of (params, {'frozen': ..., 'rows': ...}) by objective.
  """

  config: config_lib.Config
  params: Any
  batch: dict[str, Any]
  losses: dict[str, Callable[[Any, Any], jax.Array]]


def make_case(sizes: Sizes, names: Sequence[str] = NAMES) -> Case:
  """Draws weights, and rows of objectives."""
  config = sizes.config
  frozen = decoder.init(config, 0)
  trained = lora.init(frozen, jax.random.key(0), rank=sizes.rank)
  shape = (3 * sizes.rows, sizes.length)
  rng = np.random.default_rng(0)
  tokens = rng.integers(0, config.vocabulary, size=shape).astype(np.int32)
  mask = np.zeros(shape, np.int32)
  mask[:, -sizes.answer :] = 1
  first = slice(None, sizes.rows)
  pairs = slice(sizes.rows, None)  # Chosen ones, then rejected ones.
  rows = {
    'sft': {'tokens': tokens[first], 'mask': mask[first]},
    'dpo': {'tokens': tokens[pairs], 'mask': mask[pairs]},
  }

  def answers(params, batch):
    own = lora.attach(batch['frozen'], params)
    rows = batch['rows']
    return log_probs.from_tokens(
      config, own, rows['tokens'], rows['mask'], max_answer=sizes.answer
    )

  def sft(params, batch):
    rows = answers(params, batch)
    return bj.losses.sft(rows.log_probs, rows.mask)

  def dpo(params, batch):
    both = jnp.split(answers(params, batch).total, 2)
    return bj.losses.dpo(*both, *batch['rows']['reference'])

  rows = {name: rows[name] for name in names}
  if 'dpo' in names:
    fixed = jax.jit(lambda p, b: jnp.split(answers(p, b).total, 2))(
      trained, {'frozen': frozen, 'rows': rows['dpo']}
    )
    rows['dpo']['reference'] = np.stack(jax.device_get(fixed))
  batch = {'frozen': frozen, 'rows': jax.tree.map(jnp.asarray, rows)}
  return Case(config, trained, batch, {'sft': sft, 'dpo': dpo})


def program(case: Case, oracle: Any) -> measure.Program:
  """Compiles a step of an oracle with Adam, on the rows of both objectives."""
  solver = optax.chain(oracle, optax.adam(RATE, b1=0.9, b2=0.95))

  batch = {
    name: {'frozen': case.batch['frozen'], 'rows': rows}
    for name, rows in case.batch['rows'].items()
  }
  return measure.solver_program(solver, case.params, batch)


def objective(case: Case, name: str) -> Any:
  """Returns the gradient of an objective."""
  loss = case.losses[name]
  return bj.gradient(lambda params, batch: loss(params, batch[name]), name=name)


def oracles(case: Case) -> dict[str, Any]:
  """Returns the oracles by name."""
  single = {name: objective(case, name) for name in NAMES}
  losses = [case.losses[name] for name in NAMES]
  start = lambda params, batch: [
    case.losses[name](
      params, {'frozen': batch['frozen'], 'rows': batch['rows'][name]}
    )
    for name in NAMES
  ]
  first = jax.jit(start)(case.params, case.batch)
  # The same gap for both objectives, so that both are selected.
  optima = [float(loss) - 0.5 for loss in first]
  shares = [0.5, 0.5]
  maxright = lambda every: bj.solvers.maxright(
    losses, NAMES, weights=shares, optima=optima, refresh_every=every
  )
  return {
    **single,
    'alright': bj.solvers.alright(
      losses, NAMES, weights=shares, key=0, even=True
    ),
    'maxright': maxright(None),
    'maxright_refreshed': maxright(REFRESH),
    'mix': bj.evaluation.mixed(
      {n: bj.gradient(f, name=n) for n, f in case.losses.items()}, shares
    ),
  }


class Chosen:
  """Repeats the selected steps by programs of single objectives."""

  def __init__(
    self, selecting: measure.Program, single: dict[str, measure.Program]
  ) -> None:
    """Takes the selecting program, and the programs of the objectives."""
    self._selecting, self._single = selecting, single
    self._before = {name: 0 for name in NAMES}
    self._last = dict.fromkeys(NAMES, 1)
    self.rounds: list[dict[str, int]] = []

  def select(self, steps: int) -> None:
    """Runs the selecting program, and counts its selections."""
    self._selecting.run(steps)
    counts = bj.counts(self._selecting.carry[1])
    now = {name: int(counts[f'gradients/{name}']) for name in NAMES}
    self._last = {name: now[name] - self._before[name] for name in NAMES}
    self._before = now

  def same(self, steps: int) -> None:
    """Runs the same number of steps of each objective."""
    del steps
    for name, count in self._last.items():
      if count:
        self._single[name].run(count)
    self.rounds.append(self._last)


def model_flops(sizes: Sizes) -> float:
  """Returns the operations that the products of an SFT step need."""
  config = sizes.config
  tokens = sizes.rows * sizes.length
  head = 2 * config.width * config.vocabulary
  body = config.flops_per_token - head
  attention = 4 * sizes.length * config.heads * config.head_width
  attention *= config.layers
  # Backward: one more product for the inputs; the weights are frozen.
  products = tokens * body + sizes.rows * sizes.answer * head
  return float(2 * products + 3 * tokens * attention)


def serve(name: str, sizes: Sequence[Any]) -> measure.Run:
  """Makes a step for `environment.own_process`."""
  case = make_case(Sizes(*sizes), (name,))
  return program(case, objective(case, name)).run


def _peft(name, sizes, context):
  """Compares a step with PyTorch's, both in separate processes."""
  context.peers.require('torch', 'transformers', 'peft')
  names = ('rows', 'length', 'answer', 'rank')
  arguments = {name: getattr(sizes, name) for name in names}
  model = {'num_hidden_layers': sizes.layers, 'tie_word_embeddings': True}
  arguments['sizes'] = sizes.model | model
  own = {'name': name, 'sizes': list(sizes)}
  with (
    environment.own_process(__name__, 'serve', **own) as measured,
    context.peers.process('torch_steps', name, **arguments) as peer,
  ):
    numbers = measure.compare(measured.run, peer.run, context)
    return numbers | {'memory': measured.memory() / peer.memory()}


def _selecting(name, sizes, context):
  """Compares a selecting step with steps on single objectives."""
  case = make_case(sizes)
  every = oracles(case)
  programs = {n: program(case, every[n]) for n in (*NAMES, name)}
  chosen = Chosen(programs[name], {n: programs[n] for n in NAMES})
  numbers = measure.compare(
    chosen.select, chosen.same, context, **context.few() | {'steps': STEPS}
  )
  costlier = lambda what: max(getattr(programs[n], what) for n in NAMES)
  taken = chosen.rounds[1:]  # The first one warms up.
  return numbers | {
    'flops': programs[name].flops / costlier('flops'),
    'temporary': programs[name].temporary / costlier('temporary'),
    'share': sum(one['dpo'] for one in taken) / (len(taken) * STEPS),
  }


def _mix(sizes, context):
  case = make_case(sizes)
  every = oracles(case)
  pair = (program(case, every[name]) for name in ('mix', 'alright'))
  return measure.compare(*pair, context, **context.few())


def _product(sizes, size, context):
  """Compares a step with a matrix product of as many operations."""
  case = make_case(sizes, ('sft',))
  measured = program(case, objective(case, 'sft'))
  return measure.compare_to_product(measured, model_flops(sizes), size, context)


def rows(preset: str) -> Sequence[measure.Row]:
  """Returns the comparisons."""
  small = preset == 'smoke'
  sizes = {'smoke': SMALL, 'quick': Sizes(layers=6), 'paper': Sizes(layers=30)}[
    preset
  ]
  fewer = sizes if small else sizes._replace(layers=min(sizes.layers, 2))
  every = measure.Rows()
  of = f'{sizes.layers} layers, {sizes.rows} rows of {sizes.length} tokens'

  for name in NAMES:
    every.add(
      f'lm/peft/{name}',
      f'{name.upper()}, {of} / PyTorch with peft',
      *(_peft, name, sizes),
      wall=BOUND_PEER,
      memory=BOUND_PEER_MEMORY,
    )
  titles = {
    'alright': 'ALRIGHT',
    'maxright': 'MAXRIGHT, without refresh',
    'maxright_refreshed': f'MAXRIGHT, refreshed every {REFRESH} steps',
  }
  for name, bound in BOUNDS.items():
    bounds = {'flops': BOUND_FLOPS, 'temporary': BOUND_MEMORY}
    bounds = {'cpu': bound} | (bounds if name == 'alright' else {})
    what = f'{titles[name]} / the selected steps'
    every.add(f'lm/select/{name}', what, _selecting, name, fewer, **bounds)
  what = 'Mix, both objectives a step / ALRIGHT'
  every.add('lm/select/mix', what, _mix, fewer)
  what = f'SFT, {of} / a product with as many operations'
  every.add('lm/product', what, _product, sizes, 128 if small else 1_024)
  return every
