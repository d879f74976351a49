"""Which methods work with which sets, loops and wrappers, tried out.

`python -m tests.validity` rewrites the two tables of docs/methods.md; a test
compares them. Each method is built as in its row of the contract, with one
addition: a set in a record, an inner loop, or a wrapper around its oracles. An
error while it is built or traced means an invalid combination, and its message
is the reason. Whether parts of a batch add up is a field of the row.
"""

import functools
import pathlib
import re
import textwrap
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

import bilevel_jax as bj
from tests import contract

PAGE = pathlib.Path(__file__).parents[1] / 'docs' / 'methods.md'
_BLOCK = re.compile(r'(<!-- validity -->\n).*?(<!-- end -->)', re.DOTALL)
YES, NO = '✓', '-'
_SHORT = {
  'gradients/upper': 'f',
  'gradients/lower': 'g',
  'hessian_vector_products/lower': 'H',
}


def same(oracle):
  return oracle


def _mix(both):
  """A joint set of the two variables: their sum is fixed."""
  x, y = both[0]['a'], both[1]['b']
  half = (jnp.sum(x) - jnp.sum(y)) / (2 * contract.COORDINATES)
  return {'a': x - half}, {'b': y + half}


def _with(**fields: Any) -> Callable[[Any, str], Any]:
  return lambda records, name: bj.types.as_sequence(records, name)._replace(
    **fields
  )


_EQUATIONS = bj.projections.affine_set(jnp.ones((1, contract.COORDINATES)))
# By column: the records that are changed.
RECORDS: dict[str, Mapping[str, Callable[[Any, str], Any]]] = {
  'upper set': {'upper': _with(set=contract.X_SET)},
  'lower set': {'lower': _with(set=contract.Y_SET)},
  'joint set': {'upper': _with(set=bj.projections.Joint(_mix, ('lower',)))},
  'lower equations': {'lower': _with(set=_EQUATIONS)},
  'lazy equations': {
    'lower': _with(set=bj.projections.Lazy(_EQUATIONS, 0.5, key=0))
  },
  'inner steps': {
    'lower': _with(steps=contract.INNER, batch_at=contract.inner_batch)
  },
}
WRAPPERS = {
  'storm': lambda oracle, **like: bj.evaluation.storm(oracle, 0.5, **like),
  'saga': lambda oracle, **like: bj.evaluation.saga(oracle, 2, **like),
  'delayed': lambda oracle, **like: bj.evaluation.delayed(oracle, 3),
}
NO_RECORD = 'there is no such record'


def refusal(row: contract.Row, column: str) -> str:
  """Why a method does not work with an addition; '' if it does."""
  wrap = WRAPPERS.get(column, same)
  if column in WRAPPERS and hasattr(bj.aggregators, row.method):
    # The oracle returns rows, whose structure the wrapper needs.
    like = bj.oracles.jacobian_like(contract.OBJECTIVES)
    wrap = functools.partial(wrap, like=like)
  changes = RECORDS.get(column, {})
  package = bj.solvers if hasattr(bj.solvers, row.method) else bj.aggregators
  original = getattr(package, row.method)

  @functools.wraps(original)
  def changed(*arguments, **records):
    if not set(changes) <= set(records):
      raise ValueError(NO_RECORD)
    new = {
      name: change(records[name], name) for name, change in changes.items()
    }
    return original(*arguments, **records | new)

  places = [m for m in (package, bj) if hasattr(m, row.method)]
  try:
    for place in places if changes else ():
      setattr(place, row.method, changed)
    solver = row.make(wrap, **row.hyper)
    params, batch = row.params(0), contract.random_batch(0)
    state = jax.eval_shape(solver.init, params)
    jax.eval_shape(solver.update, batch, state, params)
  except (TypeError, ValueError, NotImplementedError) as error:
    return ' '.join(str(error).split()) or type(error).__name__
  finally:
    for place in places:
      setattr(place, row.method, original)
  return ''


def first_rows(package: Any) -> dict[str, contract.Row]:
  """The first row of each method of a package."""
  first: dict[str, contract.Row] = {}
  for row in contract.collect().rows.values():
    if row.method in package.__all__:
      first.setdefault(row.method, row)
  return dict(sorted(first.items()))


def cost(row: contract.Row) -> str:
  """The evaluations of one update, as in the row."""
  parts = []
  for name, count in row.counts.items():
    if not name.startswith(('gradients', 'hessian')):
      continue
    letter = _SHORT.get(name, name.replace('_', ' '))
    parts.append(f'{"" if count == 1 else f"{count} "}{letter}')
  if row.random_counts:
    parts.append('a random number')
  return ' + '.join(parts)


def cells(
  row: contract.Row, columns: Any
) -> tuple[dict[str, str], dict[str, str]]:
  """The cells of a row, and the reasons of refusals by column."""
  values, refusals = {}, {}
  nested = row.params is contract.nested_params
  for column in columns:
    why = ''
    if column in RECORDS and not nested:
      values[column] = ''
      continue
    if column in ('accumulate', 'mean_over', *WRAPPERS):
      why = '' if row.wraps else 'the method takes no wrapper of oracles'
    if not why and column == 'accumulate':
      why = (
        'random draws or a warm start would differ between parts'
        if row.keys
        else ''
      )
    if not why and column in ('accumulate', 'mean_over'):
      why = (
        'a mean over parts is not the update of the full batch'
        if row.parts == 'none'
        else ''
      )
    elif not why:
      why = refusal(row, column)
    values[column] = '' if why == NO_RECORD else NO if why else YES
    if 'pass `like`' in why:
      values[column] = '`like`'
    if values[column] == NO:
      refusals[column] = why
  return values, refusals


def tables() -> str:
  """Both tables, and the reasons of refusals."""
  wrappers = ('accumulate', 'mean_over', *WRAPPERS)
  lines: list[str] = []
  refused: dict[str, list[str]] = {}
  for title, package, columns in (
    ('solver', bj.solvers, (*RECORDS, *wrappers)),
    ('aggregator', bj.aggregators, wrappers),
  ):
    lines += [
      f'| {title} | an update evaluates | {" | ".join(columns)} |',
      f'| --- | --- | {" | ".join(":-:" for _ in columns)} |',
    ]
    for name, row in first_rows(package).items():
      values, refusals = cells(row, columns)
      for column, why in refusals.items():
        refused.setdefault(why, []).append(f'`{name}` ({column})')
      lines.append(
        f'| `{name}` | {cost(row)} | {" | ".join(values.values())} |'
      )
    lines.append('')
  lines += ['Refused combinations, by reason or by the message of the error:']
  lines.append('')
  reasons = (
    textwrap.fill(
      f'- {", ".join(names)}: *{why}*',
      width=118,
      subsequent_indent='  ',
      break_long_words=False,
      break_on_hyphens=False,
    )
    for why, names in refused.items()
  )
  return '\n'.join([*lines, *reasons, ''])


def page(text: str) -> str:
  """The document with updated tables."""
  content = tables()
  return _BLOCK.sub(lambda match: match[1] + content + match[2], text)


if __name__ == '__main__':
  PAGE.write_text(page(PAGE.read_text(encoding='utf-8')), encoding='utf-8')
