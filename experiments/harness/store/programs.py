"""Digests of programs: of what they compute, not of their text.

A digest of the sources would refuse a run after each edit of a comment or of a
plot, and a digest of the lowered program after each upgrade of jax, and on
other devices. So the digest is of the jaxpr: primitives, shapes and constants.
It ignores names, and is compared only under the same versions and devices.
"""

import hashlib
import importlib.metadata
import math
import pathlib
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np
from jax.extend import core

import bilevel_jax
from experiments.harness.app import errors
from experiments.harness.store import files, identity

# Params of primitives on which no result depends: their names or last words.
_IGNORED = ('name', 'mesh', 'sharding', 'shardings', 'layout', 'layouts')
# Packages whose functions are traced, or compute constants.
_PACKAGES = ('jax', 'jaxlib', 'optax', 'flax', 'gymnax', 'numpy')
_PLAIN = (type(None), bool, int, float, complex, str, bytes, np.dtype)
# XLA ends the process for an array of 2^63 bytes or more; the members of a run
# share this bound. No machine holds more numbers.
_MOST_NUMBERS = 2**45


def digest(fn: Any, *args: Any) -> str:
  """Digests what a function computes.

  Args:
    fn: a function of pytrees, as for `jax.jit`.
    *args: its arguments, or their shapes.

  Returns:
    A hex digest. It depends on arrays that `fn` closes over, but not on Python
    code that a callback runs.
  """
  return _closed(jax.make_jaxpr(fn)(*args), {})


def versions(
  packages: Iterable[str] = _PACKAGES, *, missing: str = 'absent'
) -> dict[str, str]:
  """Returns versions of `bilevel_jax` and of packages.

  Args:
    packages: names of the packages; by default those on which digests depend.
    missing: the version of a package that is not installed.
  """
  numbers = {'bilevel_jax': bilevel_jax.__version__}
  for package in packages:
    try:
      numbers[package] = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
      numbers[package] = missing
  return numbers


def check_program(
  path: files.Path,
  digests: Mapping[str, str],
  environment: Mapping[str, Any],
) -> None:
  """Writes the digests of a program, or compares them with the written ones.

  Args:
    path: the JSON file; written if missing. A damaged one is moved away with a
      warning.
    digests: digests by part of the program.
    environment: what else the digests depend on, plain JSON values by name. In
      another one, the digests are not compared, which is printed.

  Raises:
    OtherRunError: if the digests differ; names the parts.
    WriteError: if the file cannot be written.
  """
  path = pathlib.Path(path)
  new = {'digests': dict(digests), 'environment': dict(environment)}
  what = 'taking the program of this command'
  old = files.read_sealed(path, what)
  if old == new:
    return
  if old is not None:
    _compare(path, old, new)
  files.write_text(path, files.seal(new, indent=2, sort_keys=True) + '\n')


def _compare(
  path: pathlib.Path, old: Mapping[str, Any], new: Mapping[str, Any]
) -> None:
  before, now = old['environment'], new['environment']
  if before != now:
    changes = '; '.join(
      f'{name}: {before.get(name, "absent")} -> {now.get(name, "absent")}'
      for name in sorted({*before, *now})
      if before.get(name) != now.get(name)
    )
    if files.is_writer():
      print(
        f'{path.parent.name}: not known whether the program is that of the '
        f'saved run ({changes}).',
        file=sys.stderr,
        flush=True,
      )
    return
  # Parts that only one of them knows cannot be compared.
  parts = sorted(old['digests'].keys() & new['digests'].keys())
  differing = [
    part for part in parts if old['digests'][part] != new['digests'][part]
  ]
  if differing:
    raise errors.OtherRunError(
      f'{path.parent} holds a run of another program with the same settings: '
      f'the code of {" and of ".join(differing)} has changed. Give another '
      '--workdir, or delete this one. If the results stay the same, delete '
      f'{path.name} in it to resume.'
    )


def _closed(closed: core.ClosedJaxpr, known: dict[int, str]) -> str:
  constants = ''.join(identity.digest(x) for x in closed.consts)
  return _hash(_open(closed.jaxpr, known) + constants)


def _open(jaxpr: core.Jaxpr, known: dict[int, str]) -> str:
  """Digests a jaxpr; `known` has the digests of those that occur again."""
  if id(jaxpr) in known:
    return known[id(jaxpr)]
  numbers: dict[Any, int] = {}

  def define(variables):
    for variable in variables:
      numbers[variable] = len(numbers)
    return ' '.join(_kind(variable.aval) for variable in variables)

  def use(atoms):
    return ' '.join(
      _literal(atom) if isinstance(atom, core.Literal) else str(numbers[atom])
      for atom in atoms
    )

  lines = [define(jaxpr.constvars), define(jaxpr.invars)]
  for equation in jaxpr.eqns:
    params = ' '.join(
      f'{name}={_param(value, known)}'
      for name, value in sorted(equation.params.items())
      if name == 'axis_name' or name.rpartition('_')[-1] not in _IGNORED
    )
    inputs = use(equation.invars)
    outputs = define(equation.outvars)
    lines.append(f'{equation.primitive.name} {inputs} [{params}] {outputs}')
  lines.append(use(jaxpr.outvars))
  known[id(jaxpr)] = _hash('\n'.join(lines))
  return known[id(jaxpr)]


def _literal(literal: core.Literal) -> str:
  value = np.asarray(literal.val)
  content = value.tobytes()
  text = content.hex() if len(content) <= 16 else identity.digest(value)
  return f'{_kind(literal.aval)}:{text}'


def _kind(aval: Any) -> str:
  dtype = getattr(aval, 'dtype', type(aval).__name__)
  shape = getattr(aval, 'shape', '')
  if shape and math.prod(shape) > _MOST_NUMBERS:
    raise errors.SettingsError(
      f'the program has an array of shape {shape}, which exceeds any memory: '
      'choose smaller sizes.'
    )
  return f'{dtype}{shape}'


def _param(value: Any, known: dict[int, str]) -> str:
  describe = lambda x: _param(x, known)
  if isinstance(value, core.ClosedJaxpr):
    return _closed(value, known)
  if isinstance(value, core.Jaxpr):
    return _open(value, known)
  if isinstance(value, _PLAIN):
    return repr(value)
  if isinstance(value, tuple | list):
    return f'({" ".join(map(describe, value))})'
  if isinstance(value, set | frozenset):
    return f'{{{" ".join(sorted(map(describe, value)))}}}'
  if isinstance(value, Mapping):
    items = [f'{describe(k)}:{describe(x)}' for k, x in value.items()]
    return f'{{{" ".join(sorted(items))}}}'
  if isinstance(value, np.ndarray | np.generic | jax.Array):
    return identity.digest(value)
  # Enums and random generators have a name that says all; a function, or its
  # address, says nothing.
  name = '' if callable(value) else getattr(value, 'name', '')
  return f'{type(value).__name__}.{name if isinstance(name, str) else ""}'


def _hash(text: str) -> str:
  return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
