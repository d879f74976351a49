"""Checks of arguments for your own methods, with the library's messages.

Schedules and traced numbers pass: their values are known only at the call.
"""

from bilevel_jax._checks import former_names, preferences, whole_number, within
from bilevel_jax._keys import as_key

__all__ = ['as_key', 'preferences', 'whole_number', 'within']
__getattr__ = former_names(__name__, whole=whole_number)
