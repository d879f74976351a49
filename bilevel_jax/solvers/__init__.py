"""Named solvers, composed of public parts.

How to choose
-------------

By default, use `v_pbgd`, with `bj.suggest` for its settings before a run and
`bj.diagnose` after it. The cost is that of one update: f and g are a gradient
of the upper and of the lower loss, H is a Hessian-vector product of the lower
loss, T the steps of the inner loop, U the steps of the upper variable, K the
products of the linear solver, M the number of upper losses.

| solver | cost | remaining error | lower loss | |---|---|---|---| | `v_pbgd` |
f + (2 + T) g | gap of order 1 / penalty^2 | PL, sets | | `v_pbsgd` | f + (2 +
T) g | the same, and noise / samples | PL, sets | | `f2sa`, one loop | f + 2 g |
order 1 / penalty in x | PL, sets | | `f2sa`, two loops | (1 + T) (f + 2 g) |
the same | strongly convex, sets | | `alt_pbgd` | (1 + T) f + (2 + 2 T) g | the
same | strongly convex, sets | | `f2sa_p` | p (1 + T) (f + g) | order 1 /
penalty^p | strongly convex, smooth | | `pbgd_free` | (1 + T) f + T g | large
unless f is flat in y | PL, sets | | `seal` | f + g | of rows with fewer visits
| a weighted mean of rows | | `seal`, the full form | f + (1 + T) g | the same |
the same | | `pbrl` | f + (2 + T) g | gap of order 1 / penalty^2 | a decision
process | | `lv_hba` | f + 3 g | of order 1 / penalty | convex, inequalities | |
`bome` | f + (2 + T) g | of the inner loop and the step size | PL, no sets | |
`forum` | M f + (2 + T) g | the same | the same | | `g_pbgd` | f + g + H | slope
of order 1 / penalty | convex, no sets | | `prox_linear_pbgd` | f + g + (3 + 2
iterations) H | none | convex | | `rhg` | f + T g + T H | of the inner loop |
any, sets | | `aid_bilevel`, `aipod` | f + T g + K H | of K products | strongly
convex | | `e_aipod` | (1 + U) f + T g + K H | the same, and of the step size |
the same | | `t_rhg` | f + T g + K H | of the omitted steps | strongly convex |
| `moml` | M f + T g + M T H | of the inner loop | any, sets | | `meha` | f + 3
g | of order 1 / penalty | any, sets | | `soba`, `ma_soba` | f + g + H | noise |
strongly convex | | `fsla` | 3 f + 4 g + 3 H | less noise | strongly convex | |
`saba` | f + g + H, a table | none, on finite data | strongly convex | | `srba`
| 2 (f + g + H), all data per period | the same | the same | | `amigo` | f + T g
+ K H | noise | strongly convex | | `stocbio`, `alset`, `mrbo` | f + T g + K H |
of K products | strongly convex | | `bsa`, `ttsa`, `sustain` | f + T g + K/2 H |
of K products | strongly convex | | `pzobo` | f + 2 T g | of few directions |
any | | `stable` | f + g + full Hessians | noise | strongly convex, small |

- `v_pbgd`: the default. First-order, one loop; the lower loss need not be
  convex. The value sequence costs one copy of the lower variable. The number of
  steps grows with the penalty. Retrain the lower variable before you report a
  result.
- `v_pbsgd`: for new samples in each update. It has decreasing inner steps with
  a random stop, and an outer batch whose size determines the noise that the
  penalty multiplies.
- `f2sa`: with two loops, the upper variable takes full steps at a large
  penalty, for strongly convex lower losses. With one loop it is the cheapest
  solver, with gradients at one point.
- `alt_pbgd`: the same two loops for any number of steps. `f2sa_p`: p loops,
  with a bias that falls with the p-th power, for smooth losses.
- `pbgd_free`: the cheapest solver with a lower loop, for upper losses that are
  flat around the lower solutions, as in fine-tuning; it is wrong for others.
- `pbrl`: for a lower finite Markov decision process whose rewards or
  transitions depend on the upper variable: `v_pbgd` with policy mirror descent,
  or the Bellman penalty.
- `lv_hba`: for inequality constraints on the lower variable.
- `bome`: needs no penalty; the gap falls at a given rate. Let the step sizes
  decrease, and T grow with the condition number of the lower loss.
- `g_pbgd`: for convex lower losses with cheap Hessian-vector products. No added
  sequence and no inner loop. The penalty squares the condition number, and it
  can stop at lower stationary points that are not minimisers.
- `prox_linear_pbgd`: for a lower slope of exactly zero with a finite penalty,
  by many Hessian-vector products and one batch per update.
- `rhg`: the gradient of a short training with any optimiser, also from a fixed
  start, with the memory of T steps, or of their root with `checkpoint`. With
  `mode='forward'`, n upper coordinates take T n Hessian-vector products and the
  memory of n steps.
- `t_rhg`: `rhg` through the last steps, for large T.
- `forum`, `moml`: for several upper losses. `forum` is a first-order method
  like `bome`, `moml` unrolls like `rhg`.
- `aid_bilevel`: for strongly convex lower losses with cheap Hessian-vector
  products. It approximates the hypergradient and needs no penalty.
- `aipod`: the same with linear equations of the variables.
- `e_aipod`: the same for expensive projections, for instance communication.
- `soba`: the first choice for noisy batches and strongly convex lower losses:
  one loop without a series, with decreasing steps. `ma_soba` rarely differs;
  `fsla` moves the sequences in turn and corrects the upper direction.
- `saba`: the same for finite data in fixed batches. It converges with constant
  steps and needs a table of the directions of all batches.
- `srba`: the same without a table, but a pass over all data in each period.
- `stocbio`, `alset`, `bsa`, `ttsa`: a truncated series leaves a constant bias;
  `amigo` continues the series and has no such bias.
- `sustain`, `mrbo`, `vrbo`: reduce noise, but not bias, at twice the cost.
- `pzobo`: without second derivatives, for upper variables of few numbers.
- `stsa`: for other coupled sequences, by their increments. `scgd`, `scsc`,
  `nasa`: for compositions of expectations; `scsc` tracks them without lag.
- `alright`, `maxright`: for several losses without nesting. Each update takes a
  step on one loss, drawn by weights or with the largest gap.
- `seal`: for data selection. The upper variable is a score for each row; an
  update moves the scores of its batch.
- `a3c_td0`: for an actor and a critic of asynchronous workers on a finite
  decision process; `bj.evaluation.delayed` delays any other method.

Lower sets: penalties on the slope are right only for minimisers in the interior
of the set; value-gap and unrolled methods are right at its boundary too. If the
lower loss has many minimisers, the value gap selects the best one for the upper
loss, and unrolled loops take the one to which they converge.
"""

from bilevel_jax import _checks
from bilevel_jax.solvers._a3c_td0 import a3c_td0
from bilevel_jax.solvers._aipod import aid_bilevel, aipod
from bilevel_jax.solvers._alright_maxright import alright, maxright
from bilevel_jax.solvers._bome_forum import bome, forum
from bilevel_jax.solvers._e_aipod import EAipodPlan, e_aipod, e_aipod_plan
from bilevel_jax.solvers._f2sa_alt_pbgd import alt_pbgd, f2sa
from bilevel_jax.solvers._f2sa_p import f2sa_p
from bilevel_jax.solvers._famo import FamoState, famo
from bilevel_jax.solvers._fsla import fsla
from bilevel_jax.solvers._lv_hba import Multipliers, lv_hba
from bilevel_jax.solvers._meha import meha
from bilevel_jax.solvers._moco_plus import moco_plus
from bilevel_jax.solvers._moml import moml
from bilevel_jax.solvers._pbgd import g_pbgd, v_pbgd
from bilevel_jax.solvers._pbgd_free import pbgd_free
from bilevel_jax.solvers._pbrl import PolicyGap, pbrl
from bilevel_jax.solvers._pbsgd import RandomStop, v_pbsgd
from bilevel_jax.solvers._prox_linear_pbgd import prox_linear_pbgd
from bilevel_jax.solvers._pzobo import pzobo
from bilevel_jax.solvers._rhg import rhg, t_rhg
from bilevel_jax.solvers._scgd_scsc_nasa import nasa, scgd, scsc
from bilevel_jax.solvers._schedules import power_schedule, seal_penalty
from bilevel_jax.solvers._seal import RowScores, SealState, seal
from bilevel_jax.solvers._soba import ma_soba, saba, soba
from bilevel_jax.solvers._srba import srba
from bilevel_jax.solvers._stable import stable
from bilevel_jax.solvers._stocbio_and_relatives import (
  alset,
  amigo,
  bsa,
  stocbio,
  ttsa,
)
from bilevel_jax.solvers._stsa import stsa
from bilevel_jax.solvers._sustain import mrbo, sustain
from bilevel_jax.solvers._vrbo import vrbo

__all__ = [
  'EAipodPlan',
  'FamoState',
  'Multipliers',
  'PolicyGap',
  'RandomStop',
  'RowScores',
  'SealState',
  'a3c_td0',
  'aid_bilevel',
  'aipod',
  'alright',
  'alset',
  'alt_pbgd',
  'amigo',
  'bome',
  'bsa',
  'e_aipod',
  'e_aipod_plan',
  'f2sa',
  'f2sa_p',
  'famo',
  'forum',
  'fsla',
  'g_pbgd',
  'lv_hba',
  'ma_soba',
  'maxright',
  'meha',
  'moco_plus',
  'moml',
  'mrbo',
  'nasa',
  'pbgd_free',
  'pbrl',
  'power_schedule',
  'prox_linear_pbgd',
  'pzobo',
  'rhg',
  'saba',
  'scgd',
  'scsc',
  'seal',
  'seal_penalty',
  'soba',
  'srba',
  'stable',
  'stocbio',
  'stsa',
  'sustain',
  't_rhg',
  'ttsa',
  'v_pbgd',
  'v_pbsgd',
  'vrbo',
]

# Every solver explains the replacement of its former argument `wrap`.
_SCHEDULES = ('e_aipod_plan', 'power_schedule', 'seal_penalty')
_without_wrap = _checks.removed(wrap='bj.evaluation.wrapped(solver, wrapper)')
globals().update(
  {
    name: _without_wrap(globals()[name])
    for name in __all__
    if name.islower() and name not in _SCHEDULES
  }
)
