"""Named solvers: compositions of public parts, a few lines each.

Which one when:

- `v_pbgd`: the default. First-order, one loop, asks no convexity of the lower
  loss. The value sequence costs one more copy of the lower variable.
- `g_pbgd`: where the lower loss is convex and a Hessian-vector product is
  cheap. No added sequence; its penalty is stiff where the curvature varies.
- `famo`: several objectives, and so many parameters that one backward pass an
  update is all there is time for.
"""

from bilevel_jax.solvers._famo import FamoState, famo
from bilevel_jax.solvers._pbgd import g_pbgd, v_pbgd

__all__ = ['FamoState', 'famo', 'g_pbgd', 'v_pbgd']
