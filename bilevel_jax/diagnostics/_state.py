"""Losses, evaluations, outputs and sequences in a solver's state."""

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
    Scalars by name; zero before the first update. If two oracles measure the
    same name, the later one counts. A loss that the last update did not
    evaluate has an older value: see `evaluated`.

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

  Average a loss over the updates that evaluated it: `bj.evaluation.select`
  evaluates one objective in each update.

  Args:
    state: a solver's state, at any depth.

  Returns:
    Boolean scalars by name of the loss. For objectives of `select`, False
    before the first update; True for all other losses.

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
  # The flags of an outer selection include those of a nested one.
  for node in states.nodes_with(state, 'evaluated', nested=False):
    flags |= node.evaluated
  return flags


def outputs(state: Any) -> dict[str, Any]:
  """The requested auxiliary outputs of losses in the last update.

  A problem requests them by its field `outputs`, `gradient` by its argument.
  Use them for metrics, or for running statistics that go into the next batch.

  Args:
    state: a solver's state, at any depth.

  Returns:
    A pytree by name of the loss; before the first update, the result of
    `outputs`.

  Example:
    >>> import bilevel_jax as bj, jax, jax.numpy as jnp, optax
    >>> def lower(x, y, batch):  # Centres the data by a running mean.
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
  """The evaluations of a solver so far.

  Args:
    state: a solver's state.

  Returns:
    Whole numbers by name, for instance `gradients/lower`,
    `hessian_vector_products/lower` or `projections/upper`; int32 arrays inside
    a compiled function and under `jax.vmap`. They are sums over the parts of a
    solver. Counters saturate at 2**31 - 1.

  Example:
    >>> import bilevel_jax as bj, optax
    >>> toy, sgd = bj.testing.toy_problem(), optax.sgd(0.1)
    >>> solver = bj.v_pbgd(
    ...   toy.problem, penalty=1.0, upper=sgd, lower=sgd,
    ...   value=bj.Sequence(sgd, steps=3),
    ... )
    >>> _, state = bj.testing.run(solver, toy.params, 1)
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
  """The sequences in a solver's state.

  Args:
    state: a solver's state, at any depth.

  Returns:
    A pytree by name, for `v_pbgd` the sequence `value`.

  Example:
    >>> import bilevel_jax as bj, optax
    >>> toy, sgd = bj.testing.toy_problem(), optax.sgd(0.1)
    >>> solver = bj.soba(toy.problem, upper=sgd, lower=sgd)
    >>> print(bj.auxiliaries(solver.init(toy.params))['linear'])
    [0. 0.]
  """
  sequences: dict[str, Any] = {}
  for node in states.nodes_with(state, 'sequences'):
    sequences |= node.sequences
  return sequences


def nonfinite(params: Any, state: Any) -> dict[str, chex.Array]:
  """Which losses and which sequences hold a NaN or an infinity.

  Args:
    params: the parameters.
    state: the solver's state.

  Returns:
    A boolean scalar by name: `loss/<name>` for losses, `sequence/<name>` for
    sequences of the parameters and of the state (`sequence/params` if the
    parameters have no named sequences). It works inside compiled functions.

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

  _sequences.refuse_state(
    params, 'the parameters are', 'call check_finite(params, state)'
  )
  named = (
    params._asdict() if _sequences.is_sequences(params) else {'params': params}
  )
  named = named | auxiliaries(state)
  out = {f'loss/{name}': bad(value) for name, value in values(state).items()}
  return out | {f'sequence/{name}': bad(tree) for name, tree in named.items()}


def check_finite(params: Any, state: Any) -> None:
  """Raises FloatingPointError if a loss or a sequence is not finite.

  A compiled step cannot raise; call this function between steps.

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
  names = [
    name.replace('/', ' ', 1)
    for name, flag in nonfinite(params, state).items()
    if bool(jnp.any(flag))
  ]
  if names:
    raise FloatingPointError(
      f'not finite: {", ".join(names)}. The usual cause is a large step size: '
      'decrease it. With a penalty, decrease the penalty or make its ramp '
      'longer, and keep `rescale` on. If only a loss is not finite, look for a '
      'logarithm or a division in it, or for invalid values in the batch.'
    )
