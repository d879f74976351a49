"""What a solver's state says: losses measured, evaluations, added sequences."""

from typing import Any

import chex
import jax
import jax.numpy as jnp

from bilevel_jax import _sequences, states


def values(state: Any) -> dict[str, chex.Array]:
  """The losses that a solver's oracles measured in the last update.

  Args:
    state: a solver's state, at any depth.

  Returns:
    Scalars by name; zero before the first update. Where two oracles give one
    name, the later one in the chain wins. A loss that the last update did not
    evaluate keeps an older value: see `evaluated`.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp
    >>> oracle = bj.gradient(lambda params, batch: params**2, name='energy')
    >>> params = jnp.float32(3.0)
    >>> _, state = oracle.update(None, oracle.init(params), params)
    >>> print(bj.values(state)['energy'])
    9.0
  """
  measured: dict[str, chex.Array] = {}
  for node in states.nodes_with(state, 'values'):
    measured |= node.values
  return measured


def evaluated(state: Any) -> dict[str, chex.Array]:
  """Which losses of `values` the last update evaluated.

  A mean of a loss over updates is over those in which it was evaluated:
  `bj.evaluation.select` evaluates one objective in each update.

  Args:
    state: a solver's state, at any depth.

  Returns:
    Boolean scalars by name of a loss. False before the first update for
    objectives of `select`; True for all other losses.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp
    >>> oracle = bj.evaluation.select(
    ...   {n: bj.gradient(lambda x, b: x * b, name=n) for n in ('p', 'q')},
    ...   bj.evaluation.as_given(),
    ... )
    >>> params = jnp.float32(1.0)
    >>> _, state = oracle.update({'q': 3.0}, oracle.init(params), params)
    >>> for name, flag in bj.diagnostics.evaluated(state).items():
    ...   print(name, flag, bj.values(state)[name])
    p False 0.0
    q True 3.0
  """
  flags = {n: jnp.ones(jnp.shape(x), bool) for n, x in values(state).items()}
  # The flags of a nested selection are part of those of the outer one.
  for node in states.nodes_with(state, 'evaluated', nested=False):
    flags |= node.evaluated
  return flags


def outputs(state: Any) -> dict[str, Any]:
  """The auxiliary outputs of losses in the last update, where asked for.

  A problem asks by its field `outputs`, `gradient` by its argument. So running
  statistics go from one update into the next batch, and metrics come out.

  Args:
    state: a solver's state, at any depth.

  Returns:
    A pytree by name of a loss; before the first update, what `outputs` gave.

  Example:
    >>> import bilevel_jax as bj, jax, jax.numpy as jnp, optax
    >>> def lower(x, y, batch):  # Centred by a running mean, and moves it.
    ...   mean = 0.5 * batch['mean'] + 0.5 * batch['z'].mean()
    ...   return jnp.sum((y - (batch['z'] - mean)) ** 2), {'mean': mean}
    >>> problem = bj.BilevelProblem(
    ...   upper=lambda x, y, batch: jnp.sum((y - 1) ** 2) + x**2,
    ...   lower=lower,
    ...   outputs=lambda params: {'lower': {'mean': jnp.zeros([])}},
    ... )
    >>> sgd = optax.sgd(0.1)
    >>> solver = bj.v_pbgd(problem, penalty=1.0, upper=sgd, lower=sgd)
    >>> params = bj.BilevelParams(jnp.zeros([]), jnp.zeros(2))
    >>> state, step = solver.init(params), jax.jit(solver.update)
    >>> for _ in range(3):
    ...   batch = {'z': jnp.array([3.0, 5.0])} | bj.outputs(state)['lower']
    ...   updates, state = step(batch, state, params)
    >>> print(bj.outputs(state)['lower']['mean'])
    3.5
  """
  auxiliary: dict[str, Any] = {}
  for node in states.nodes_with(state, 'outputs'):
    auxiliary |= node.outputs
  return auxiliary


def counts(state: Any) -> dict[str, Any]:
  """What a solver has evaluated so far, counted where it was evaluated.

  Args:
    state: a solver's state.

  Returns:
    By name, for instance `gradients/lower`, `hessian_vector_products/lower` or
    `projections/upper`, a whole number; an int32 array inside a compiled
    function and for several seeds at once. The parts of one solver are added
    up. A counter stops at 2**31 - 1.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp, optax
    >>> square = lambda x, y, batch: (x - y) ** 2
    >>> solver = bj.v_pbgd(
    ...   bj.BilevelProblem(square, square), penalty=1.0,
    ...   upper=optax.sgd(0.1), lower=optax.sgd(0.1),
    ...   value=bj.Sequence(optax.sgd(0.1), steps=3),
    ... )
    >>> params = bj.BilevelParams(jnp.float32(1.0), jnp.float32(2.0))
    >>> _, state = solver.update(None, solver.init(params), params)
    >>> bj.counts(state)
    {'gradients/lower': 5, 'gradients/upper': 1}
  """
  total: dict[str, Any] = {}
  for node in states.nodes_with(state, 'counts'):
    for name, count in node.counts.items():
      total[name] = total.get(name, 0) + count
  plain = lambda x: jnp.ndim(x) == 0 and not isinstance(x, jax.core.Tracer)
  return {name: int(x) if plain(x) else x for name, x in total.items()}


def auxiliaries(state: Any) -> dict[str, Any]:
  """The sequences that a solver keeps in its state, by name.

  Args:
    state: a solver's state, at any depth.

  Returns:
    A pytree by name, for `v_pbgd` the one sequence `value`.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp, optax
    >>> square = lambda x, y, batch: jnp.sum((x - y) ** 2)
    >>> sgd = optax.sgd(0.1)
    >>> solver = bj.soba(
    ...   bj.BilevelProblem(square, square), upper=sgd, lower=sgd
    ... )
    >>> params = bj.BilevelParams(jnp.zeros(3), jnp.ones(3))
    >>> print(bj.auxiliaries(solver.init(params))['linear'])
    [0. 0. 0.]
  """
  found: dict[str, Any] = {}
  for node in states.nodes_with(state, 'sequences'):
    found |= node.sequences
  return found


def nonfinite(params: Any, state: Any) -> dict[str, chex.Array]:
  """Which losses and which sequences hold a NaN or an infinity.

  Args:
    params: the parameters.
    state: the solver's state.

  Returns:
    A boolean scalar by name: `loss/<name>` for what the oracles measured,
    `sequence/<name>` for the parameters (`sequence/params` if they have no
    named sequences) and for those that the state keeps. Works inside compiled
    functions.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp
    >>> oracle = bj.gradient(lambda params, batch: jnp.log(params))
    >>> params = jnp.float32(0.0)
    >>> _, state = oracle.update(None, oracle.init(params), params)
    >>> for name, flag in bj.diagnostics.nonfinite(params, state).items():
    ...   print(name, flag)
    loss/loss True
    sequence/params False
  """

  def bad(tree):
    flags = [
      ~jnp.all(jnp.isfinite(leaf))
      for leaf in jax.tree.leaves(tree)
      if jnp.issubdtype(jnp.asarray(leaf).dtype, jnp.inexact)
    ]
    return jnp.any(jnp.stack(flags)) if flags else jnp.zeros([], bool)

  named = (
    params._asdict() if _sequences.is_sequences(params) else {'params': params}
  )
  named = named | auxiliaries(state)
  out = {f'loss/{name}': bad(value) for name, value in values(state).items()}
  return out | {f'sequence/{name}': bad(tree) for name, tree in named.items()}


def check_finite(params: Any, state: Any) -> None:
  """Raises if a loss or a sequence is not finite, and says which and why.

  A compiled step cannot raise: call this between steps, now and then.

  Args:
    params: the parameters.
    state: the solver's state.

  Raises:
    FloatingPointError: naming the losses and sequences.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp
    >>> oracle = bj.gradient(lambda params, batch: params**2)
    >>> bj.check_finite(jnp.inf, oracle.init(jnp.float32(0.0)))
    Traceback (most recent call last):
    ...
    FloatingPointError: not finite: sequence params. ...
  """
  found = [
    name.replace('/', ' ', 1)
    for name, flag in nonfinite(params, state).items()
    if bool(jnp.any(flag))
  ]
  if found:
    raise FloatingPointError(
      f'not finite: {", ".join(found)}. A step size too large is the usual '
      'cause: make it smaller; with a penalty, make that smaller or its ramp '
      'longer, and keep `rescale` on. A loss alone: look for a logarithm '
      'or a division in it, or for bad values in the batch.'
    )
