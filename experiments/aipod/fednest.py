"""FedNest, the baseline, and its variants with fewer rounds.

FedNest corrects local steps by a common gradient. Local SGD leaves out these
corrections, and LFedNest also the rounds of the linear system.

Tarzanagh, Li, Thrampoulidis and Oymak, `FedNest: Federated Bilevel, Minimax,
and Compositional Optimization <https://arxiv.org/abs/2205.02215>`_, 2022.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

import bilevel_jax as bj


class Loops(NamedTuple):
  """Numbers of steps per update.

  Attributes:
    lower_rounds: lower rounds T.
    local_steps: local lower steps tau per round.
    upper_steps: local upper steps.
  """

  lower_rounds: int
  local_steps: int
  upper_steps: int


Variant = Literal['fednest', 'local_sgd', 'lfednest']


def count_rounds(
  loops: Loops, variant: Variant = 'fednest', count_redundant: bool = True
) -> tuple[int, int]:
  """Counts the rounds of one update, without those of the linear system.

  Args:
    loops: numbers of steps.
    variant: see `fednest`.
    count_redundant: see `fednest`.

  Returns:
    Rounds of the lower and of the upper variable.
  """
  corrected = variant == 'fednest'
  means = lambda steps: 1 + (corrected and (count_redundant or steps > 1))
  lower = loops.lower_rounds * means(loops.local_steps)
  return lower, means(loops.upper_steps)


class FedNestState(NamedTuple):
  """State of `fednest`.

  Attributes:
    linear: state of the oracle for the linear system, with its rounds.
    counts: rounds of the lower and the upper variable; int32 scalars.
  """

  linear: Any
  counts: dict[str, chex.Array]


def fednest(
  problem: bj.BilevelProblem,
  axis_name: Any,
  *,
  upper_rate: float,
  lower_rate: float,
  loops: Loops,
  solve: bj.linear_solvers.LinearSolver,
  batch_at: Callable[[Any, Any], Any] | None,
  variant: Variant = 'fednest',
  count_redundant: bool = True,
) -> optax.GradientTransformationExtraArgs:
  r"""FedNest for one client; takes 2 T + N' + 3 rounds per update.

  Each of T lower rounds averages the gradient q of the lower losses, takes the
  local steps :math:`y_m \leftarrow y_m - \beta (\nabla g_m(y_m) - \nabla g_m(y)
  + q)` and averages their results. Then come the linear system, in N' + 1
  rounds, a common hypergradient, local upper steps of the same form, and their
  mean.

  Args:
    problem: losses of one client.
    axis_name: axis of clients.
    upper_rate: step size of local upper steps.
    lower_rate: step size of local lower steps.
    loops: numbers of steps.
    solve: linear solver.
    batch_at: maps (batch, t) to the batch of evaluation t; None for the same
      batch in all evaluations, which halves the gradients.
    variant: `fednest`; `local_sgd` takes local steps without corrections, with
      T + N' + 2 rounds per update; `lfednest` also solves a linear system per
      client, with T + 1 rounds.
    count_redundant: whether to count means of vectors that are equal at all
      clients, which occur where FedNest takes a single local step.

  Returns:
    A solver for `BilevelParams` of one client, mapped with an axis name.
  """
  lower_rounds, local_steps, upper_steps = loops
  corrected = variant == 'fednest'
  lower_count, upper_count = count_rounds(loops, variant, count_redundant)
  mean = lambda tree: jax.lax.pmean(tree, axis_name)
  linear = bj.implicit(
    problem,
    # Each client multiplies the stored solution by its own cross term.
    solve=bj.linear_solvers.LinearSystem(solve, warm_start=True),
    lower_set=(
      None if variant == 'lfednest' else bj.projections.consensus_set(axis_name)
    ),
    direct=False,
  )

  def loss(fn):
    def scalar(*args):
      value = fn(*args)
      return value[0] if isinstance(value, tuple) else value

    return scalar

  select = batch_at or (lambda batch, t: batch)
  upper, lower = loss(problem.upper), loss(problem.lower)

  def local(slope, start, common, rate, first, steps):
    """Local steps along slope(z) - slope(start) + common, then their mean."""
    # With one batch, the gradient at the start is the same in all steps.
    fixed = slope(start, 0) if batch_at is None else None

    def step(z, t):
      here = slope(z, first + t)
      if not corrected:
        return jax.tree.map(lambda z, a: z - rate * a, z, here), None
      there = slope(start, first + t) if fixed is None else fixed
      move = jax.tree.map(
        lambda z, a, b, c: z - rate * (a - b + c), z, here, there, common
      )
      return move, None

    z, _ = jax.lax.scan(step, start, jnp.arange(steps))
    return mean(z)

  def init_fn(params):
    zero = lambda: jnp.zeros([], jnp.int32)
    counts = {'rounds/lower': zero(), 'rounds/upper': zero()}
    return FedNestState(linear.init(params), counts)

  def update_fn(batch, state, params=None, **extra_args):
    del extra_args
    x, y = params

    def lower_slope(y, t):
      return jax.grad(lower, 1)(x, y, select(batch, t))

    def inner(y, i):
      common = mean(jax.grad(lower, 1)(x, y, batch))
      first = i * local_steps
      return local(lower_slope, y, common, lower_rate, first, local_steps), None

    y, _ = jax.lax.scan(inner, y, jnp.arange(lower_rounds))
    # A cold start, as in E-AiPOD.
    cold = state.linear._replace(inner=state.linear.inner._replace(linear=None))
    _, linear_state = linear.update(batch, cold, params._replace(lower=y))
    q = linear_state.inner.linear

    def upper_slope(x, t):
      now = batch if t is None else select(batch, t)

      def total(x):
        slope = jax.grad(lower, 1)(x, y, now)
        return upper(x, y, now) - optax.tree.vdot(slope, q)

      return jax.grad(total)(x)

    common = mean(upper_slope(x, None))
    x = local(upper_slope, x, common, upper_rate, 0, upper_steps)
    counts = {
      'rounds/lower': state.counts['rounds/lower'] + lower_count,
      'rounds/upper': state.counts['rounds/upper'] + upper_count,
    }
    after = bj.BilevelParams(x, y)
    return optax.tree.sub(after, params), FedNestState(linear_state, counts)

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)
