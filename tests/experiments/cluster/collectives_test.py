"""Tests of the counts of collectives, and of the cost model of each method."""

import pathlib

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from experiments import harness
from experiments.cluster import collectives, communication

Numbers = communication.Numbers
QUICK = ('v_pbgd', 'rhg', 'mgda', 'seal')


def compiled_text(run, *shapes):
  mesh = jax.sharding.Mesh(jax.devices(), ('d',))
  place = lambda spec: NamedSharding(mesh, PartitionSpec(*spec))
  arguments = [
    jax.ShapeDtypeStruct(shape, jnp.float32, sharding=place(spec))
    for shape, spec in shapes
  ]
  jitted = jax.jit(run, out_shardings=place(()))
  return jitted.lower(*arguments).compile().as_text()


ROWS = ((16, 24), ('d',))


def test_a_sum_over_devices_is_counted_by_its_numbers():
  text = compiled_text(lambda rows: rows.sum(0), ROWS)
  assert collectives.count(text) == collectives.Exchange(4 * 24, 0, 1)
  text = compiled_text(lambda rows: rows.sum(), ROWS)
  assert collectives.count(text) == collectives.Exchange(0, 1, 1)
  text = compiled_text(lambda rows: rows, ROWS)
  assert collectives.count(text) == collectives.Exchange(4 * 16 * 24, 0, 1)
  assert collectives.count(text, ('all-reduce',)) == collectives.Exchange()
  text = compiled_text(lambda rows: rows[:, :3].sum(0), ROWS)
  assert collectives.count(text).scalars == 0
  assert collectives.count(text, seeds=3) == collectives.Exchange(0, 1, 1)


def test_loops_count_each_step_and_branches_the_largest():
  def run(rows):
    body = lambda x, _: (jnp.sin((rows * x).sum(0)), None)
    x = jax.lax.scan(body, rows[0], None, length=7)[0]
    many = lambda x: jnp.cos((rows @ x) @ rows)
    return jax.lax.cond(x[0] > 0, lambda x: x, lambda x: many(many(x)), x)

  exchange = collectives.count(compiled_text(run, ROWS))
  rest = exchange.bytes - (7 + 2) * 4 * 24
  # The first row is on one device: others get it.
  assert 0 <= rest <= 4 * 24 * 2


def test_a_loop_of_unknown_length_is_refused():
  def run(rows):
    body = lambda x: (rows * x).sum(0)
    return jax.lax.while_loop(lambda x: x[0] < 1, body, jnp.ones(24))

  with pytest.raises(ValueError, match='unknown number of steps'):
    collectives.count(compiled_text(run, ROWS))


def predicted(name, numbers):
  return 4 * communication.METHODS[name].cost.count(numbers)


@pytest.mark.parametrize('name', QUICK)
def test_methods_exchange_what_the_cost_model_says(name):
  numbers = Numbers(T=4, K=3, M=2)
  exchange = communication.compile_step(name, numbers).exchange()
  assert exchange.bytes == predicted(name, numbers)


@pytest.mark.slow
@pytest.mark.parametrize(
  'numbers', [Numbers(), Numbers(T=5, K=4, M=4)], ids=str
)
@pytest.mark.parametrize('name', communication.METHODS)
def test_all_methods_exchange_what_the_cost_model_says(name, numbers):
  exchange = communication.compile_step(name, numbers).exchange()
  assert exchange.bytes == predicted(name, numbers)


@pytest.mark.slow
@pytest.mark.parametrize('name', ['v_pbgd', 'soba', 'mgda'])
def test_seeds_multiply_and_devices_do_not_matter(name):
  numbers = Numbers(S=3)
  exchange = communication.compile_step(name, numbers).exchange()
  assert exchange.bytes == predicted(name, numbers)
  for devices in (1, 2):
    exchange = communication.compile_step(name, devices=devices).exchange()
    assert exchange.bytes == (devices > 1) * predicted(name, Numbers())


def test_stored_numbers_are_those_of_the_cost_model():
  path = pathlib.Path(communication.__file__).parent / 'results' / 'scale.json'
  metrics = harness.read_results(path)['metrics']
  for name, method in communication.METHODS.items():
    for measure in ('predicted', 'compiled'):
      stored = metrics[f'{measure}/communication/{name}']
      assert stored == method.cost.count()


def test_costs_are_formatted():
  costs = {n: str(m.cost) for n, m in communication.METHODS.items()}
  assert costs['v_pbgd'] == '3 x + (2 + T) y'
  assert costs['alright'] == 'y'
  assert costs['pbgd_free'] == 'x + 2 T y'
