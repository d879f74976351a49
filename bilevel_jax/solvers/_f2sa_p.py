"""F2SA-p: the hypergradient by finite differences of order p in the penalty."""

import jax
import jax.numpy as jnp
import numpy as np

from bilevel_jax import _checks, descent, oracles, states, types
from bilevel_jax.aggregators import _penalty
from bilevel_jax.oracles import base


def _nodes(order: int) -> tuple[list[int], np.ndarray]:
  """Nodes and weights of a difference quotient that is exact to an order."""
  half = order // 2
  nodes = [j for j in range(-half, half + 1) if j]
  if order % 2:
    nodes = list(range(-half, half + 2))
  powers = np.vander(np.array(nodes, float), increasing=True).T
  right = np.zeros(len(nodes))
  right[1] = 1
  return nodes, np.linalg.solve(powers, right)


def f2sa_p(
  problem: types.BilevelProblem,
  *,
  order: int,
  penalty: types.ScalarOrSchedule,
  upper: types.SequenceLike,
  lower: types.SequenceLike,
) -> descent.Solver:
  r"""F2SA-p: a hypergradient from p lower solutions, with a bias of nu^p.

  With :math:`y_j` a minimiser of :math:`j \nu f(x, \cdot) + g(x, \cdot)` and
  weights for which :math:`\sum_j a_j j^k` is 1 for k = 1 and 0 for all other
  k up to p,

  .. math::
    y_j &\leftarrow y_j - \beta \nabla_y ( j \nu f + g )(x_k, y_j)
      \quad \text{(T times)} \\
    x_{k+1} &= x_k - \alpha \sum_j a_j \left( j \nabla_x f
      + \frac{1}{\nu} \nabla_x g \right)(x_k, y_j), \qquad
    \nu = 1 / \gamma_k

  The nodes are 0 and 1 for p = 1, which is `f2sa`, and -1 and 1 for p = 2; for
  an even p they are symmetric. For smoother losses in y, a smaller penalty is
  enough.

  Args:
    problem: the upper and the lower loss; the lower loss is strongly convex.
    order: p, at least 1.
    penalty: :math:`\gamma_k > 0`, a constant or a schedule; at least twice the
      condition number, so that all :math:`j \nu f + g` are convex. If a
      schedule gives a number that is not positive, updates are NaN.
    upper: how the upper variable moves, an optax optimiser or a `Sequence`.
      The authors normalise its gradient: `optax.chain(
      optax.normalize_by_update_norm(), optax.sgd(...))`.
    lower: how each :math:`y_j` moves, with T `steps`. :math:`y_1` is the lower
      variable of the parameters; the others are in the state.

  Returns:
    A solver for `BilevelParams`; `bj.values` gives `upper` and `lower`.

  Raises:
    ValueError: if the order is below 1 or the penalty is not positive.

  Example:
    >>> import bilevel_jax as bj, optax
    >>> toy = bj.testing.toy_problem()
    >>> solver = bj.solvers.f2sa_p(
    ...   toy.problem, order=2, penalty=10.0, upper=optax.sgd(0.1),
    ...   lower=bj.Sequence(optax.sgd(0.2), steps=5),
    ... )
    >>> params, _ = bj.testing.run(solver, toy.params, 100)
    >>> print(params.upper.round(2))
    [1. 1.]

  References:
    Chen, Li, Chayti and Zhang, `Faster Gradient Methods for Highly-smooth
    Stochastic Bilevel Optimization <https://arxiv.org/abs/2509.02937>`_, 2025.
  """
  _checks.whole_number('f2sa_p', 'terms as `order`', order)
  nodes, shares = _nodes(order)
  names = {
    j: 'lower' if j == 1 else f'node_{j}'.replace('-', 'm') for j in nodes
  }
  at_y = nodes.index(1)  # The lower variable of the parameters.
  above, below = base.checked_losses(problem)
  weight = _penalty.checked_schedule(penalty, positive=True)

  def losses(x, params, batch):
    """Both losses at every node, and their outputs at the lower variable."""
    at = [getattr(params, names[j]) for j in nodes]
    f, one = zip(*(above.full(x, y, batch) for y in at), strict=True)
    g, two = zip(*(below.full(x, y, batch) for y in at), strict=True)
    return jnp.stack(f), jnp.stack(g), {'upper': one[at_y], 'lower': two[at_y]}

  def follow(params, batch, updates):
    nu = 1 / jnp.asarray(weight(updates.count))

    def total(fields):
      f, g, aux = losses(params.upper, params._replace(**fields), batch)
      total = jnp.sum(jnp.array(nodes) * nu.astype(f.dtype) * f + g)
      return total, (f, g, aux)

    fields = {name: getattr(params, name) for name in names.values()}
    slopes, (f, g, aux) = jax.grad(total, has_aux=True)(fields)
    gradients = base.gradients(params, **slopes)
    more = base.requested_outputs(problem, **aux)
    return (f[at_y], g[at_y]), gradients, updates.next(), *more

  def ascend(params, batch, updates):
    nu = 1 / jnp.asarray(weight(updates.count))

    def difference(x):
      f, g, _ = losses(x, params, batch)
      terms = jnp.array(nodes) * f + g / nu.astype(f.dtype)
      return jnp.sum(jnp.asarray(shares, f.dtype) * terms)

    slope = jax.grad(difference)(params.upper)
    return (), base.gradients(params, upper=slope), updates.next()

  cost = {'gradients/upper': len(nodes), 'gradients/lower': len(nodes)}
  low = types.as_sequence(lower, 'lower')
  begin = low._replace(start=low.start or (lambda params: params.lower))
  return descent.descend(
    oracles.oracle(
      follow,
      ('upper', 'lower'),
      states.no_updates,
      counts=cost,
      moves=names.values(),
      needs=('upper', *names.values()),
      outputs=problem.outputs,
      linear=True,
    ),
    oracles.oracle(
      ascend,
      (),
      states.no_updates,
      counts=cost,
      moves=('upper',),
      linear=True,
    ),
    upper=upper,
    **{n: low if n == 'lower' else begin for n in names.values()},
  )
