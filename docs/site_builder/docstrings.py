"""Docstrings from reStructuredText to Markdown, for mkdocstrings."""

import re
import textwrap

import griffe

_MATH_BLOCK = re.compile(
  r'^( *)\.\. math::[ ]*\n((?:\1 +\S.*\n?|\s*\n)+)', re.M
)
_LINK = re.compile(r'`([^`<]+?)\s*<([^>`\s]+)>`_')


def _display(match: re.Match) -> str:
  indent, block = match[1], textwrap.dedent(match[2]).strip()
  # An empty line stands between two equations.
  formulas = []
  for part in re.split(r'\n\s*\n', block):
    lines = ' '.join(part.split())
    if '&' in lines or r'\\' in lines:
      lines = rf'\begin{{split}} {lines} \end{{split}}'
    formulas.append(f'{indent}$$\n{indent}{lines}\n{indent}$$')
  return '\n' + '\n\n'.join(formulas) + '\n\n'


def to_markdown(text: str) -> str:
  """Converts maths, links, literal blocks and the heading of examples."""
  text = _MATH_BLOCK.sub(_display, text + '\n')
  text = re.sub(
    r':math:`([^`]*)`', lambda m: f'${" ".join(m[1].split())}$', text
  )
  text = _LINK.sub(lambda m: f'[{" ".join(m[1].split())}]({m[2]})', text)
  text = re.sub(r'::$', ':', text, flags=re.MULTILINE)
  text = re.sub(r'^Example:$', 'Examples:', text, flags=re.MULTILINE)
  # A colon later in the first line of Returns would be taken for a type.
  text = re.sub(
    r'^Returns:\n((?:  .*\n|\n(?=  ))+)',
    lambda m: f'**Returns**\n\n{textwrap.dedent(m[1])}\n',
    text,
    flags=re.MULTILINE,
  )
  return text.strip()


class Markdown(griffe.Extension):
  """Rewrites each docstring when it is loaded."""

  def on_object(self, *, obj, **kwargs):
    """Called for each module, class, function and attribute."""
    del kwargs
    if obj.docstring:
      obj.docstring.value = to_markdown(obj.docstring.value)
