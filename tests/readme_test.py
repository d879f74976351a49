"""The README is short, its example gives what it says, its links lead on."""

import contextlib
import io
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / 'README.md').read_text(encoding='utf-8')
PAGES = sorted(
  path
  for pattern in ('*.md', 'docs/*.md', 'experiments/*/*.md')
  for path in ROOT.glob(pattern)
)


def test_the_example_prints_what_it_says():
  (code,) = re.findall(r'```python\n(.*?)```', README, re.DOTALL)
  assert len([line for line in code.splitlines() if line]) <= 20
  said = io.StringIO()
  with contextlib.redirect_stdout(said):
    exec(compile(code, 'README.md', 'exec'), {})  # noqa: S102
  (expected,) = re.findall(r'print\(.*# (-?[\d.]+)', code)
  # What a grid finds is known to its spacing.
  assert float(said.getvalue()) == pytest.approx(float(expected), abs=0.05)


def test_it_has_one_screen():
  seen = re.sub(r'<!--.*?-->', '', README, flags=re.DOTALL)
  assert len(seen.split()) <= 900
  assert README.count('python3.11 -m venv .venv') == 2


@pytest.mark.parametrize('page', PAGES, ids=lambda p: p.parent.name + p.stem)
def test_links_lead_to_files_and_headings(page):
  text = page.read_text(encoding='utf-8')
  text = re.sub(r'```.*?```', '', text, flags=re.DOTALL)
  for link in re.findall(r'\]\(([^)\s]+)\)', text):
    if link.startswith(('http', 'mailto')):
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
