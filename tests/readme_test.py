"""The README is short, its examples print what it says, its links lead on."""

import contextlib
import io
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / 'README.md').read_text(encoding='utf-8')
PAGES = sorted(
  path
  for pattern in ('*.md', 'docs/**/*.md', 'experiments/*/*.md')
  for path in ROOT.glob(pattern)
)


def test_the_example_prints_what_it_says():
  code = re.findall(r'```python\n(.*?)```', README, re.DOTALL)[0]
  assert len([line for line in code.splitlines() if line]) <= 20
  printed = io.StringIO()
  with contextlib.redirect_stdout(printed):
    exec(compile(code, 'README.md', 'exec'), {})  # noqa: S102
  (expected,) = re.findall(r'print\(.*# (-?[\d.]+);', code)
  # The best point of a grid is known to the grid's spacing.
  assert float(printed.getvalue()) == pytest.approx(float(expected), abs=0.05)


@pytest.mark.slow
def test_the_penalty_example_prints_what_it_says():
  """The verdict, and both losses."""
  codes = re.findall(r'```python\n(.*?)```', README, re.DOTALL)
  printed = io.StringIO()
  with contextlib.redirect_stdout(printed):
    exec(compile('\n'.join(codes), 'README.md', 'exec'), {})  # noqa: S102
  # The verdict, or the whole diagnosis.
  _, diagnosis, *losses = printed.getvalue().splitlines()
  verdict = diagnosis.partition(':')[0]
  (shown,) = re.findall(r'diagnose\(.*\)  # (\w+)', codes[1])
  (comment,) = re.findall(r"'validation'\]\)\)  # (.*)", codes[1])
  expected = list(map(float, re.findall(r'0\.\d+', comment)))
  assert verdict == shown
  assert list(map(float, losses)) == pytest.approx(expected, abs=0.002)


def test_it_has_one_screen():
  text = re.sub(r'<!--.*?-->', '', README, flags=re.DOTALL)
  assert len(text.split()) <= 900
  assert README.count('python3 -m venv .venv') == 2


@pytest.mark.parametrize('page', PAGES, ids=lambda p: p.parent.name + p.stem)
def test_links_lead_to_files_and_headings(page):
  text = page.read_text(encoding='utf-8')
  text = re.sub(r'```.*?```', '', text, flags=re.DOTALL)
  for link in re.findall(r'\]\(([^)\s]+)\)', text):
    if link.startswith(('http', 'mailto', '/')):  # / is the site's top.
      continue
    name, _, heading = link.partition('#')
    target = page.parent / name if name else page
    assert target.exists(), link
    if heading and target.suffix == '.md':
      titles = re.findall(r'^#+ (.*)$', target.read_text('utf-8'), re.MULTILINE)
      anchors = {
        re.sub(r'[^\w\- ]', '', title).strip().lower().replace(' ', '-')
        for title in titles
      }
      assert heading in anchors, link
