"""A non-convex toy in two dimensions: how good, and how costly, a penalty is.

Paper: Shen and Chen, On Penalty-based Bilevel Gradient Descent Method, 2023.

    python -m experiments.pbgd.toy --preset=quick --workdir=runs/toy

Expected: all starts end at a local minimum; the gap falls with the power -2.2
of the penalty and steps grow with the power 0.95. Time: 10 seconds on 2 cores.

The lower loss is not convex, but its only minimisers are y = -x, with the
value 0. From a thousand random starts, penalised descent ends near the local
minima of the upper loss on that line; the lower loss stays short of its minimum
by a gap that falls with the square of the penalty, at a number of steps that
grows with the penalty. Three solvers:

- `known_value`, as published: the lower loss's minimum is known to be 0, so the
  lower loss itself is the penalty. The headline numbers.
- `v_pbgd`, the library's solver: the minimum is followed by a value sequence.
- `g_pbgd`, in the preset `paper`: half the squared slope is the penalty, with a
  thirtieth of the step size, because that penalty is more curved. From many
  starts it ends where the slope is least without being 0, at x = 3.

All starts run at once, in float64, each until its projected gradient is small.
It takes less than a minute and keeps no checkpoints: the same command starts
again.
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
  """Settings of a run; those of the paper unless said.

  Attributes:
    solvers: which of `SOLVERS`; the paper has `known_value`.
    penalties: the sweep, ascending.
    headline_penalty: the one whose end points are judged and drawn.
    fit_from: exponents are fitted to this penalty and larger ones; ours.
    starts: for each seed.
    step: step size times penalty, with which the step shrinks.
    tolerance: a start is done when the norm of its projected gradient, that is
      its displacement over the step size, is at most this.
    max_steps: when to give up; ours.
    near: how far each of x and y may be from a minimum to have reached it;
      ours.
    seeds: of the starts.
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
  """Where the starts of one solver and penalty went; a leading axis of starts.

  Attributes:
    params: where they stopped.
    steps: after how many steps.
    slope: norm of the projected gradient there.
    gap: lower loss above its minimum there.
  """

  params: bj.BilevelParams
  steps: Any
  slope: Any
  gap: Any


def known_value(
  problem: bj.BilevelProblem, **settings: Any
) -> optax.GradientTransformationExtraArgs:
  """V-PBGD where the lower loss's minimum is known to be 0 for each x.

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
  """A solver by name, and its step size.

  Args:
    name: one of `SOLVERS`.
    penalty: its weight, at least 1.
    step: step size times penalty.

  Returns:
    The solver, and the step size of the gradient of f + penalty * p.
  """
  # The library divides the gradient by the penalty; no need to do so here.
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
  """Runs all starts to their ends, compiled as a whole.

  Args:
    name: one of `SOLVERS`.
    penalty: its weight.
    starts: with a leading axis.
    settings: step, tolerance and max_steps.

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
  """Slope of the line of least squares through log value and log penalty."""
  penalties, values = np.asarray(penalties), np.asarray(values)
  used = penalties >= fit_from
  slope, _ = np.polyfit(np.log(penalties[used]), np.log(values[used]), 1)
  return float(slope)


def summarise(
  ends: dict[str, dict[float, Ends]], minima: np.ndarray, settings: Settings
) -> harness.Results:
  """The numbers of all solvers.

  Args:
    ends: by solver and penalty.
    minima: of the reduced loss, the global one first.
    settings: of the run.

  Returns:
    Numbers by solver and penalty, and exponents by solver.
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
    for what in ('steps', 'gap'):
      means = [np.mean(getattr(end, what)) for end in by_penalty.values()]
      power = exponent(list(by_penalty), means, settings.fit_from)
      results.put({'solver': solver}, {f'{what}_exponent': power})
      results.note({'solver': solver, 'penalty': 'exponent'}, {what: power})
  return results


def columns(settings: Settings) -> list[harness.Column]:
  """Those of the table."""
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
  """Raises SettingsError for settings that no run can have."""
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
      'an exponent needs two penalties from fit_from on.'
    )


def run(
  settings: Settings, seeds: tuple[int, ...]
) -> tuple[bj.BilevelParams, dict[str, dict[float, Ends]]]:
  """Runs all solvers and penalties from the same starts.

  Args:
    settings: of the run.
    seeds: of the starts.

  Returns:
    The starts, and the ends by solver and penalty.
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


STUDY = harness.Study(main, PRESETS, paper='pbgd', binary='toy', check=check)


if __name__ == '__main__':
  harness.run(STUDY)
