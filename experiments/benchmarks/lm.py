"""Steps of fine-tuning language models, against peft and against one objective.

Demonstrations (SFT) and preferences (DPO; as many pairs, so twice the rows)
train low-rank adapters of SmolLM2-135M's sizes by one Adam. Weights and tokens
are random: cost does not depend on them.

- Both against PyTorch with transformers and peft, the head on the positions of
  the answers only and the reference's log-probabilities known, on both sides.
  Memory is the peak of a process of each.
- A selecting step (ALRIGHT, MAXRIGHT) against single-objective steps in the
  numbers in which it chose them. MAXRIGHT refreshes its memo once, before all
  that is timed, and by its own steps; and every 10 steps by the losses of both.
  The compiler's operations and temporary memory of ALRIGHT's step against the
  dearer objective's; it counts a scanned layer once, in both, and the dearest
  branch. The weighted sum of both (Mix) against ALRIGHT.
- A step on demonstrations against a plain product with as many operations.
- A step of SEAL (half of the rows to rank, half safe) against fine-tuning on
  all of these rows; and a selector's update among many rows against few.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel_jax as bj
from experiments.benchmarks import environment, measure
from experiments.lm import config as config_lib
from experiments.lm import decoder, log_probs, lora, tuning

NAMES = ('sft', 'dpo')
BOUND_PEER, BOUND_PEER_MEMORY = 0.95, 1.1
BOUNDS = {'alright': 1.05, 'maxright': 1.05, 'maxright_refreshed': 1.12}
BOUND_FLOPS, BOUND_MEMORY = 1.01, 1.05
BOUND_SEAL, BOUND_SEAL_MEMORY, BOUND_SCORES = 1.15, 1.2, 1.5
RATE, REFRESH, STEPS = 1e-3, 10, 10
# Those of SmolLM2-135M, by the names of transformers.
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
    layers: of the model.
    rows: demonstrations, and pairs, in a batch.
    length: tokens of a row.
    answer: tokens of its answer, at the end; the head sees only them.
    rank: of adapters of q and v.
    model: the other sizes of the model, by the names of transformers.
  """

  layers: int = 2
  rows: int = 4
  length: int = 128
  answer: int = 32
  rank: int = 16
  model: Any = SMOLLM2

  @property
  def config(self) -> config_lib.Config:
    """The model."""
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
    config: of the model.
    params: what is trained.
    batch: `frozen` weights, and rows by objective.
    losses: by objective, of (params, {'frozen': ..., 'rows': ...}).
  """

  config: config_lib.Config
  params: Any
  batch: dict[str, Any]
  losses: dict[str, Callable[[Any, Any], jax.Array]]


def make_case(sizes: Sizes, names: Sequence[str] = NAMES) -> Case:
  """Draws weights, and rows for some of the objectives."""
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

  def of(params, batch):
    own = lora.attach(batch['frozen'], params)
    rows = batch['rows']
    return log_probs.of_model(
      config,
      own,
      rows['tokens'],
      rows['mask'],
      longest=sizes.answer,
    )

  def sft(params, batch):
    answers = of(params, batch)
    return bj.losses.sft(answers.log_probs, answers.mask)

  def dpo(params, batch):
    both = jnp.split(of(params, batch).total, 2)
    return bj.losses.dpo(*both, *batch['rows']['reference'])

  rows = {name: rows[name] for name in names}
  if 'dpo' in names:
    fixed = jax.jit(lambda p, b: jnp.split(of(p, b).total, 2))(
      trained, {'frozen': frozen, 'rows': rows['dpo']}
    )
    rows['dpo']['reference'] = np.stack(jax.device_get(fixed))
  batch = {'frozen': frozen, 'rows': jax.tree.map(jnp.asarray, rows)}
  return Case(config, trained, batch, {'sft': sft, 'dpo': dpo})


def program(case: Case, oracle: Any) -> measure.Program:
  """A step of an oracle with Adam; its batch has the rows of both."""
  solver = optax.chain(oracle, optax.adam(RATE, b1=0.9, b2=0.95))

  batch = {
    name: {'frozen': case.batch['frozen'], 'rows': rows}
    for name, rows in case.batch['rows'].items()
  }
  return measure.solver_program(solver, case.params, batch)


def objective(case: Case, name: str) -> Any:
  """The gradient of one objective."""
  loss = case.losses[name]
  return bj.gradient(lambda params, batch: loss(params, batch[name]), name=name)


def oracles(case: Case) -> dict[str, Any]:
  """What each step descends along, by name."""
  alone = {name: objective(case, name) for name in NAMES}
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
  shares = [0.5, 0.5]
  maxright = lambda every: bj.solvers.maxright(
    losses, NAMES, weights=shares, optima=optima, refresh_every=every
  )
  return {
    **alone,
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


def model_flops(sizes: Sizes) -> float:
  """Operations of a step on demonstrations that its products need."""
  config = sizes.config
  tokens = sizes.rows * sizes.length
  head = 2 * config.width * config.vocabulary
  body = config.flops_a_token - head
  attention = 4 * sizes.length * config.heads * config.head_width
  attention *= config.layers
  # Backward once more for the inputs; the weights are frozen.
  products = tokens * body + sizes.rows * sizes.answer * head
  return float(2 * products + 3 * tokens * attention)


def serve(name: str, sizes: Sequence[Any]) -> measure.Run:
  """A step in a process of its own, see `environment.own_process`."""
  case = make_case(Sizes(*sizes), (name,))
  return program(case, objective(case, name)).run


def _peft(name, sizes, context):
  """A step against PyTorch's, each in a process of its own."""
  context.peers.require('torch', 'transformers', 'peft')
  arguments = {
    'rows': sizes.rows,
    'length': sizes.length,
    'answer': sizes.answer,
  }
  arguments |= {
    'rank': sizes.rank,
    'sizes': sizes.model
    | {'num_hidden_layers': sizes.layers, 'tie_word_embeddings': True},
  }
  own = {'name': name, 'sizes': list(sizes)}
  with (
    environment.own_process(__name__, 'serve', **own) as measured,
    context.peers.process('torch_steps', name, **arguments) as peer,
  ):
    numbers = measure.compare(measured.run, peer.run, context)
    return numbers | {'memory': measured.memory() / peer.memory()}


def _selecting(name, sizes, context):
  """A selecting step against single-objective steps."""
  case = make_case(sizes)
  every = oracles(case)
  programs = {n: program(case, every[n]) for n in (*NAMES, name)}
  chosen = Chosen(programs[name], {n: programs[n] for n in NAMES})
  numbers = measure.compare(
    chosen.select, chosen.same, context, **context.few() | {'steps': STEPS}
  )
  dearer = lambda what: max(getattr(programs[n], what) for n in NAMES)
  taken = chosen.rounds[1:]  # Before them, a step to get warm.
  return numbers | {
    'flops': programs[name].flops / dearer('flops'),
    'temporary': programs[name].temporary / dearer('temporary'),
    'share': sum(one['dpo'] for one in taken) / (len(taken) * STEPS),
  }


def _mix(sizes, context):
  case = make_case(sizes)
  every = oracles(case)
  pair = (program(case, every[name]) for name in ('mix', 'alright'))
  return measure.compare(*pair, context, **context.few())


def _product(sizes, size, context):
  """Time beyond that of a plain product with as many operations."""
  case = make_case(sizes, ('sft',))
  measured = program(case, objective(case, 'sft'))
  return measure.beside_product(measured, model_flops(sizes), size, context)


def seal_programs(sizes: Sizes, few: int = 1_000) -> dict[str, measure.Program]:
  """A step of fine-tuning and of both forms of SEAL, on the same rows."""
  how = tuning.Tuning(sizes.config, rank=sizes.rank)
  weights = decoder.init(sizes.config, 0)
  shape = sizes.rows, sizes.length
  vocabulary = sizes.config.vocabulary
  tokens = np.random.default_rng(0).integers(vocabulary, size=shape)
  mask = np.tile(
    np.arange(sizes.length) >= sizes.length - sizes.answer, (shape[0], 1)
  )
  every = {
    'tokens': jnp.asarray(tokens, jnp.int32),
    'mask': jnp.asarray(mask, jnp.int32),
  }
  half = sizes.rows // 2

  def losses(trained, rows, frozen):
    return -how.answers(trained, frozen, rows, longest=sizes.answer).mean

  parts = [
    {n: leaf[at] for n, leaf in every.items()}
    for at in (slice(None, half), slice(half, None))
  ]
  batch = {
    'rows': parts[0],
    'safe': parts[1],
    'all': every,
    'index': jnp.arange(half),
    'frozen': weights,
  }
  plain = lambda y, b: jnp.mean(losses(y, b['all'], b['frozen']))

  def seal(full):
    return bj.solvers.seal(
      lambda y, b: jnp.mean(losses(y, b['safe'], b['frozen'])),
      lambda y, b: losses(y, b['rows'], b['frozen']),
      scores=bj.solvers.RowScores(optax.sgd(0.1), few, lambda b: b['index']),
      penalty=1.0,
      lower=optax.adam(RATE),
      value=optax.adam(RATE) if full else None,
    )

  start = how.init(weights, jax.random.key(0))
  programs = {
    'sft': optax.chain(bj.gradient(plain), optax.adam(RATE)),
    'seal': seal(False),
    'seal_full': seal(True),
  }
  return {
    n: measure.solver_program(s, start, batch) for n, s in programs.items()
  }


def selector(rows: int, size: int, *, dense: bool) -> measure.Program:
  """A step of scores alone: the model is one number."""
  if dense:
    loss = lambda scores, b: jnp.mean(rows * jax.nn.softmax(scores)[b] * 1.5)
    solver = optax.chain(bj.gradient(loss), optax.adam(RATE))
    start = jnp.zeros(rows)
  else:
    solver = bj.solvers.seal(
      lambda y, b: y**2,
      lambda y, b: 1.5 + 0.0 * b + y,
      scores=bj.solvers.RowScores(optax.sgd(RATE), rows, lambda b: b),
      penalty=1.0,
      lower=optax.sgd(RATE),
    )
    start = jnp.float32(0.0)
  at = jnp.asarray(np.random.default_rng(0).permutation(rows)[:size])
  return measure.solver_program(solver, start, at)


def _seal(name, sizes, context):
  programs = seal_programs(sizes)
  return measure.compare(programs[name], programs['sft'], context)


def _scores(counts, dense, context):
  few, many = (selector(n, 64, dense=dense) for n in counts)
  return measure.compare(many, few, context)


def rows(preset: str) -> Sequence[measure.Row]:
  """The comparisons."""
  small = preset == 'smoke'
  sizes = {'smoke': SMALL, 'quick': Sizes(layers=6), 'paper': Sizes(layers=30)}[
    preset
  ]
  fewer = sizes if small else sizes._replace(layers=min(sizes.layers, 2))
  partial, comparisons = functools.partial, []
  of = f'{sizes.layers} layers, {sizes.rows} rows of {sizes.length} tokens'

  def add(name, compared, make, *arguments, **bounds):
    comparisons.append(
      measure.Row(name, compared, partial(make, *arguments), bounds)
    )

  for name in NAMES:
    add(
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
    what = f'{titles[name]} / what it chose'
    add(f'lm/select/{name}', what, _selecting, name, fewer, **bounds)
  what = 'Mix, both objectives a step / ALRIGHT'
  add('lm/select/mix', what, _mix, fewer)
  what = f'SFT, {of} / a product with as many operations'
  add('lm/product', what, _product, sizes, 128 if small else 1_024)
  of_seal = (
    sizes
    if small
    else fewer._replace(
      rows=8, model=TINY | {'hidden_size': 128, 'vocab_size': 2_048}
    )
  )
  for name, bounds in (
    ('seal', {'wall': BOUND_SEAL, 'memory': BOUND_SEAL_MEMORY}),
    ('seal_full', {}),
  ):
    what = f'{name.replace("_", ", ")} / fine-tuning on the same rows'
    add(f'seal/step/{name}', what, _seal, name, of_seal, **bounds)
  counts = (100, 1_000) if small else (1_000, 1_000_000)
  for name, dense in (('tree', False), ('dense', True)):
    what = f'scores of {counts[1]:,} rows, {name} / {counts[0]:,} rows'
    bounds = {} if dense else {'wall': BOUND_SCORES}
    add(f'growth/rows/{name}', what, _scores, counts, dense, **bounds)
  return comparisons
