"""The combinations of docs/methods.md are what the library accepts."""

import pytest

import bilevel_jax as bj
from tests import contract, validity

FIRST_ROWS = validity.first_rows(bj.solvers)


def test_the_page_lists_every_method():
  text = validity.PAGE.read_text(encoding='utf-8')
  for package in (bj.solvers, bj.aggregators):
    actual = validity.first_rows(package)
    assert set(actual) == set(package.__all__) - contract.HELPERS
    assert all(f'\n| `{name}` |' in text for name in actual)


@pytest.mark.parametrize(
  ('name', 'column', 'says'),
  [
    ('v_pbgd', 'joint set', ''),
    ('v_pbgd', 'saga', ''),
    ('aipod', 'lower equations', ''),
    ('aipod', 'lower set', 'takes a lower set of equations'),
    ('e_aipod', 'lazy equations', ''),
    ('stable', 'inner steps', 'takes one step'),
    ('stsa', 'lower set', validity.NO_RECORD),
  ],
)
def test_refusals_quote_the_error(name, column, says):
  actual = validity.refusal(FIRST_ROWS[name], column)
  assert says in actual and bool(says) == bool(actual)


@pytest.mark.slow
def test_the_page_is_up_to_date():
  """`python -m tests.validity` updates it."""
  text = validity.PAGE.read_text(encoding='utf-8')
  assert validity.page(text) == text
