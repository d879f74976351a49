"""What a multi-objective step costs beside a step on the summed loss.

    python -m experiments.benchmarks.multi_objective --rounds=15

Expected: MoCo 1.7 backward passes for two objectives, 5 for ten. Time: some
minutes on 2 cores.

A perceptron 784-512-512 is shared, each of M objectives has a head 512-10 and
labels of its own; batches of 256, plain SGD on both sides, all carries donated.
Data are random: cost does not depend on the values.

1. Gradients of all objectives in the trunk, of each in its head, and MoCo,
   against one backward pass of the summed loss. Bound: 0.75 M + 0.5.
2. The stacked gradients alone, against M separate compiled backward passes.
   Bound: 0.9.
3. Temporary memory of the fused MoCo step at the largest M, against that of the
   step that makes all rows at once. Bound: 0.5.
4. Without a bound: Gram matrix only with MGDA; MoCo on one net with M losses
   on its output, both against one backward pass of the sum.

Times are medians of paired ratios with their range; compare CPU ratios where
the range is wide.
"""

import dataclasses
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import bilevel_jax as bj
from experiments import harness
from experiments.benchmarks import measure

INPUTS, CLASSES, RATE = 784, 10, 1e-3
BOUND_STACKING = 0.9
BOUND_MEMORY = 0.5


@dataclasses.dataclass(frozen=True)
class Settings:
  """Settings of a run.

  Attributes:
    objectives: numbers M of objectives.
    hidden: units of each of the two shared layers.
    batch: examples.
    rounds: pairs of timings of each comparison.
  """

  objectives: tuple[int, ...] = (2, 5, 10)
  hidden: int = 512
  batch: int = 256
  rounds: int = 15


PRESETS = {'paper': Settings()}


def bound_step(objectives: int) -> float:
  """How many passes of the summed loss a step may cost."""
  return 0.75 * objectives + 0.5


class Case(NamedTuple):
  """Random data and parameters of one M."""

  params: Any
  batch: Any
  trunk: Callable[[Any, Any], Any]
  heads: tuple[Callable[[Any, Any, Any], Any], ...]


def make_case(objectives: int, settings: Settings) -> Case:
  """Draws everything."""
  keys = jax.random.split(jax.random.key(0), 5)
  hidden = settings.hidden
  normal = lambda key, *shape: jax.random.normal(key, shape) / shape[0] ** 0.5
  params = bj.sequences(
    trunk=(normal(keys[0], INPUTS, hidden), normal(keys[1], hidden, hidden)),
    heads=tuple(
      normal(key, hidden, CLASSES)
      for key in jax.random.split(keys[2], objectives)
    ),
  )
  images = jax.random.normal(keys[3], (settings.batch, INPUTS))
  labels = jax.random.randint(keys[4], (settings.batch, objectives), 0, CLASSES)

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
  """A step of plain SGD."""
  return jax.tree.map(lambda p, g: p - RATE * g, params, gradients)


def summed_loss(case: Case) -> measure.Program:
  """One backward pass of the sum of all losses, and SGD."""

  def loss(params, batch):
    features = case.trunk(params, batch)
    return sum(head(params, features, batch) for head in case.heads)

  def step(params, batch):
    return descend(params, jax.grad(loss)(params, batch))

  return measure.Program(step, case.params, case.batch)


def solver_step(case: Case, solver: Any) -> measure.Program:
  """A step of a solver with SGD."""

  def step(carry, batch):
    params, state = carry
    gradients, state = solver.update(batch, state, params)
    return descend(params, gradients), state

  carry = (case.params, solver.init(case.params))
  return measure.Program(step, carry, case.batch)


def stacking(case: Case) -> measure.Program:
  """The gradients of all objectives, kept."""
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
  """M compiled backward passes, one after another, each gradient kept."""
  programs = []
  for i, head in enumerate(case.heads):

    def loss(own, params, batch, head=head, i=i):
      trunk, mine = own
      heads = tuple(
        mine if i == j else other for j, other in enumerate(params.heads)
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


def temporary_bytes(solver: Any, case: Case) -> int:
  """The peak of the buffers that a donated step adds to its arguments."""

  def step(params, state, batch):
    gradients, state = solver.update(batch, state, params)
    return descend(params, gradients), state

  lowered = jax.jit(step, donate_argnums=(0, 1)).lower(
    case.params, solver.init(case.params), case.batch
  )
  return lowered.compile().memory_analysis().temp_size_in_bytes


def on_output(objectives: int, settings: Settings) -> tuple[Any, Any]:
  """One network with M losses on its output: (solver step, summed step)."""
  case = make_case(objectives, settings)
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
  fused = bj.oracles.fused_moco(
    losses, trunk=network, tracking=0.1, weight_step=0.1
  )
  return solver_step(case, fused), summed_loss(case)


def main(options: harness.Options) -> None:
  """Measures, and writes the table and the results."""
  start = time.monotonic()
  settings = options.settings
  metrics, rows = {}, []

  def add(count, what, name, ratio, bound=None):
    metrics[f'{name}/{count}'] = ratio.wall
    metrics[f'{name}/{count}/cpu'] = ratio.cpu
    rows.append(
      {
        'M': count,
        'what': what,
        'time': str(ratio),
        'CPU time': ratio.cpu,
        'bound': '' if bound is None else f'{bound:.2f}',
        'ms': 1e3 * ratio.seconds,
        'base ms': 1e3 * ratio.base_seconds,
      }
    )

  for count in settings.objectives:
    case = make_case(count, settings)
    base = summed_loss(case)
    given = {'trunk': case.trunk, 'rest': ('heads',)}
    moco = {'tracking': 0.1, 'weight_step': 0.1, 'rest': ('heads',)}
    fused = bj.oracles.fused_moco(case.heads, trunk=case.trunk, **moco)
    ratio = lambda a, b: measure.time_ratio(a, b, rounds=settings.rounds)
    step = solver_step(case, fused)
    found = ratio(step.run, base.run)
    add(count, 'MoCo / summed loss', 'moco', found, bound_step(count))
    found = ratio(stacking(case).run, separate(case))
    add(count, 'stacked / separate', 'stacking', found, BOUND_STACKING)
    lean = optax.chain(
      bj.multi_objective(case.heads, **given, gramian=True),
      bj.aggregators.mgda(count),
    )
    found = ratio(solver_step(case, lean).run, base.run)
    add(count, 'Gram matrix only, MGDA / summed loss', 'gramian', found)
    ours, theirs = on_output(count, settings)
    found = ratio(ours.run, theirs.run)
    add(count, 'MoCo on one output / summed loss', 'on_output', found)
  largest = max(settings.objectives)
  case = make_case(largest, settings)
  moco = {'tracking': 0.1, 'weight_step': 0.1, 'rest': ('heads',)}
  given = {'trunk': case.trunk, 'rest': ('heads',)}
  fused = bj.oracles.fused_moco(case.heads, trunk=case.trunk, **moco)
  at_once = optax.chain(
    bj.multi_objective(case.heads, **given, by='vmap'),
    bj.aggregators.moco(largest, **moco),
  )
  lean = optax.chain(
    bj.multi_objective(case.heads, **given, gramian=True),
    bj.aggregators.mgda(largest),
  )
  sizes = {
    'fused': temporary_bytes(fused, case),
    'vmap': temporary_bytes(at_once, case),
    'gramian': temporary_bytes(lean, case),
  }
  for name, size in sizes.items():
    metrics[f'memory/{name}/bytes'] = size
  metrics['memory/ratio'] = sizes['fused'] / sizes['vmap']
  harness.write_table(options.workdir, rows)
  print(
    f'Temporary memory at M = {largest}: '
    + ', '.join(
      f'{name} {size / 2**20:.1f} MiB' for name, size in sizes.items()
    )
    + f'; fused / vmap {metrics["memory/ratio"]:.2f} (bound {BOUND_MEMORY}).'
  )
  path = harness.write_results(
    options, metrics=metrics, seconds=time.monotonic() - start
  )
  print(f'Results: {path}')


STUDY = harness.Study(
  main, PRESETS, paper='benchmarks', binary='multi_objective'
)


if __name__ == '__main__':
  harness.run(STUDY)
