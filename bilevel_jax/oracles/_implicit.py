"""The hypergradient by implicit differentiation, also under constraints."""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import optax

from bilevel_jax import _checks, _keys, _sequences, linear_solvers, types
from bilevel_jax.oracles import base
from bilevel_jax.projections import _affine

# Any function (operator, right, start) -> solution, or a record with one.
Solve = Callable[..., Any] | linear_solvers.LinearSystem


class ImplicitState(NamedTuple):
  """State of `implicit`.

  Attributes:
    linear: the last solution of the linear system and the next start, in
      coordinates along the lower set; None without a warm start.
    key: PRNG key of a random linear solver, or None.
  """

  linear: Any
  key: Any


class ImplicitTerms(NamedTuple):
  """The terms of one hypergradient.

  Attributes:
    value: the upper loss.
    direct: its partial gradient in the upper variable, or None.
    correction: the implicit part of the hypergradient.
    linear: solution of the linear system, in coordinates along the lower set.
    products: Hessian-vector products of the linear solver; None if unknown.
    outputs: auxiliary outputs of the upper loss.
  """

  value: chex.Array
  direct: Any
  correction: Any
  linear: Any
  products: Any
  outputs: Any


def implicit_terms(
  problem: types.BilevelProblem,
  params: Any,
  batch: Any,
  *,
  solve: Solve,
  lower_set: _affine.AffineSet | None = None,
  start: Any = None,
  direct: bool = True,
  mean: base.Mean = base.WHOLE,
) -> ImplicitTerms:
  """Evaluates the terms of a hypergradient; see `implicit` for the formula.

  The upper gradient, each Hessian product and the cross term are means over the
  parts, so that the linear system is that of the mean loss.
  """
  system = linear_solvers.as_system(solve, warm_start=False)
  upper, lower = base.checked_losses(problem)
  x, y = params.upper, params.lower
  above = upper.with_slopes(*((0, 1) if direct else (1,)))
  (value, outputs), slopes = mean.of(
    lambda part, x, y: above(x, y, part), batch, x, y
  )
  above_x, above_y = slopes if direct else (None, slopes[0])

  def slopes_at(now):
    below = lambda part, x, y: jax.grad(lower, (0, 1))(x, y, part)
    return lambda y: mean.of(below, now, x, y)

  # v -> (grad_xy g v, grad_yy g v); the gradient is linearised once.
  _, product = jax.linearize(slopes_at(batch), y)
  if lower_set is None:
    coordinates, lift = (lambda z: z), (lambda u: u)
  else:
    coordinates, lift = lower_set.coordinates, lambda u: lower_set.lift(u, y)

  # In a shard_map, a mean over clients and a start have another type.
  lifted = lambda u: _sequences.vary_like(lift(u), y)
  operator: Callable[[Any], Any] = lambda u: coordinates(product(lifted(u))[1])
  if (draw := system.batch_at) is not None:

    def sampled(u, t, draw=draw):
      slopes = slopes_at(draw(batch, t))
      return coordinates(jax.jvp(slopes, (y,), (lifted(u),))[1][1])

    operator = linear_solvers.SampledOperator(operator, sampled)

  right = coordinates(above_y)
  if start is not None:
    start = _sequences.vary_like(start, right)
  linear, products = _solved(system, operator, right, start)
  cross, curved = product(lifted(linear))
  correction = optax.tree.scale(-1, cross)
  coupling = None if lower_set is None else lower_set.coupling
  if lower_set is not None and coupling is not None:
    if lower_set.transpose is None:
      raise ValueError('a coupled lower set needs its `transpose`.')
    # The lower variable also moves with its set.
    pull = lower_set.transpose(optax.tree.sub(curved, above_y))
    measured, back = jax.vjp(coupling, x)
    pull = jax.tree.map(lambda a, h: a.astype(h.dtype), pull, measured)
    correction = optax.tree.add(correction, back(pull)[0])
  return ImplicitTerms(value, above_x, correction, linear, products, outputs)


@_checks.system_in_solve
def implicit(
  problem: types.BilevelProblem,
  *,
  solve: Solve | None = None,
  lower_set: _affine.AffineSet | None = None,
  direct: bool = True,
) -> base.Oracle:
  r"""The hypergradient, by one linear system in the lower loss's Hessian.

  .. math::
    \nabla_x f - \nabla_{xy} g \, q, \qquad \nabla_{yy} g \, q = \nabla_y f

  and, where the lower variable is in :math:`\{y : A y + h(x) = c\}`, with the
  columns of V spanning the kernel of A,

  .. math::
    q &= V (V^\top \nabla_{yy} g \, V)^{-1} V^\top \nabla_y f, \\
    \nabla F &= \nabla_x f - \nabla_{xy} g \, q
      + \nabla h^\top A^{+\top} (\nabla_{yy} g \, q - \nabla_y f)

  It is exact at the lower minimiser in the set. The Hessian is never formed;
  the gradient is linearised once for all products. Over parts of a batch
  (`accumulate`, `mean_over`), each product is averaged. The mean of the parts'
  hypergradients would be another number, because each divides by its own
  Hessian.

  Args:
    problem: the upper and the lower loss; the lower loss is strongly convex
      along the lower set.
    solve: any function from (operator, right, start) to the solution, for
      instance `conjugate_gradient`, `neumann`, `random_neumann`, `nystrom`,
      `gmres` or `dense_solve` of `bj.linear_solvers` or of another library; or
      a `bj.linear_solvers.LinearSystem` with its batches and its key. By
      default ten conjugate gradients with a warm start.
    lower_set: the set of the lower variable: `affine_set`,
      `affine_operator_set` or `consensus_set`; None for the whole space. For a
      `consensus_set` over a mapped axis, the matrix is the mean over clients.
    direct: whether to include the direct gradient :math:`\nabla_x f`.

  Returns:
    An oracle for the sequence `upper` of parameters with `upper` and `lower`.
    It measures `upper` and, on a coupled set, `outside_range`: the share of
    the right-hand side that no lower variable attains, 0 up to rounding. It
    counts the Hessian-vector products of a `LinearSolver` and one for the cross
    term, and communication rounds over clients.

  Raises:
    TypeError: if `lower_set` is not an `AffineSet`; at the call, if a loss is
      not a scalar or a sequence is missing.
    ValueError: at init, if the set is empty.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp
    >>> problem = bj.BilevelProblem(
    ...   upper=lambda x, y, batch: jnp.sum(y**2) / 2,
    ...   lower=lambda x, y, batch: jnp.sum((y - x) ** 2),
    ... )
    >>> balance = bj.projections.affine_set([[1.0, 1.0]])  # y_1 + y_2 = 0
    >>> params = bj.BilevelParams(jnp.array([3.0, 1.0]), jnp.array([1.0, -1.0]))
    >>> oracle = bj.implicit(problem, lower_set=balance)
    >>> gradient, state = oracle.update(None, oracle.init(params), params)
    >>> print(gradient.upper.round(4))
    [ 1. -1.]

  References:
    Xiao, Shen, Yin and Chen, `Alternating Projected SGD for
    Equality-constrained Bilevel Optimization
    <https://arxiv.org/abs/2211.07096>`_, 2023.

    Pedregosa, `Hyperparameter optimization with approximate gradient
    <https://arxiv.org/abs/1602.02355>`_, 2016.
  """
  base.checked_losses(problem)
  system = linear_solvers.as_system(solve, warm_start=True)
  # A function of `linear_solvers` itself has to be called first.
  uncalled = vars(linear_solvers).get(getattr(system.solve, '__name__', ''))
  if not callable(system.solve) or system.solve is uncalled:
    raise TypeError(
      f'a linear solver is a function, got {system.solve!r}: pass for instance '
      'bj.linear_solvers.conjugate_gradient(10).'
    )
  check_lower_set(lower_set)
  random = getattr(system.solve, 'random', False)
  # The lower set if its equations depend on the upper variable.
  coupled = lower_set if getattr(lower_set, 'coupling', None) else None
  rounds = 0 if lower_set is None else lower_set.rounds
  names = ('upper', 'outside_range') if coupled is not None else ('upper',)

  def init(params):
    _sequences.require_sequences(params, ('upper', 'lower'), 'implicit')
    if lower_set is None:
      zero = optax.tree.zeros_like
    else:
      lower_set.check(params.lower, params.upper, 'lower')
      zero = lower_set.zero
    return ImplicitState(
      linear=zero(params.lower) if system.warm_start else None,
      key=_keys.as_key(system.key, 'the linear solver') if random else None,
    )

  def hypergradient(mean, params, batch, inner):
    next_key, now = None, system
    if random:
      next_key, key = jax.random.split(inner.key)
      now = system._replace(key=key)
    terms = implicit_terms(
      problem,
      params,
      batch,
      solve=now,
      lower_set=lower_set,
      start=inner.linear,
      direct=direct,
      mean=mean,
    )
    gradient = terms.correction
    if direct:
      gradient = optax.tree.add(terms.direct, gradient)
    measured = [terms.value]
    if coupled is not None:
      measured.append(coupled.outside_range(params.lower, params.upper))
    products = 0 if terms.products is None else terms.products
    spent = {
      'hessian_vector_products/lower': products,
      'rounds/linear': rounds * products,
    }
    inner = ImplicitState(terms.linear if system.warm_start else None, next_key)
    gradients = _sequences.only(params, upper=gradient)
    outputs = base.requested_outputs(problem, upper=terms.outputs)
    return measured, gradients, inner, spent, *outputs

  counts = {'gradients/upper': 1, 'hessian_vector_products/lower': 1}
  return base.oracle(
    base.ByMean(hypergradient),
    names,
    init,
    counts=counts | ({'rounds/linear': rounds} if rounds else {}),
    moves=('upper',),
    needs=('upper', 'lower'),
    outputs=base.outputs_only(problem, 'upper'),
  )


def _solved(system, operator, right, start) -> tuple[Any, Any]:
  """The solution and the number of products, None if unknown."""
  solve = system.solve
  if isinstance(solve, linear_solvers.LinearSolver):
    return solve.solve(operator, right, start, system.key)
  solution = solve(operator, right, start)
  expected: Any = jax.tree.structure(right)
  structure: Any = jax.tree.structure(solution)
  if expected != structure:
    raise TypeError(
      f'a linear solver returns the solution, {expected}, got {structure}: if '
      'it returns (solution, info), pass lambda *args: solve(*args)[0].'
    )
  return solution, None


def check_lower_set(lower_set: Any) -> None:
  """Raises TypeError for a lower set without coordinates along it."""
  if lower_set is not None and not isinstance(lower_set, _affine.AffineSet):
    raise TypeError(
      'a hypergradient takes a lower set of equations, affine_set, '
      'affine_operator_set or consensus_set of bj.projections, got '
      f'{type(lower_set).__name__}: for other sets, use a penalty method, for '
      'instance bj.v_pbgd.'
    )
