"""Checks of the user's functions, and notes on their errors."""

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import jax


def check(subject: str, function: Any, arguments: tuple[str, ...]) -> None:
  """Raises TypeError unless a value is a function of these arguments.

  Args:
    subject: the start of the error.
    function: a function; nothing is checked if it has no signature.
    arguments: names of the positional arguments; unknown if empty.
  """
  wanted = f'{subject} is a function of ({", ".join(arguments) or "..."})'
  if not callable(function):
    raise TypeError(f'{wanted}, got {type(function).__name__}.')
  try:
    signature = inspect.signature(function)
  except (TypeError, ValueError):
    return
  if arguments:
    try:
      signature.bind(*arguments)
    except TypeError as error:
      raise TypeError(
        f'{wanted}, got one of {signature}: {error}; take each argument, also '
        'where it is not used.'
      ) from None


@contextlib.contextmanager
def explained(
  subject: str, names: tuple[str, ...], args: tuple[Any, ...]
) -> Iterator[None]:
  """Adds to an error inside a user's function what the function was given.

  The function is called by JAX, so that the error itself names neither the
  argument nor the call to correct.

  Args:
    subject: name of the function.
    names: names of its arguments.
    args: the arguments.
  """
  try:
    yield
  except Exception as error:
    # A user's function may be called by a loss of this library.
    if any('bilevel_jax called' in n for n in getattr(error, '__notes__', ())):
      raise
    names = names or tuple(f'argument {i}' for i in range(len(args)))
    shapes = ', '.join(f'{n} = {_shapes(a)}' for n, a in zip(names, args))
    error.add_note(
      f'{subject} failed. bilevel_jax called it with {shapes}: check its '
      'parameters and its batch, and compute with jax.numpy.'
    )
    raise


def _shapes(tree: Any) -> str:
  """Types and shapes of the leaves, shortened."""
  brief = lambda x: (
    f'{x.dtype}{list(x.shape)}' if hasattr(x, 'dtype') else type(x).__name__
  )
  named = tree._asdict() if hasattr(tree, '_asdict') else tree
  text = str(jax.tree.map(brief, named)).replace("'", '')
  return text if len(text) < 200 else f'{text[:200]}...'
