"""A solver whose state holds no losses and no counts of evaluations."""

import jax
import optax

from bilevel_jax import parts, states


def unmeasured(
  solver: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
  """Leaves out the losses and the counts of evaluations of a solver.

  Its updates are the same. On tiny problems a call of a compiled step from
  Python costs as much as its arrays and their computation: without these
  numbers it takes some two thirds of the time. Inside a compiled loop, or for
  larger problems, there is little to gain.

  Args:
    solver: any solver, from `bj.descend` or a named one.

  Returns:
    A solver whose state has None in place of losses and counts, so that
    `bj.values` and `bj.counts` of it are empty.

  Example:
    >>> import bilevel_jax as bj, jax, jax.numpy as jnp, optax
    >>> loss = lambda x, y, batch: jnp.sum((y - x) ** 2)
    >>> problem = bj.BilevelProblem(upper=loss, lower=loss)
    >>> sgd = optax.sgd(0.1)
    >>> solver = bj.v_pbgd(problem, penalty=10.0, upper=sgd, lower=sgd)
    >>> params = bj.BilevelParams(jnp.zeros(2), jnp.ones(2))
    >>> len(jax.tree.leaves(solver.init(params)))
    3
    >>> len(jax.tree.leaves(bj.evaluation.unmeasured(solver).init(params)))
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
