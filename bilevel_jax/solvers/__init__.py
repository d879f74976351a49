"""Named solvers: compositions of public parts, a few lines each.

Which one when:

- `v_pbgd`: the default. First-order, one loop, asks no convexity of the lower
  loss. The value sequence costs one more copy of the lower variable.
- `g_pbgd`: where the lower loss is convex and a Hessian-vector product is
  cheap. No added sequence; its penalty is stiff where the curvature varies.
"""

from bilevel_jax.solvers._bome import bome
from bilevel_jax.solvers._compositional import nasa, scgd, scsc
from bilevel_jax.solvers._f2sa import f2sa
from bilevel_jax.solvers._pbgd import g_pbgd, v_pbgd
from bilevel_jax.solvers._pbsgd import v_pbsgd
from bilevel_jax.solvers._prox_linear import prox_linear_pbgd
from bilevel_jax.solvers._rhg import rhg, t_rhg
from bilevel_jax.solvers._soba import ma_soba, saba, soba
from bilevel_jax.solvers._stsa import power_schedule, stsa

__all__ = [
  'bome',
  'f2sa',
  'g_pbgd',
  'ma_soba',
  'nasa',
  'power_schedule',
  'prox_linear_pbgd',
  'rhg',
  'saba',
  'scgd',
  'scsc',
  'soba',
  'stsa',
  't_rhg',
  'v_pbgd',
  'v_pbsgd',
]
