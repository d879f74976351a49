"""Steps on several objectives.

The objectives share a perceptron 784-512-512; each of them has a head 512-10
and its own labels. Batches have 256 samples, all sides use plain SGD, carries
are donated. Data are random: the cost does not depend on the values.
Comparisons:

- a step with each aggregator / TorchJD's of the same name;
- MoCo, or MGDA on the Gram matrix, or MoCo with all losses on one output / one
  backward pass of the summed loss;
- the stacked gradients / M separate compiled backward passes;
- temporary memory of the fused MoCo step / a step that makes all rows at once;
- growth with the number of objectives.

TorchJD aggregates one Jacobian, so it has no counterpart of MoCo, MoDo and
SDMGrad (more samples or tracked gradients), SMG, STCH, uncertainty weighting
and the dynamic barrier.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import bilevel_jax as bj
from experiments.benchmarks import measure

INPUTS, CLASSES, RATE = 784, 10, 1e-3
BOUND_PEER, BOUND_STACKING, BOUND_MEMORY, BOUND_GROWTH = 0.7, 0.9, 0.5, 1.1
MOCO = {'tracking': 0.1, 'weight_step': 0.1}
# TorchJD's class and its options by name; None stands for M.
PEERS: dict[str, tuple[str, dict[str, Any]]] = {
  'mean': ('Mean', {}),
  'weighted': ('Constant', {}),
  'mgda': ('MGDA', {}),
  'upgrad': ('UPGrad', {}),
  'dual_proj': ('DualProj', {}),
  'pcgrad': ('PCGrad', {}),
  'grad_vac': ('GradVac', {}),
  'grad_drop': ('GradDrop', {}),
  'imtl_g': ('IMTLG', {}),
  'aligned_mtl': ('AlignedMTL', {}),
  'cagrad': ('CAGrad', {'c': 0.4}),
  'nash_mtl': ('NashMTL', {'n_tasks': None}),
  'fair_grad': ('FairGrad', {'alpha': 2.0}),
  'config': ('ConFIG', {}),
}


class Sizes(NamedTuple):
  """Sizes of the problem."""

  hidden: int = 512  # Units of each of the two shared layers.
  batch: int = 256


def bound_step(objectives: int) -> float:
  """Returns the maximum cost of a step in passes of the summed loss."""
  return 0.75 * objectives + 0.5


class Case(NamedTuple):
  """Random data and parameters."""

  params: Any
  batch: Any
  trunk: Callable[[Any, Any], Any]
  heads: tuple[Callable[[Any, Any, Any], Any], ...]


def make_case(objectives: int, sizes: Sizes) -> Case:
  """Draws data and parameters."""
  keys = jax.random.split(jax.random.key(0), 5)
  hidden = sizes.hidden
  normal = lambda key, *shape: jax.random.normal(key, shape) / shape[0] ** 0.5
  params = bj.sequences(
    trunk=(normal(keys[0], INPUTS, hidden), normal(keys[1], hidden, hidden)),
    heads=tuple(
      normal(key, hidden, CLASSES)
      for key in jax.random.split(keys[2], objectives)
    ),
  )
  images = jax.random.normal(keys[3], (sizes.batch, INPUTS))
  labels = jax.random.randint(keys[4], (sizes.batch, objectives), 0, CLASSES)

  def trunk(params, batch):
    first, second = params.trunk
    return jax.nn.relu(jax.nn.relu(batch[0] @ first) @ second)

  def head(index):
    def loss(params, features, batch):
      return optax.losses.softmax_cross_entropy_with_integer_labels(
        features @ params.heads[index], batch[1][:, index]
      ).mean()

    return loss

  heads = tuple(head(i) for i in range(objectives))
  return Case(params, (images, labels), trunk, heads)


def descend(params: Any, gradients: Any) -> Any:
  """Takes a step of plain SGD."""
  return jax.tree.map(lambda p, g: p - RATE * g, params, gradients)


def summed_loss(case: Case) -> measure.Program:
  """Compiles a step of SGD on the sum of all losses."""

  def loss(params, batch):
    features = case.trunk(params, batch)
    return sum(head(params, features, batch) for head in case.heads)

  def step(params, batch):
    return descend(params, jax.grad(loss)(params, batch))

  return measure.Program(step, case.params, case.batch)


def with_sgd(case: Case, solver: Any) -> measure.Program:
  """Compiles a step of a solver with SGD."""
  chained = optax.chain(solver, optax.sgd(RATE))
  return measure.solver_program(chained, case.params, case.batch)


def stacking(case: Case) -> measure.Program:
  """Compiles the gradients of all objectives, stored in the carry."""
  oracle = bj.multi_objective(case.heads, trunk=case.trunk, rest=('heads',))
  state = oracle.init(case.params)

  def step(carry, batch):
    params, _ = carry
    jacobian, _ = oracle.update(batch, state, params)
    return params, (jacobian.rows.trunk, jacobian.rest['heads'])

  _, first = jax.eval_shape(step, (case.params, None), case.batch)
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), first)
  return measure.Program(step, (case.params, zeros), case.batch)


def separate(case: Case) -> Callable[[int], None]:
  """Runs M compiled backward passes one at a time, and stores the gradients."""
  programs = []
  for i, head in enumerate(case.heads):

    def loss(own, params, batch, head=head, i=i):
      trunk, own_head = own
      heads = tuple(
        own_head if i == j else other for j, other in enumerate(params.heads)
      )
      params = params._replace(trunk=trunk, heads=heads)
      return head(params, case.trunk(params, batch), batch)

    def step(carry, batch, loss=loss, i=i):
      params, _ = carry
      own = (params.trunk, params.heads[i])
      return params, jax.grad(loss)(own, params, batch)

    zeros = jax.tree.map(
      jnp.zeros_like, (case.params.trunk, case.params.heads[i])
    )
    programs.append(measure.Program(step, (case.params, zeros), case.batch))

  def run(steps):
    for _ in range(steps):
      for program in programs:
        program.run(1)

  return run


def on_output(objectives: int, sizes: Sizes) -> tuple[Any, Any]:
  """Compiles MoCo, and the summed loss, for M losses on one output."""
  case = make_case(objectives, sizes)
  params = bj.sequences(trunk=case.params.trunk, heads=case.params.heads[:1])
  network = lambda p, b: (
    jax.nn.relu(jax.nn.relu(b[0] @ p.trunk[0]) @ p.trunk[1]) @ p.heads[0]
  )

  def one(i):
    def loss(_, out, batch):
      return optax.losses.softmax_cross_entropy_with_integer_labels(
        out, batch[1][:, i]
      ).mean()

    return loss

  losses = tuple(one(i) for i in range(objectives))
  case = Case(params, case.batch, network, losses)
  fused = bj.oracles.fused_moco(losses, trunk=network, **MOCO)
  return with_sgd(case, fused), summed_loss(case)


def aggregated(case: Case, name: str) -> measure.Program:
  """Compiles a step with an aggregator of the library."""
  objectives = len(case.heads)
  oracle = bj.multi_objective(case.heads, trunk=case.trunk, rest=('heads',))
  make = getattr(bj.aggregators, name)
  if name == 'weighted':
    aggregator = make([1 / objectives] * objectives)
  elif name in ('pcgrad', 'grad_vac', 'grad_drop'):
    aggregator = make(objectives, key=0)
  else:
    aggregator = make(objectives)
  return with_sgd(case, optax.chain(oracle, aggregator))


def fused_moco(case: Case) -> measure.Program:
  """Compiles a step with MoCo that never stores all rows."""
  return with_sgd(
    case,
    bj.oracles.fused_moco(
      case.heads, trunk=case.trunk, rest=('heads',), **MOCO
    ),
  )


def gramian_mgda(case: Case) -> measure.Program:
  """Compiles a step with MGDA on the Gram matrix only."""
  arguments = {'trunk': case.trunk, 'rest': ('heads',)}
  oracle = bj.multi_objective(case.heads, **arguments, gramian=True)
  mgda = bj.aggregators.mgda(len(case.heads))
  return with_sgd(case, optax.chain(oracle, mgda))


def moco_at_once(case: Case) -> measure.Program:
  """Compiles a step with MoCo that makes all rows at once."""
  arguments = {'trunk': case.trunk, 'rest': ('heads',)}
  oracle = bj.multi_objective(case.heads, **arguments, by='vmap')
  moco = bj.aggregators.moco(len(case.heads), rest=('heads',), **MOCO)
  return with_sgd(case, optax.chain(oracle, moco))


def _peer(name, objectives, sizes, context):
  """Compares a step with an aggregator with TorchJD's."""
  context.peers.require('torch', 'torchjd')
  measured = aggregated(make_case(objectives, sizes), name)
  peer, options = PEERS[name]
  options = {k: objectives if v is None else v for k, v in options.items()}
  arguments = {'name': peer, 'objectives': objectives, 'options': options}
  arguments |= sizes._asdict()
  with context.peers.process('torch_steps', 'aggregator', **arguments) as step:
    return measure.compare(measured, step.run, context)


def _summed(make, objectives, sizes, context):
  case = make_case(objectives, sizes)
  return measure.compare(make(case), summed_loss(case), context)


def _on_output(objectives, sizes, context):
  return measure.compare(*on_output(objectives, sizes), context)


def _stacking(objectives, sizes, context):
  case = make_case(objectives, sizes)
  return measure.compare(stacking(case).run, separate(case), context)


def _memory(make, objectives, sizes, context):
  case = make_case(objectives, sizes)
  measured, base = make(case), moco_at_once(case)
  return {'temporary': measured.temporary / base.temporary}


def _growth(counts, sizes, context):
  make = lambda objectives: fused_moco(make_case(objectives, sizes))
  return measure.growth(make, counts, 3 * context.rounds)


def rows(preset: str) -> Sequence[measure.Row]:
  """Returns the comparisons."""
  small = preset == 'smoke'
  sizes = Sizes(16, 16) if small else Sizes()
  counts = (2,) if small else (2, 5, 10)
  every = measure.Rows()

  for name, (peer, _) in PEERS.items():
    for count in counts:
      every.add(
        f'aggregators/torchjd/{name}/{count}',
        f'{name}, {count} objectives / TorchJD {peer}',
        *(_peer, name, count, sizes),
        wall=BOUND_PEER,
      )
  for count in counts:
    of = f'{count} objectives'
    what = f'MoCo, {of} / summed loss'
    arguments = (_summed, fused_moco, count, sizes)
    bound = bound_step(count)
    every.add(f'moco/summed/{count}', what, *arguments, wall=bound)
    what = f'gradients stacked, {of} / one by one'
    arguments = (_stacking, count, sizes)
    every.add(f'moco/stacked/{count}', what, *arguments, wall=BOUND_STACKING)
    what = f'Gram matrix only with MGDA, {of} / summed loss'
    every.add(
      f'moco/gramian/{count}', what, _summed, gramian_mgda, count, sizes
    )
    what = f'MoCo on one output, {of} / summed loss'
    every.add(f'moco/on_output/{count}', what, _on_output, count, sizes)
  of = f'{counts[-1]} objectives'
  for name, make in (('fused', fused_moco), ('gramian', gramian_mgda)):
    bounds = {'temporary': BOUND_MEMORY} if name == 'fused' else {}
    what = f'memory of MoCo fused, {of} / all rows at once'
    what = (
      what.replace('MoCo fused', 'MGDA, Gram matrix') if not bounds else what
    )
    arguments = (_memory, make, counts[-1], sizes)
    every.add(f'moco/memory/{name}', what, *arguments, **bounds)
  grown = (2, 4) if small else (2, 5, 10, 20)
  what = f'MoCo, objectives {grown[0]} to {grown[-1]}'
  every.add(
    'growth/objectives', what, _growth, grown, sizes, time_exponent=BOUND_GROWTH
  )
  return every
