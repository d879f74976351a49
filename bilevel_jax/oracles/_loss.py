"""Losses that are checked at each call."""

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp

from bilevel_jax import _functions, _lapack, types


class Loss:
  """A loss that is checked to be a real scalar.

  Args:
    loss: returns a scalar, or (scalar, auxiliary).
    name: name of the loss, for errors.
    arguments: names of its arguments; they are checked.

  Raises:
    TypeError: if the loss is not a function of its arguments; at the call, if
      the value is not a real scalar.
  """

  def __init__(
    self, loss: Callable[..., Any], name: str, arguments: tuple[str, ...] = ()
  ):
    """Keeps the function and its name."""
    self._subject = 'the loss' if name == 'loss' else f'the {name} loss'
    _functions.check(self._subject, loss, arguments)
    self._loss, self._arguments = loss, arguments
    self._watched: bool | None = None if _lapack.AFFECTED else False

  def full(self, *args: Any) -> tuple[chex.Array, Any]:
    """The loss and its auxiliary output, () without one."""
    with _functions.explained(self._subject, self._arguments, args):
      out, auxiliary = self._loss(*args), ()
    if isinstance(out, tuple) and len(out) == 2:
      out, auxiliary = out
    if not hasattr(out, 'dtype') and not isinstance(out, (int, float)):
      raise TypeError(
        f'{self._subject} returned {type(out).__name__}, expected a '
        'scalar array or (scalar, auxiliary).'
      )
    value = jnp.asarray(out)
    if value.shape:
      raise TypeError(
        f'{self._subject} returned an array of shape {value.shape}, '
        'expected a scalar: reduce it over the batch, for instance with '
        'jnp.mean.'
      )
    if not jnp.issubdtype(value.dtype, jnp.floating):
      raise TypeError(
        f'{self._subject} returned {value.dtype}, expected a float scalar.'
      )
    if self._watched is None:
      self._watched = _lapack.watch(self._loss, args)
    if self._watched:
      _lapack.notice(jax.lax.stop_gradient(value))
    return value, auxiliary

  def with_slopes(self, *arguments: int) -> Callable[..., Any]:
    """From the loss's arguments to ((loss, auxiliary), slopes in some)."""
    return jax.value_and_grad(self.full, arguments, has_aux=True)

  def __call__(self, *args: Any) -> chex.Array:
    """The loss without its auxiliary output."""
    return self.full(*args)[0]


_ARGUMENTS = ('x', 'y', 'batch')


def checked_losses(problem: types.BilevelProblem) -> tuple[Loss, Loss]:
  """The upper and the lower loss of a problem, checked at each call.

  Raises:
    TypeError: as `checked_upper`.
  """
  return checked_upper(problem), Loss(problem.lower, 'lower', _ARGUMENTS)


def checked_upper(problem: types.BilevelProblem) -> Loss:
  """The upper loss of a problem, checked at each call.

  Raises:
    TypeError: if the problem is not a `BilevelProblem`.
  """
  if not isinstance(problem, types.BilevelProblem):
    raise TypeError(
      'the problem is a bj.BilevelProblem(upper=..., lower=...) of two losses '
      f'(x, y, batch) -> scalar, got {type(problem).__name__}.'
    )
  return Loss(problem.upper, 'upper', _ARGUMENTS)
