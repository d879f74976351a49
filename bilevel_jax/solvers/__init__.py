"""Named solvers: compositions of public parts, a few lines each.

Which one when:

- `v_pbgd`: the default. First-order, one loop, asks no convexity of the lower
  loss. The value sequence costs one more copy of the lower variable.
- `g_pbgd`: where the lower loss is convex and a Hessian-vector product is
  cheap. No added sequence; its penalty is stiff where the curvature varies.
"""

from bilevel_jax.solvers._pbgd import g_pbgd, v_pbgd

__all__ = ['g_pbgd', 'v_pbgd']
