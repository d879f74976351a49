"""The toy: one step, and the claim with few starts."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel_jax as bj
from experiments import harness
from experiments.pbgd import toy, toy_problem

SETTINGS = toy.Settings(penalties=(10.0, 20.0, 40.0), starts=40)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  workdir = tmp_path_factory.mktemp('toy')
  options = harness.Options(
    paper='pbgd',
    binary='toy',
    preset='quick',
    settings=SETTINGS,
    workdir=str(workdir),
    data_dir=None,
    seeds=(0,),
  )
  harness.execute(toy.main, options)
  return workdir


def test_a_step_with_known_value_by_finite_differences():
  penalty, x, y = 20.0, 2.0, -1.0
  total = lambda x, y: (
    toy_problem.upper_loss(x, y) + penalty * toy_problem.lower_loss(x, y)
  )
  with jax.enable_x64(True):
    solver, step_size = toy.make_solver('known_value', penalty, 0.1)
    params = bj.BilevelParams(jnp.float64(x), jnp.float64(y))
    updates, _ = solver.update(None, solver.init(params), params)
    h = 1e-5
    slope_x = (total(x + h, y) - total(x - h, y)) / (2 * h)
    slope_y = (total(x, y + h) - total(x, y - h)) / (2 * h)
    assert step_size == pytest.approx(0.1 / penalty)
    assert updates.upper == pytest.approx(-step_size * float(slope_x), rel=1e-6)
    assert updates.lower == pytest.approx(-step_size * float(slope_y), rel=1e-6)


def test_exponent_of_a_power_ignores_small_penalties():
  penalties = np.array([1.0, 10.0, 20.0, 100.0])
  values = 3 * penalties**-2
  values[0] = 7.0
  assert toy.exponent(penalties, values, 10.0) == pytest.approx(-2)


@pytest.mark.slow
@pytest.mark.parametrize('solver', ['known_value', 'v_pbgd'])
def test_claim_with_few_starts(folder, solver):
  metrics = json.loads((folder / 'results.json').read_text())['metrics']
  assert metrics[f'fraction_at_minima/{solver}/penalty=10'] >= 0.99
  assert 0 < metrics[f'fraction_at_global_minimum/{solver}/penalty=10'] < 1
  assert -2.3 <= metrics[f'gap_exponent/{solver}'] <= -1.8
  assert 0.8 <= metrics[f'steps_exponent/{solver}'] <= 1.2
  assert metrics[f'fraction_done/{solver}/penalty=40'] == 1


def test_writes_table_and_plot(folder):
  assert 'known_value' in (folder / 'table.md').read_text()
  assert (folder / 'toy.png').read_bytes().startswith(b'\x89PNG')


def test_ends_are_feasible_at_the_step_limit():
  settings = dataclasses.replace(
    SETTINGS, solvers=('g_pbgd',), penalties=(10.0, 20.0), max_steps=3
  )
  _, ends = toy.run(settings, (0,))
  end = ends['g_pbgd'][10.0]
  assert np.all((end.params.upper >= 0) & (end.params.upper <= 3))
  assert np.max(end.steps) == 3
  results = toy.summarise(ends, toy_problem.local_minima(), settings)
  assert results.mean('fraction_done', {'solver': 'g_pbgd', 'penalty': 10}) < 1


@pytest.mark.parametrize(
  'change, message',
  [
    ({'solvers': ('newton',)}, 'known_value, v_pbgd, g_pbgd'),
    ({'headline_penalty': 7.0}, 'not among'),
    ({'fit_from': 40.0}, 'two penalties'),
  ],
)
def test_invalid_settings(change, message):
  with pytest.raises(ValueError, match=message):
    toy.check(dataclasses.replace(SETTINGS, **change))
