"""Named solvers: compositions of public parts, a few lines each.

Which one when
--------------

In doubt, `v_pbgd`; for its settings, `bj.suggest` before a run and
`bj.diagnose` after it. Cost below is what one update evaluates: f and g stand
for a gradient of the upper and of the lower loss, H for a Hessian-vector
product of the lower loss, T for the steps of the sequence in the inner loop, U
for those of the upper variable, K for the products asked for, n for the
coordinates of the upper variable.

| solver | cost | error that stays | lower loss |
|---|---|---|---|
| `v_pbgd` | f + (2 + T) g | gap of order 1 / penalty^2 | PL, sets |
| `v_pbsgd` | f + (2 + T) g | the same, and noise / M | PL, sets, samples |
| `f2sa`, one loop | f + 2 g | x of order 1 / penalty | PL, sets |
| `f2sa`, two loops | (1 + T) (f + 2 g) | the same | strongly convex, sets |
| `alt_pbgd` | (1 + T) f + (2 + 2 T) g | the same | strongly convex, sets |
| `f2sa_p` | p (1 + T) (f + g) | order 1 / penalty^p | strongly convex, smooth |
| `pbgd_free` | (1 + T) f + T g | where f is not flat there | PL, sets |
| `seal` | f + g | of rows seen less often | a weighted mean of rows |
| `seal`, the full form | f + (1 + T) g | the same | the same |
| `pbrl` | f + (2 + T) g | gap of order 1 / penalty^2 | a decision process |
| `lv_hba` | f + 3 g | of order 1 / penalty | convex, inequalities |
| `bome` | f + (2 + T) g | of a short inner loop, of the step | PL, no sets |
| `forum` | M f + (2 + T) g | the same; M upper losses | the same |
| `g_pbgd` | f + g + H | slope of order 1 / penalty | convex, no sets |
| `prox_linear_pbgd` | f + g + (3 + 2 iterations) H | none | convex |
| `rhg` | f + T g + T H | of a short inner loop | any, sets |
| `aid_bilevel`, `aipod` | f + T g + K H | of K products | strongly convex |
| `e_aipod` | (1 + U) f + T g + K H | the same, of the step | the same |
| `t_rhg` | f + T g + K H | of the steps left out | strongly convex |
| `moml` | M f + T g + M T H | as `rhg`; M upper losses | any, sets |
| `meha` | f + 3 g | of order 1 / penalty | any, sets |
| `soba`, `ma_soba` | f + g + H | noise of the step | strongly convex |
| `fsla` | 3 f + 4 g + 3 H | noise of the step, less | strongly convex |
| `saba` | f + g + H, a table | none, on finite data | strongly convex |
| `srba` | 2 (f + g + H), at times more data | the same | the same |
| `amigo` | f + T g + K H | noise of the step | strongly convex |
| `stocbio`, `alset`, `mrbo` | f + T g + K H | of K products | strongly convex |
| `bsa`, `ttsa`, `sustain` | f + T g + K/2 H | of K products | strongly convex |
| `pzobo` | f + 2 T g | of few directions | any |
| `stable` | f + g + whole Hessians | noise | strongly convex, small |

- `v_pbgd`: the default. First-order, one loop, asks no convexity of the lower
  loss. The value sequence costs one more copy of the lower variable. The number
  of steps grows with the penalty.
- `v_pbsgd`: where each update sees new samples: inner steps that fall, a point
  drawn from them, and an outer batch of M samples whose size sets the noise
  that the penalty multiplies.
- `f2sa`: in two loops where the upper variable should take full steps at a
  large penalty, and the lower losses are strongly convex; in one loop it is the
  cheapest of all, from gradients at one point.
- `alt_pbgd`: the same two loops, one after the other. `f2sa_p`: p of them, with
  a bias that falls with the p-th power, where the losses are smooth.
- `pbgd_free`: the cheapest with a lower loop, for upper losses that are flat
  around the lower solutions, as in fine-tuning; else it ends elsewhere.
- `pbrl`: where the lower problem is a finite Markov decision process, in whose
  rewards or transitions the upper variable sits: `v_pbgd` with the steps of
  such processes, or the Bellman penalty.
- `lv_hba`: where the lower problem has inequality constraints.
- `bome`: where no penalty is known: the gap has to fall at a rate. Let the step
  sizes decay, and T grow with the condition of the lower loss.
- `g_pbgd`: where the lower loss is convex and a Hessian-vector product is
  cheap. No added sequence, no inner loop; its penalty squares the condition
  number, and it stays at lower stationary points that are no minimisers.
- `prox_linear_pbgd`: where the lower slope has to vanish, not nearly: a finite
  penalty is exact. Many Hessian-vector products, one batch an update.
- `rhg`: the gradient of a short training as it was run, of any optimiser, from
  a fixed start too; memory of T steps, or of their root with `checkpoint`. With
  `mode='forward'`, T n Hessian-vector products and the memory of n steps: for a
  few upper coordinates.
- `t_rhg`: `rhg` where T is large and only its end matters.
- `forum`, `moml`: several upper losses, that is multi-objective bilevel
  optimisation: `forum` is `bome` for these, first-order, and `moml` is `rhg`.
- `aid_bilevel`: where the lower loss is strongly convex and some Hessian-vector
  products an update are cheap: the hypergradient itself, no penalty to choose.
- `aipod`: the same where the variables satisfy linear equations.
- `e_aipod`: where projecting on these is dear, or is communication.
- `soba`: with noisy batches and a strongly convex lower loss, the first to try:
  one loop, no series; its steps have to fall. `ma_soba` rarely differs; `fsla`
  takes its directions in turn, with a correction of the upper one.
- `saba`: the same on finite data in fixed batches: converges with a constant
  step, for a table of the directions of all batches.
- `srba`: the same without a table, for a pass over all data in each period.
- `stocbio`, `alset`, `bsa`, `ttsa`: a truncated series leaves a bias that no
  steps take away; `amigo` starts the series where it ended, and leaves none.
- `sustain`, `mrbo`, `vrbo`: take noise off at twice the cost, but no bias.
- `pzobo`: no second derivatives; for upper variables of few numbers.
- `stsa`: any other coupled sequences, by their increments. `scgd`, `scsc`,
  `nasa`: compositions of expectations; `scsc` tracks them without lag.
- `alright`, `maxright`: no nesting, several losses with data of their own: a
  step on one of them, drawn by weights or with the largest gap, costs one.
- `seal`: which rows of a data set to keep: the upper variable is a score a row,
  of which an update reads and moves those of its batch alone.
- `a3c_td0`: an actor and a critic of asynchronous workers on a finite decision
  process; `bj.evaluation.delayed` delays any other method likewise.

Lower sets: with a set, the penalties by a slope are right only for minimisers
inside it; the value-gap ones and the unrolled ones hold at its boundary too.
Lower losses of many minimisers: the value gap picks the one best for the upper
loss; unrolled loops take the one that they run into.
"""

from bilevel_jax.solvers._a3c_td0 import a3c_td0
from bilevel_jax.solvers._aipod import aid_bilevel, aipod
from bilevel_jax.solvers._alright_maxright import alright, maxright
from bilevel_jax.solvers._bome import bome
from bilevel_jax.solvers._e_aipod import EAipodPlan, e_aipod, e_aipod_plan
from bilevel_jax.solvers._f2sa import f2sa
from bilevel_jax.solvers._f2sa_p import f2sa_p
from bilevel_jax.solvers._famo import FamoState, famo
from bilevel_jax.solvers._forum import forum
from bilevel_jax.solvers._fsla import fsla
from bilevel_jax.solvers._lv_hba import lv_hba
from bilevel_jax.solvers._meha import meha
from bilevel_jax.solvers._moco_plus import moco_plus
from bilevel_jax.solvers._moml import moml
from bilevel_jax.solvers._pbgd import g_pbgd, v_pbgd
from bilevel_jax.solvers._pbgd_free import alt_pbgd, pbgd_free
from bilevel_jax.solvers._pbrl import pbrl
from bilevel_jax.solvers._pbsgd import v_pbsgd
from bilevel_jax.solvers._prox_linear_pbgd import prox_linear_pbgd
from bilevel_jax.solvers._pzobo import pzobo
from bilevel_jax.solvers._rhg import rhg, t_rhg
from bilevel_jax.solvers._scgd_scsc_nasa import nasa, scgd, scsc
from bilevel_jax.solvers._seal import SealState, seal, seal_penalty
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
from bilevel_jax.solvers._stsa import power_schedule, stsa
from bilevel_jax.solvers._sustain import mrbo, sustain
from bilevel_jax.solvers._vrbo import vrbo

__all__ = [
  'EAipodPlan',
  'FamoState',
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
