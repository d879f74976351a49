"""Digests of programs, and refusals of another program in the same folder."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel_jax as bj
from experiments import harness
from experiments.harness.store import files, programs

X = jax.ShapeDtypeStruct((3,), jnp.float32)


def _scan(x, step=1.0):
  return jax.lax.scan(lambda c, _: (c * step, c), x, None, length=2)


@jax.custom_vjp
def _own(x):
  return x


_own.defvjp(lambda x: (x, None), lambda _, g: (2 * g,))


def test_a_digest_is_of_what_is_computed():
  """Not of names, of ways to write it, nor of addresses."""

  def renamed(argument):
    @jax.jit
    def inner(y):
      return jnp.sin(y)

    return inner(argument)

  same = [lambda x: jax.jit(jnp.sin)(x), renamed]
  assert len({programs.digest(fn, X) for fn in same}) == 1
  draw = lambda key: jax.random.normal(key, (2,))
  others = [
    (lambda x: x, X),
    (lambda x: 2 * x, X),
    (lambda x: 3 * x, X),
    (lambda x: x * np.float32([1, 2, 3]), X),
    (lambda x: x * np.float32([1, 2, 4]), X),
    (lambda x: x * jnp.arange(3.0), X),
    (lambda x, y: x - y, X, X),
    (lambda x, y: y - x, X, X),
    (lambda x: (x, x + 1), X),
    (lambda x: (x + 1, x), X),
    (_scan, X),
    (functools.partial(_scan, step=2.0), X),
    (lambda x: jax.lax.cond(x[0] > 0, jnp.sin, jnp.cos, x), X),
    (lambda x: jax.lax.cond(x[0] > 0, jnp.cos, jnp.sin, x), X),
    (jax.grad(lambda x: _own(x).sum()), X),
    (jax.grad(lambda x: x.sum()), X),
    (lambda x: x, jax.ShapeDtypeStruct((4,), jnp.float32)),
    (lambda x: x, jax.ShapeDtypeStruct((3,), jnp.int32)),
    (draw, jax.random.key(0)),
    (draw, jax.random.key(0, impl='rbg')),
    (lambda x: x @ jnp.ones((3, 2)), X),
    (lambda x: jnp.dot(x, jnp.ones((3, 2)), precision='highest'), X),
  ]
  digests = [programs.digest(*other) for other in others]
  assert len(set(digests)) == len(digests)
  assert digests == [programs.digest(*other) for other in others]


def _solver(scale=1.0, rate=0.1):
  loss = lambda params, batch: scale * jnp.sum((params - batch) ** 2)
  return optax.chain(bj.gradient(loss, name='loss'), optax.sgd(rate))


def _init(context, value=0.0):
  del context
  return jnp.full(2, value)


def _evaluate(context, params, state, scale=1.0):
  del context, state
  return {'score': scale * params.sum()}


DEFAULTS = {
  'solver': _solver,
  'init': _init,
  'batch': lambda context: jax.random.uniform(context.key, (2,)),
  'evaluate': _evaluate,
}


@pytest.fixture
def resume(train):
  """Resumes a run with changed functions."""
  return lambda steps=20, **changed: train(
    **{'steps': steps, 'seeds': 2, **DEFAULTS, **changed}
  )


@pytest.mark.parametrize(
  ('changed', 'part'),
  [
    ({'solver': lambda c: _solver(2.0)}, 'the step'),
    ({'solver': lambda c: _solver(rate=0.2)}, 'the step'),
    ({'init': functools.partial(_init, value=1.0)}, 'init'),
    ({'batch': lambda c: jax.random.normal(c.key, (2,))}, 'the step'),
    ({'evaluate': functools.partial(_evaluate, scale=2.0)}, 'evaluate'),
  ],
)
def test_another_program_is_named(resume, tmp_path, changed, part):
  first = {'solver': lambda c: _solver()}
  resume(10, **first)
  for steps in (10, 20):  # A finished run is refused as well.
    with pytest.raises(
      harness.OtherRunError, match=rf'the code of {part} has changed.*program'
    ):
      resume(steps, **first | changed)
  again = {'solver': lambda c: _solver(), 'init': functools.partial(_init)}
  # Neither new functions that compute the same, nor other numbers of steps,
  # nor members one by one.
  assert resume(20, **again, at_once=1).step == 20
  path = tmp_path / 'run' / 'program.json'
  path.unlink()  # What the message suggests, and what earlier versions wrote.
  assert resume(30, **first | changed).step == 30
  assert path.exists()


def test_another_version_refuses_nothing_and_is_named(resume, tmp_path, capsys):
  path = tmp_path / 'run' / 'program.json'
  first, other = ({'solver': lambda c, s=s: _solver(s)} for s in (1.0, 2.0))
  resume(10, **first)
  written = files.unseal(path.read_bytes())
  environment = written['environment'] | {'jax': '0.1'}
  path.write_text(files.seal(written | {'environment': environment}))
  capsys.readouterr()
  assert resume(20, **other).step == 20
  version = jax.__version__
  assert f'saved run (jax: 0.1 -> {version})' in capsys.readouterr().err
  with pytest.raises(harness.OtherRunError, match='the step'):
    resume(20, **first)


def test_a_stream_gives_shapes_without_its_batches(train):
  loss = lambda params, batch: jnp.mean(
    (params - batch['x'].sum(-1) - batch['n']) ** 2
  )
  rows = [{'x': np.ones(n % 3 + 1, np.float32), 'n': n} for n in range(12)]

  def run(steps, scale):
    scaled = lambda params, batch: scale * loss(params, batch)
    return train(
      solver=optax.chain(bj.gradient(scaled), optax.sgd(0.1)),
      init=lambda context: jnp.zeros(()),
      batch=None,
      evaluate=None,
      steps=steps,
      stream=harness.Stream(
        rows,
        2,
        lengths=[len(r['x']) for r in rows],
        buckets=(2, 3),
        pad={'x': 0},
      ),
    )

  run(10, 1.0)
  with pytest.raises(harness.OtherRunError, match='the step has changed'):
    run(20, 2.0)
  assert run(20, 1.0).step == 20


def test_a_damaged_record_of_the_program_is_put_aside(resume, tmp_path):
  first = {'solver': lambda c: _solver()}
  resume(10, **first)
  path = tmp_path / 'run' / 'program.json'
  path.write_text('{')
  with pytest.warns(RuntimeWarning, match=r'program.json is damaged .*moved'):
    resume(20, **first)
  assert files.unseal(path.read_bytes())
