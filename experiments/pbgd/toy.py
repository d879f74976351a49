"""Non-convex toy problem: accuracy and cost over the penalty.

Paper: Shen and Chen, On Penalty-based Bilevel Gradient Descent Method, 2023.

    python -m experiments.pbgd.toy --preset=quick --workdir=runs/toy

Expected: all starts end at a local minimum; the gap falls with the power -2.2
of the penalty and steps grow with the power 0.95. Time: 10 seconds on 2 cores.

The lower loss is not convex; its minimisers are y = -x, with value 0. From
1,000 random starts, penalised descent ends near the local minima of the upper
loss on that line. The gap of the lower loss falls with the square of the
penalty, and the number of steps grows in proportion to it. Three solvers:

- `known_value`, as published: the minimum of the lower loss is known to be 0,
  so the lower loss itself is the penalty. The headline numbers.
- `v_pbgd`, the library's solver: a value sequence tracks the minimum.
- `g_pbgd`, in the preset `paper`: the penalty is half the squared lower
  gradient norm, which has a larger curvature, so its step size is 30 times
  smaller. Many starts end at x = 3, where that norm has a nonzero minimum.

All starts run in parallel, in float64, each until its projected gradient is
small. The run takes less than a minute and writes no checkpoints.
"""

import dataclasses
import functools
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel_jax as bj
from experiments import harness
from experiments.pbgd import toy_figure, toy_problem

SOLVERS = ('known_value', 'v_pbgd', 'g_pbgd')
HEADLINE = 'known_value'


@dataclasses.dataclass(frozen=True)
class Settings:
  """Settings of a run; published values unless marked as not published.

  Attributes:
    solvers: solvers to run; the paper has `known_value`.
    penalties: penalties of the sweep, ascending.
    headline_penalty: penalty whose end points are judged and drawn.
    fit_from: smallest penalty in the fit of the exponents; not published.
    starts: number of starts per seed.
    step: step size times penalty.
    tolerance: a start stops when the norm of its projected gradient
      (displacement over step size) is at most this.
    max_steps: maximum number of steps; not published.
    near: largest distance of x and y to a minimum that counts as reached; not
      published.
    seeds: number of seeds of the starts.
  """

  solvers: tuple[str, ...] = ('known_value', 'v_pbgd')
  penalties: Annotated[tuple[float, ...], harness.Allowed(1)] = (
    5.0,
    10.0,
    20.0,
    50.0,
    100.0,
  )
  headline_penalty: float = 10.0
  fit_from: float = 10.0
  starts: int = 1_000
  step: float = 0.1
  tolerance: float = 1e-5
  max_steps: int = 200_000
  near: float = 0.05
  seeds: int = 1


PRESETS = {
  'quick': Settings(),
  'paper': Settings(solvers=SOLVERS),
  'smoke': Settings(solvers=(HEADLINE,), starts=200),
}


class Ends(NamedTuple):
  """End points of one solver and penalty, with a leading axis of starts.

  Attributes:
    params: final params.
    steps: number of steps.
    slope: norm of the projected gradient.
    gap: lower loss minus its minimum.
  """

  params: bj.BilevelParams
  steps: Any
  slope: Any
  gap: Any


def known_value(
  problem: bj.BilevelProblem, **settings: Any
) -> optax.GradientTransformationExtraArgs:
  """V-PBGD for a lower loss whose minimum is 0 for each x.

  Args:
    problem: the upper and the lower loss.
    **settings: penalty, upper and lower, as for `bj.v_pbgd`.

  Returns:
    A solver for `BilevelParams`.
  """

  def losses(params, batch):
    return jnp.stack([loss(*params, batch) for loss in problem[:2]])

  def rows(params, batch, inner):
    jacobian = bj.Jacobian(jax.jacrev(losses)(params, batch))
    return tuple(losses(params, batch)), jacobian, inner

  penalised = optax.chain(
    bj.oracle(rows, ('upper', 'lower')),
    bj.aggregators.scale_by_penalty(settings['penalty']),
  )
  return bj.descend(penalised, upper=settings['upper'], lower=settings['lower'])


def make_solver(name: str, penalty: float, step: float):
  """Makes a solver by name.

  Args:
    name: one of `SOLVERS`.
    penalty: weight of the penalty, at least 1.
    step: step size times penalty.

  Returns:
    The solver, and the step size of the gradient of f + penalty * p.
  """
  # The library's solvers divide the gradient by the penalty.
  rate = step / 30 if name == 'g_pbgd' else step
  sgd = optax.sgd(rate)
  make = {
    'known_value': known_value,
    'v_pbgd': functools.partial(bj.v_pbgd, value=sgd),
    'g_pbgd': bj.g_pbgd,
  }[name]
  solver = make(
    toy_problem.PROBLEM,
    penalty=penalty,
    upper=bj.Sequence(sgd, set=toy_problem.UPPER_SET),
    lower=sgd,
  )
  return solver, rate / penalty


def descend(
  name: str, penalty: float, starts: bj.BilevelParams, settings: Settings
) -> Ends:
  """Runs all starts until they stop, as one compiled program.

  Args:
    name: one of `SOLVERS`.
    penalty: weight of the penalty.
    starts: initial params, with a leading axis of starts.
    settings: provides `step`, `tolerance` and `max_steps`.

  Returns:
    The `Ends`.
  """
  solver, step_size = make_solver(name, penalty, settings.step)

  def unfinished(carry):
    _, _, steps, slope = carry
    return (slope > settings.tolerance) & (steps < settings.max_steps)

  def step(carry):
    params, state, steps, _ = carry
    updates, state = solver.update(None, state, params)
    slope = optax.tree.norm(updates) / step_size
    return optax.apply_updates(params, updates), state, steps + 1, slope

  def one(params):
    first = (params, solver.init(params), 0, jnp.full_like(params.upper, 1e9))
    params, _, steps, slope = jax.lax.while_loop(unfinished, step, first)
    return Ends(params, steps, slope, toy_problem.lower_loss(*params))

  return jax.device_get(jax.jit(jax.vmap(one))(starts))


def exponent(penalties: Any, values: Any, fit_from: float) -> float:
  """Least-squares slope of log value over log penalty."""
  penalties, values = np.asarray(penalties), np.asarray(values)
  used = penalties >= fit_from
  slope, _ = np.polyfit(np.log(penalties[used]), np.log(values[used]), 1)
  return float(slope)


def summarise(
  ends: dict[str, dict[float, Ends]], minima: np.ndarray, settings: Settings
) -> harness.Results:
  """Collects metrics of all solvers.

  Args:
    ends: end points by solver and penalty.
    minima: local minima of the reduced loss, the global one first.
    settings: settings of the run.

  Returns:
    Metrics by solver and penalty, and exponents by solver.
  """
  results = harness.Results()
  for solver, by_penalty in ends.items():
    for penalty, end in by_penalty.items():
      distances = toy_problem.distances_to(minima, end.params)
      near = distances <= settings.near
      results.add(
        {'solver': solver, 'penalty': penalty},
        steps=np.mean(end.steps),
        gap=np.mean(end.gap),
        fraction_done=np.mean(end.slope <= settings.tolerance),
        fraction_at_minima=np.mean(near.any(axis=1)),
        fraction_at_global_minimum=np.mean(near[:, 0]),
        largest_distance=np.max(distances.min(axis=1)),
      )
    for metric in ('steps', 'gap'):
      means = [np.mean(getattr(end, metric)) for end in by_penalty.values()]
      power = exponent(list(by_penalty), means, settings.fit_from)
      results.put({'solver': solver}, {f'{metric}_exponent': power})
      results.note({'solver': solver, 'penalty': 'exponent'}, {metric: power})
  return results


def columns(settings: Settings) -> list[harness.Column]:
  """Columns of the table."""
  return [
    harness.Column(measure, title)
    for measure, title in (
      ('steps', 'mean steps'),
      ('gap', 'mean gap'),
      ('fraction_done', 'done'),
      ('fraction_at_minima', f'within {settings.near:g} of a minimum'),
      ('fraction_at_global_minimum', 'of the global one'),
      ('largest_distance', 'largest distance'),
    )
  ]


def check(settings: Settings) -> None:
  """Raises SettingsError for invalid settings."""
  for solver in settings.solvers:
    if solver not in SOLVERS:
      raise harness.SettingsError(
        f'solvers are {", ".join(SOLVERS)}, got {solver!r}.'
      )
  if settings.headline_penalty not in settings.penalties:
    raise harness.SettingsError(
      f'headline_penalty={settings.headline_penalty:g} is not among the '
      f'penalties {settings.penalties}.'
    )
  if sum(p >= settings.fit_from for p in settings.penalties) < 2:
    raise harness.SettingsError(
      'an exponent needs at least two penalties from fit_from up.'
    )


def run(
  settings: Settings, seeds: tuple[int, ...]
) -> tuple[bj.BilevelParams, dict[str, dict[float, Ends]]]:
  """Runs all solvers and penalties from the same starts.

  Args:
    settings: settings of the run.
    seeds: seeds of the starts.

  Returns:
    The starts, and the end points by solver and penalty.
  """
  with jax.enable_x64(True):
    starts = toy_problem.draw_starts(seeds, settings.starts)
    ends = {
      name: {
        penalty: descend(name, penalty, starts, settings)
        for penalty in settings.penalties
      }
      for name in settings.solvers
    }
    return jax.device_get(starts), ends


def main(options: harness.Options) -> harness.Report:
  """Runs the sweep."""
  settings = options.settings
  starts, ends = run(settings, options.seeds)
  minima = toy_problem.local_minima()
  results = summarise(ends, minima, settings)
  drawn = HEADLINE if HEADLINE in ends else settings.solvers[0]
  drawn_ends = ends[drawn][settings.headline_penalty].params
  distances = toy_problem.distances_to(minima, drawn_ends)
  reached = distances.min(axis=1) <= settings.near
  figure = toy_figure.draw(
    starts=starts,
    ends=drawn_ends,
    basins=np.where(reached, distances.argmin(axis=1), -1),
    minima=minima,
    results=results,
    settings=settings,
  )
  return harness.Report(
    results,
    rows=('solver', 'penalty'),
    columns=columns(settings),
    plots={'toy.png': figure},
    more={'minima': minima, 'drawn': drawn},
  )


STUDY = harness.Study(main, PRESETS, check=check)


if __name__ == '__main__':
  harness.run(STUDY)
