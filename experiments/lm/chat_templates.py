"""Renders chat templates in a sandbox with limits of time and memory.

A template comes with a model and may loop for ever or fill the memory. Each
round of a loop, call, new value, comparison and output is charged to a budget
of one rendering. The growth of a text is estimated before it is made.
"""

import functools
import json
import re
from collections import abc
from collections.abc import Callable, Mapping
from typing import Any

import jinja2
from jinja2 import nodes, runtime, sandbox, utils, visitor

from experiments import harness

# The budget of a rendering, in characters; the cost of a step and of an entry
# of a list; the largest value; the digits of an integer, in bits.
BUDGET, STEP, ENTRY = 2**25, 128, 64
LARGEST, BITS = 2**23, 4_096
# Methods and filters whose result may exceed their arguments.
_GROWING = re.compile(
  'batch|center|expandtabs|format|format_map|indent|join|ljust|rjust|slice|'
  'to_bytes|tojson|translate|zfill'
)
# Filters that take the same time for values of any size.
_QUICK = ('length', 'count', 'first', 'last', 'default', 'd')
# Filters and functions that no template of a chat needs.
_REMOVED = ('pprint', 'random', 'round', 'sum', 'urlize', 'wordwrap', 'xmlattr')
# Widths of many digits, from a value, or nested.
_WIDTH = re.compile(r'%[^a-zA-Z%]*(\d{5}|\*)|\{[^{}]*:[^{}]*(\d{5}|\{)')
_VIEWS = (abc.KeysView, abc.ValuesView, abc.ItemsView)


class LimitError(Exception):
  """A template exceeds a limit."""

  def __init__(self) -> None:
    super().__init__(
      'it takes too much time or memory; it loops, repeats a text too often, '
      'or pads one to a large width'
    )


def render(template: str, variables: Mapping[str, Any]) -> str:
  """Renders a template.

  Args:
    template: the template in Jinja.
    variables: messages and special tokens.

  Returns:
    The text.

  Raises:
    UserError: if the template calls `raise_exception`.
    LimitError: if it takes too much time or memory.
    Exception: other errors of templates, of any kind.
  """
  compiled = _compiled(template)
  compiled.environment.left = BUDGET
  return compiled.render(**variables)


@functools.lru_cache(maxsize=8)
def _compiled(template: str) -> jinja2.Template:
  environment = _Environment()
  try:
    return environment.from_string(template)
  except jinja2.TemplateSyntaxError as error:
    raise ValueError(f'line {error.lineno}: {error.message}') from error


def measure(value: Any, entry: int = ENTRY) -> int:
  """Measures a value as a tree, in characters; raises LimitError if too large.

  Args:
    value: any value.
    entry: characters per entry.
  """
  total, stack = 0, [value]
  while stack:
    one = stack.pop()
    total += entry
    if isinstance(one, (str, bytes)):
      total += len(one)
    elif isinstance(one, abc.Mapping):
      stack += [*one.keys(), *one.values()]
    elif isinstance(one, (list, tuple, set, frozenset, *_VIEWS)):
      stack += one
    elif isinstance(one, range):
      total += entry * len(one)
    if total > LARGEST or len(stack) > LARGEST // ENTRY:
      raise LimitError
  return total


def _factor(values: abc.Iterable[Any]) -> int:
  """Sums characters, and integers by value: how often a text may repeat."""
  total = 0
  for value in values:
    if isinstance(value, int):
      total += abs(value)
    elif isinstance(value, (list, tuple)):
      total += _factor(value)
    elif isinstance(value, abc.Mapping):
      total += _factor(value.values())
    else:
      total += measure(value, 0)
  return total


class _Namespace(utils.Namespace):
  """A namespace whose text does not have its values, which may be nested."""

  def __repr__(self) -> str:
    return '<namespace>'


class _Charged(visitor.NodeTransformer):
  """Adds charges to the nodes of a template."""

  def _wrapped(self, node, name='charged'):
    return nodes.Filter(
      node, name, [], [], None, None, lineno=getattr(node, 'lineno', 1)
    )

  def visit_TemplateData(self, node):
    # Other constants are outputs that are charged.
    return nodes.Const(node.data, lineno=node.lineno)

  def visit_For(self, node):
    self.generic_visit(node)
    node.iter = self._wrapped(node.iter, 'counted')
    return node

  def visit_Concat(self, node):
    self.generic_visit(node)
    return self._wrapped(nodes.List(node.nodes, lineno=node.lineno), 'joined')

  def _value(self, node):
    self.generic_visit(node)
    return self._wrapped(node)

  visit_List = visit_Dict = _value

  def visit_Tuple(self, node):
    self.generic_visit(node)
    return self._wrapped(node) if node.ctx == 'load' else node

  def visit_Getitem(self, node):
    self.generic_visit(node)
    return self._wrapped(node) if isinstance(node.arg, nodes.Slice) else node

  def visit_Compare(self, node):
    self.generic_visit(node)
    node.expr = self._wrapped(node.expr)
    for operand in node.ops:
      operand.expr = self._wrapped(operand.expr)
    return node

  def visit_Test(self, node):
    self.generic_visit(node)
    if node.args:  # Other tests take the same time for all values.
      node.node = self._wrapped(node.node)
      node.args = [self._wrapped(one) for one in node.args]
    return node


@jinja2.pass_context
def _finalize(context: Any, value: Any) -> str:
  """Charges an output; `pass_context` keeps Jinja from computing it early."""
  context.environment.charge(value)
  return str(value)


class _Environment(sandbox.ImmutableSandboxedEnvironment):
  """A sandbox with a budget.

  Attributes:
    left: what is left of the budget.
  """

  intercepted_binops = frozenset(('+', '*', '**', '%'))

  def __init__(self) -> None:
    super().__init__(
      trim_blocks=True,
      lstrip_blocks=True,
      extensions=['jinja2.ext.loopcontrols'],
      finalize=_finalize,
      optimized=False,
    )
    self.left = BUDGET
    self.globals['raise_exception'] = _refuse
    self.globals['namespace'] = _Namespace
    del self.globals['lipsum']
    for name in _REMOVED:
      del self.filters[name]
    self.filters['tojson'] = _as_json
    self.filters = {n: self._limited(n, f) for n, f in self.filters.items()}
    self.filters |= {
      'charged': self.charge,
      'counted': self._counted,
      'joined': self._joined,
    }

  def _parse(self, *args: Any) -> nodes.Template:
    template = _Charged().visit(super()._parse(*args))
    return template.set_environment(self)

  def spend(self, units: int) -> None:
    """Takes units from the budget; raises LimitError if it is empty."""
    self.left -= units
    if self.left < 0:
      raise LimitError

  def charge(self, value: Any) -> Any:
    """Charges and returns a value."""
    self.spend(STEP + measure(value))
    return value

  def _counted(self, value: Any) -> Any:
    """Charges the rounds of a loop."""
    value = value if hasattr(value, '__len__') else list(value)
    self.spend(STEP * (1 + len(value)))
    return value

  def _joined(self, values: list[Any]) -> str:
    return self.charge(''.join(map(str, self.charge(values))))

  def _limited(self, name: str, function: Callable[..., Any]) -> Any:
    """Charges the arguments and the result of a filter."""
    special = hasattr(function, 'jinja_pass_arg')

    @functools.wraps(function)
    def limited(*args: Any, **kwargs: Any) -> Any:
      first, (value, *rest) = args[:special], args[special:]
      if isinstance(value, abc.Iterator):
        value = self.charge(list(value))
      if name in _QUICK:
        self.spend(STEP)
        return function(*first, value, *rest, **kwargs)
      self._require_growth(name, value, rest, kwargs)
      self.charge([value, rest, kwargs])
      return self.charge(function(*first, value, *rest, **kwargs))

    return limited

  def _require_growth(
    self, name: str, value: Any, args: abc.Iterable[Any], kwargs: Any
  ) -> None:
    """Raises LimitError if a method or filter may make too large a value."""
    args = [*args, *kwargs.values()]
    if name == 'replace' and isinstance(value, str):
      old, new = (str(one) for one in (*args, '', '')[:2])
      if len(value) + (len(value) // max(1, len(old)) + 1) * len(new) > LARGEST:
        raise LimitError
    elif _GROWING.fullmatch(name):
      if 'format' in name:
        _require_widths(value)
      if (1 + measure(value, 1)) * (1 + _factor(args)) > LARGEST:
        raise LimitError

  def call(
    __self, __context: Any, __obj: Any, *args: Any, **kwargs: Any
  ) -> Any:
    """Charges the arguments and the result of a call."""
    method = getattr(__obj, '__wrapped__', __obj)
    value = getattr(method, '__self__', None)
    name = getattr(method, '__name__', '')
    __self._require_growth(name, value, args, kwargs)
    if isinstance(value, (str, bytes, list, tuple, dict)):
      __self.charge(value)
    if not isinstance(__obj, runtime.Macro):
      __self.charge([args, kwargs])
    return __self.charge(super().call(__context, __obj, *args, **kwargs))

  def call_binop(
    self, context: Any, operator: str, left: Any, right: Any
  ) -> Any:
    """Charges the result of an operator, and refuses large ones."""
    integers = isinstance(left, int) and isinstance(right, int)
    if operator == '**':
      if integers and right > 0 and left.bit_length() * right > BITS:
        raise LimitError
    elif operator == '*' and integers:
      if left.bit_length() + right.bit_length() > BITS:
        raise LimitError
    elif operator == '*' or (operator == '%' and isinstance(left, str)):
      if operator == '%':
        _require_widths(left)
      if (1 + _factor([left])) * (1 + _factor([right])) > LARGEST:
        raise LimitError
    return self.charge(super().call_binop(context, operator, left, right))


def _require_widths(text: Any) -> None:
  if isinstance(text, str) and _WIDTH.search(text):
    raise LimitError


def _refuse(message: Any) -> None:
  text = ' '.join(str(message).split())[:500]
  raise harness.UserError(f'the chat template says: {text}')


def _as_json(value: Any, indent: Any = None) -> str:
  return json.dumps(value, ensure_ascii=False, indent=indent)
