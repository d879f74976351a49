"""The gradient of one loss, in all parameters or in some sequences."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import optax

from bilevel_jax import _sequences, types
from bilevel_jax.oracles import _penalised, base


def gradient(
  loss: Callable[[Any, Any], Any],
  *,
  name: str = 'loss',
  of: str | Sequence[str] | Mapping[str, float] | None = None,
  counts_as: str | None = None,
  outputs: Callable[[Any], Any] | None = None,
) -> base.Oracle:
  r"""The gradient of a loss.

  .. math::
    d^n = s_n \, \nabla_{z^n} \, \ell(z, batch)

  with the sign :math:`s_n = 1` by default. A chain of this oracle and an optax
  optimiser is a solver.

  Args:
    loss: a function of (parameters, batch) to a scalar, or to
      (scalar, auxiliary).
    name: the name of the loss in `bj.values`.
    of: the sequence or sequences to differentiate; the others get None. A
      mapping gives the sign of each, -1 for ascent: `{'x': 1, 'y': -1}` for a
      saddle point. By default all parameters.
    counts_as: the name of the loss in `bj.counts`; by default `name`.
    outputs: a function from the parameters to a pytree with the structure of
      the loss's auxiliary output, which `bj.outputs` then returns under `name`.
      Without it, or if it gives None, that output is dropped.

  Returns:
    An oracle.

  Raises:
    TypeError: at the call, if the loss is not a scalar, or if the parameters
      have no sequence `of`.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp, optax
    >>> loss = lambda params, batch: jnp.mean((params - 1) ** 2)
    >>> solver = optax.chain(bj.gradient(loss), optax.adam(0.1))
    >>> params, state = bj.testing.run(solver, jnp.zeros(3), 200)
    >>> print(params.round(2), bj.counts(state))
    [1. 1. 1.] {'gradients/loss': 200}
  """
  checked = base.Loss(loss, name, ('params', 'batch'))
  signs: dict[str, float] | None = None
  if isinstance(of, str):
    signs = {of: 1}
  elif of is not None:
    signs = dict(of) if isinstance(of, Mapping) else dict.fromkeys(of, 1)

  def fn(params, batch, inner):
    if signs is None:
      chosen, join = params, lambda fields: fields
    else:
      chosen = {n: getattr(params, n) for n in signs}
      join = lambda fields: params._replace(**fields)
    (value, output), slope = jax.value_and_grad(
      lambda fields: checked.full(join(fields), batch), has_aux=True
    )(chosen)
    if signs is not None:
      signed = {
        n: s if signs[n] == 1 else optax.tree.scale(signs[n], s)
        for n, s in slope.items()
      }
      slope = _sequences.only(params, **signed)
    more = () if outputs is None else ({name: output},)
    return (value,), slope, inner, *more

  def announced(params):
    expected = outputs(params) if outputs else None
    return {} if expected is None else {name: expected}

  return base.oracle(
    fn,
    (name,),
    counts={f'gradients/{counts_as or name}': 1},
    moves=signs,
    outputs=outputs and announced,
    linear=True,
  )


def lower_gradient(
  problem: types.BilevelProblem,
  *,
  of: str = 'lower',
  proximity: float | None = None,
) -> base.Oracle:
  r"""The slope of the lower loss at a sequence that follows its minimiser.

  .. math::
    \nabla_w g(x, w) \quad \text{or} \quad
    \nabla_w \left( g(x, w) + \tfrac{1}{2 \rho} \| w - y \|^2 \right)

  Args:
    problem: the upper and the lower loss.
    of: the sequence :math:`w`; by default `lower`.
    proximity: a length :math:`\rho` for the second form, whose minimum is the
      Moreau envelope of the lower loss; None for the first form.

  Returns:
    An oracle that measures the lower loss there, under the sequence's name.

  Raises:
    TypeError: if the problem is not a `BilevelProblem`; at the call, if the
      loss is not a scalar or a sequence is missing.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp
    >>> square = lambda x, y, batch: (y - x) ** 2
    >>> problem = bj.BilevelProblem(upper=square, lower=square)
    >>> params = bj.sequences(upper=1.0, lower=3.0, value=jnp.float32(2.0))
    >>> oracle = bj.lower_gradient(problem, of='value')
    >>> gradients, state = oracle.update(None, oracle.init(params), params)
    >>> print(gradients.value, bj.values(state)['value'])
    2.0 1.0
  """
  _, lower = base.checked_losses(problem)

  def loss(params, batch):
    point = getattr(params, of)
    value, output = lower.full(params.upper, point, batch)
    if proximity is not None:
      away = optax.tree.sub(point, params.lower)
      value = value + optax.tree.norm(away, squared=True) / (2 * proximity)
    return value, output

  # Outputs at other sequences than the lower variable are dropped.
  wanted = problem.outputs if of == 'lower' else None
  return gradient(
    loss,
    name=of,
    of=of,
    counts_as='lower',
    outputs=(lambda p: wanted(p).get('lower')) if wanted else None,
  )


def penalised_lower_gradient(
  problem: types.BilevelProblem,
  *,
  penalty: types.ScalarOrSchedule,
  rescale: bool = True,
) -> base.Oracle:
  r"""The slope in y of the upper loss plus a multiple of the lower loss.

  .. math::
    c_k \nabla_y [ f(x, y) + \gamma_k g(x, y) ], \qquad
    c_k = \min(1 / \gamma_k, 1)

  Args:
    problem: the upper and the lower loss.
    penalty: :math:`\gamma_k \ge 0`, a constant or a schedule from the number of
      updates so far.
    rescale: whether to multiply by :math:`c_k`.

  Returns:
    An oracle for the sequence `lower`. It measures `upper` and `lower`.

  Raises:
    ValueError: if the penalty is negative.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp
    >>> problem = bj.BilevelProblem(
    ...   upper=lambda x, y, batch: y**2, lower=lambda x, y, batch: (y - x) ** 2
    ... )
    >>> params = bj.BilevelParams(jnp.float32(1.0), jnp.float32(3.0))
    >>> oracle = bj.oracles.penalised_lower_gradient(problem, penalty=2.0)
    >>> gradients, _ = oracle.update(None, oracle.init(params), params)
    >>> print(gradients.lower)  # (6 + 2 * 4) / 2
    7.0
  """
  _, lower = base.checked_losses(problem)

  def itself(x, y, params, batch, known):
    del params, known
    value, output = lower.full(x, y, batch)
    return value, (value, output)

  counts = {'gradients/upper': 1, 'gradients/lower': 1}
  sequences = ('upper', 'lower')
  return _penalised.penalised(
    problem,
    _penalised.Penalty(itself, ('lower',), counts, sequences),
    penalty=penalty,
    rescale=rescale,
    of=('lower',),
  )
