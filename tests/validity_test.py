"""The combinations of docs/methods.md are what the library accepts."""

import pytest

import bilevel_jax as bj
from tests import contract, validity

FIRST_ROWS = validity.first_rows(bj.solvers)


def test_every_method_has_a_row_and_the_page_all_of_them():
  text = validity.PAGE.read_text(encoding='utf-8')
  for package in (bj.solvers, bj.aggregators):
    found = validity.first_rows(package)
    assert set(found) == set(package.__all__) - contract.HELPERS
    assert all(f'\n| `{name}` |' in text for name in found)


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
def test_refusals_are_the_library_s(name, column, says):
  found = validity.refusal(FIRST_ROWS[name], column)
  assert says in found and bool(says) == bool(found)


@pytest.mark.slow
def test_the_page_is_as_the_library_makes_it():
  """`python -m tests.validity` mends it."""
  text = validity.PAGE.read_text(encoding='utf-8')
  assert validity.page(text) == text
