"""Steps of other packages for JAX; see `serve`.

Each function makes a case and returns `run(steps)`. The problems are those of
our benchmark with the same name.
"""

import functools
import importlib
import sys
import types

import jax
import jax.numpy as jnp
import problems


def repeat(step, carry, *arguments):
  """Compiles a step with a donated carry, and repeats it."""
  state = [jax.tree.map(lambda z: jnp.array(z, copy=True), carry)]
  # Like `measure.Program`: a call of a jitted function costs more.
  lowered = jax.jit(step, donate_argnums=0).lower(state[0], *arguments)
  compiled = lowered.compile()

  def run(steps):
    for _ in range(steps):
      state[0] = compiled(state[0], *arguments)
    jax.block_until_ready(state[0])

  return run


def implicit_jaxopt(width, rows, products):
  """An implicit hypergradient by conjugate gradients."""
  import jaxopt

  lower, upper, y, x, batch = problems.digits(width, rows)
  optimality = lambda y, x, batch: jax.grad(lower, 1)(x, y, batch)
  solve = functools.partial(
    jaxopt.linear_solve.solve_cg, maxiter=products, tol=0.0
  )
  solution = jaxopt.implicit_diff.custom_root(optimality, solve=solve)(
    lambda y, x, batch: y
  )
  loss = lambda x, y, batch: upper(x, solution(y, x, batch), batch)
  step = lambda carry, y, batch: (carry[0], jax.grad(loss)(carry[0], y, batch))
  return repeat(step, (x, x), y, batch)


def unrolled_jaxopt(width, rows, steps, rate):
  """A hypergradient through steps of gradient descent."""
  import jaxopt

  lower, upper, y, x, batch = problems.digits(width, rows)
  solver = jaxopt.GradientDescent(
    lambda y, x, batch: lower(x, y, batch),
    stepsize=rate,
    maxiter=steps,
    tol=0.0,
    acceleration=False,
    implicit_diff=False,
    unroll=True,
    jit=True,
  )

  def loss(x, y, batch):
    return upper(x, solver.run(y, x, batch).params, batch)

  step = lambda carry, y, batch: (carry[0], jax.grad(loss)(carry[0], y, batch))
  return repeat(step, (x, x), y, batch)


def projection(name, size, options):
  """Projects the last result plus a fixed shift by jaxopt."""
  import jaxopt

  project = getattr(jaxopt.projection, f'projection_{name}')
  options = [jnp.asarray(z, jnp.float32) for z in options]
  start = jax.random.normal(jax.random.key(0), (size,))
  if len(options) > 1:
    options = [tuple(options)]
  step = lambda z, shift: project(z + shift, *options)
  return repeat(step, start, start)


def bilevel_benchmark(folder, solver, form, size, batch_size, steps):
  """Scans steps of a solver of benchmark_bilevel.

  Args:
    folder: folder of the clone.
    solver: module of the solver.
    form: 'dense' or 'factorised' Hessians of samples.
    size: size of each variable.
    batch_size: samples in each of 16 batches.
    steps: steps in a compiled scan.
  """
  stub_benchopt()
  sys.path.insert(0, folder)
  module = importlib.import_module(f'solvers.{solver}')
  upper, lower, (x, y) = problems.quadratics(form, size, batch_size)

  def flat(loss):
    # These losses take the inner variable first, and the index of a sample.
    return lambda y, x, start, batch_size: loss(x, y, start // batch_size)

  one = module.Solver()
  for name, values in one.parameters.items():
    setattr(one, name, values[0])
  one.batch_size = batch_size
  samples = problems.BATCHES * batch_size
  one.run_once = lambda *_: None
  one.set_objective(flat(lower), flat(upper), samples, samples, y, x)
  state = [one.init()]
  pair = isinstance(state[0], tuple)  # SABA has a table and a carry.

  def run(count):
    for _ in range(count):
      if pair:
        memory, carry = state[0]
        state[0] = one.one_epoch(carry, memory, steps)
      else:
        state[0] = one.one_epoch(state[0], steps)
    jax.block_until_ready(state[0])

  return run


def stub_benchopt():
  """Defines the three names that the solvers import from benchopt.

  They serve a command line, and compute nothing.
  """

  class Context:
    def __enter__(self):
      return self

    def __exit__(self, *error):
      return False

  class Anything:
    def __init__(self, *args, **kwargs):
      pass

  package = types.ModuleType('benchopt')
  package.BaseSolver = Anything
  package.safe_import_context = Context
  stopping = types.ModuleType('benchopt.stopping_criterion')
  stopping.SufficientProgressCriterion = Anything
  sys.modules |= {
    'benchopt': package,
    'benchopt.stopping_criterion': stopping,
  }


def ppo(folder, env, environments, steps, updates):
  """Runs PPO of purejaxrl with one epoch and one minibatch.

  Args:
    folder: folder of the clone.
    env: name of a gymnax environment.
    environments: number of parallel environments.
    steps: steps of each environment in an update.
    updates: updates in a compiled run.
  """
  # The wrappers of other environments import unused packages.
  for name in ('brax', 'brax.envs', 'brax.envs.wrappers', 'navix'):
    sys.modules[name] = types.ModuleType(name)
  sys.modules['brax'].envs = sys.modules['brax.envs']
  training = types.ModuleType('brax.envs.wrappers.training')
  training.EpisodeWrapper = training.AutoResetWrapper = object
  sys.modules[training.__name__] = training
  sys.path.insert(0, f'{folder}/purejaxrl')
  module = importlib.import_module('ppo')
  train = jax.jit(
    module.make_train(
      {
        'LR': 1e-3,
        'NUM_ENVS': environments,
        'NUM_STEPS': steps,
        'TOTAL_TIMESTEPS': updates * environments * steps,
        'UPDATE_EPOCHS': 1,
        'NUM_MINIBATCHES': 1,
        'GAMMA': 0.99,
        'GAE_LAMBDA': 0.95,
        'CLIP_EPS': 0.2,
        'ENT_COEF': 0.01,
        'VF_COEF': 0.5,
        'MAX_GRAD_NORM': 0.5,
        'ACTIVATION': 'tanh',
        'ENV_NAME': env,
        'ANNEAL_LR': False,
      }
    )
  )

  def run(count):
    for seed in range(count):
      jax.block_until_ready(train(jax.random.PRNGKey(seed)))

  return run
