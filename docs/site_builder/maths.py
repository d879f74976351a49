"""TeX in pages becomes MathML, which browsers show without a script."""

import html
import re

from latex2mathml import converter

# What pymdownx.arithmatex writes with `generic: true`.
_INLINE = re.compile(
  r'<span class="arithmatex">\\\((.*?)\\\)</span>', re.DOTALL
)
_DISPLAY = re.compile(
  r'<div class="arithmatex">\s*\\\[(.*?)\\\]\s*</div>', re.DOTALL
)


def _convert(tex: str, display: str) -> str:
  tex = html.unescape(tex).strip()
  # Commands that the converter lacks.
  for command, instead in ((r'\tfrac', r'\frac'), (r'\dfrac', r'\frac')):
    tex = tex.replace(command, instead)
  tex = re.sub(r'\\math(?:op|rel|bin|ord)\b', '', tex)
  return converter.convert(tex, display=display)


def to_mathml(page: str) -> str:
  """Replaces each formula in the HTML of a page."""
  page = _DISPLAY.sub(
    lambda m: f'<div class="formula">{_convert(m[1], "block")}</div>', page
  )
  return _INLINE.sub(lambda m: _convert(m[1], 'inline'), page)
