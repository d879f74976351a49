"""BUILD has one target for each file."""

import re

from tests import build_targets


def test_build_matches_the_files():
  written = (build_targets.ROOT / 'BUILD').read_text()
  assert written == build_targets.build_file(), (
    'BUILD is out of date: run python -m tests.build_targets.'
  )


def test_every_file_is_the_source_of_one_target():
  written = (build_targets.ROOT / 'BUILD').read_text()
  sources = re.findall(r'srcs = \["(.*?)"\]', written)
  files = [
    path.relative_to(build_targets.ROOT).as_posix()
    for path in build_targets.modules().values()
  ]
  assert sorted(sources) == sorted(files)
