"""Named solvers: compositions of public parts, a few lines each.

Which one when:

- `v_pbgd`: the default. First-order, one loop, asks no convexity of the lower
  loss. The value sequence costs one more copy of the lower variable.
- `g_pbgd`: where the lower loss is convex and a Hessian-vector product is
  cheap. No added sequence; its penalty is stiff where the curvature varies.
- `aid_bilevel`: where the lower loss is strongly convex and some Hessian-vector
  products a step are cheap. The hypergradient itself, no penalty to choose.
- `aipod`: the same where the variables satisfy linear equations.
- `e_aipod`: where projecting on these is dear, or is communication.
"""

from bilevel_jax.solvers._aid import aid_bilevel, aipod
from bilevel_jax.solvers._e_aipod import EAipodPlan, e_aipod, e_aipod_plan
from bilevel_jax.solvers._pbgd import g_pbgd, v_pbgd

__all__ = [
  'EAipodPlan',
  'aid_bilevel',
  'aipod',
  'e_aipod',
  'e_aipod_plan',
  'g_pbgd',
  'v_pbgd',
]
