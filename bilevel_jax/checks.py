"""Checks of arguments for methods of your own, in the library's words.

What is known only at the call, a schedule or a traced number, passes.
"""

from bilevel_jax._checks import preferences, whole, within
from bilevel_jax._keys import as_key

__all__ = ['as_key', 'preferences', 'whole', 'within']
