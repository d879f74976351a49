"""Nested, multi-objective and coupled optimisation, as optax transformations.

A solver evaluates oracles in order and moves each sequence by its own record:
see `descend`. A solver's `update` takes a batch where optax's takes gradients.

The most used names are here. The others are in `bj.aggregators`,
`bj.diagnostics`, `bj.evaluation` (wrappers of oracles), `bj.linear_solvers`,
`bj.losses` (for sequence models), `bj.oracles`, `bj.parts` (the types of
oracles and solvers), `bj.projections`, `bj.rl`, `bj.solvers`, `bj.states` and
`bj.types`. To write your own methods, use `bj.checks` for arguments and
`bj.testing` for tests.
"""

from bilevel_jax import (
  aggregators,
  checks,
  diagnostics,
  evaluation,
  linear_solvers,
  losses,
  oracles,
  parts,
  projections,
  rl,
  solvers,
  states,
  testing,
  types,
)
from bilevel_jax._sequences import apply_updates
from bilevel_jax.descent import descend
from bilevel_jax.diagnostics import (
  auxiliaries,
  check_finite,
  counts,
  diagnose,
  hypergradient,
  outputs,
  suggest,
  values,
)
from bilevel_jax.oracles import (
  compositional,
  coupled,
  gradient,
  gradient_norm,
  implicit,
  implicit_directions,
  lower_gradient,
  multi_objective,
  oracle,
  prox_linear,
  unrolled,
  value_gap,
)
from bilevel_jax.solvers import (
  aid_bilevel,
  aipod,
  bome,
  e_aipod,
  f2sa,
  g_pbgd,
  meha,
  rhg,
  saba,
  soba,
  stsa,
  t_rhg,
  v_pbgd,
)
from bilevel_jax.types import (
  BilevelParams,
  BilevelProblem,
  Jacobian,
  Sequence,
  sequences,
)

__version__ = '0.1.0'

__all__ = [
  'BilevelParams',
  'BilevelProblem',
  'Jacobian',
  'Sequence',
  'aggregators',
  'aid_bilevel',
  'aipod',
  'apply_updates',
  'auxiliaries',
  'bome',
  'check_finite',
  'checks',
  'compositional',
  'counts',
  'coupled',
  'descend',
  'diagnose',
  'diagnostics',
  'e_aipod',
  'evaluation',
  'f2sa',
  'g_pbgd',
  'gradient',
  'gradient_norm',
  'hypergradient',
  'implicit',
  'implicit_directions',
  'linear_solvers',
  'losses',
  'lower_gradient',
  'meha',
  'multi_objective',
  'oracle',
  'oracles',
  'outputs',
  'parts',
  'projections',
  'prox_linear',
  'rhg',
  'rl',
  'saba',
  'sequences',
  'soba',
  'solvers',
  'states',
  'stsa',
  'suggest',
  't_rhg',
  'testing',
  'types',
  'unrolled',
  'v_pbgd',
  'value_gap',
  'values',
]
