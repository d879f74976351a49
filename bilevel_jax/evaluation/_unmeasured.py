"""Solvers without measured losses and evaluation counts."""

import jax
import optax

from bilevel_jax import parts, states


def unmeasured(
  solver: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
  """Drops the losses and evaluation counts from a solver's state.

  The updates do not change. On tiny problems the cost of a compiled step is
  dominated by the call from Python: without these numbers it takes about two
  thirds of the time. A compiled loop of tiny steps takes 0.4 to 0.9 of the
  time, as the losses take part of a step. Larger problems gain little.

  Args:
    solver: any solver, from `bj.descend` or a named one.

  Returns:
    A solver whose state has None in place of losses and counts; `bj.values` and
    `bj.counts` of it are empty.

  Example:
    >>> import bilevel_jax as bj, jax, optax
    >>> toy, sgd = bj.testing.toy_problem(), optax.sgd(0.1)
    >>> solver = bj.v_pbgd(toy.problem, penalty=10.0, upper=sgd, lower=sgd)
    >>> len(jax.tree.leaves(solver.init(toy.params)))
    3
    >>> len(jax.tree.leaves(bj.evaluation.unmeasured(solver).init(toy.params)))
    1
  """
  inner = optax.with_extra_args_support(solver)

  def init_fn(params):
    return states.drop_numbers(inner.init(params))

  def update_fn(batch, state, params=None, **extra_args):
    template = jax.eval_shape(inner.init, params)
    full = states.fill_numbers(state, template)
    updates, state = inner.update(batch, full, params, **extra_args)
    return updates, states.drop_numbers(state)

  if not isinstance(solver, parts.Solver):
    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
  make = solver.again
  again = make and (lambda *oracles: unmeasured(make(*oracles)))
  return solver._replace(init=init_fn, update=update_fn, again=again)
