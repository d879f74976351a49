"""BUILD has one target for each file."""

import re
import shutil
import subprocess

import pytest

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


def test_bazel_lists_every_target(tmp_path):
  if shutil.which('bazel') is None:
    pytest.skip(
      'bazel is not installed: on Debian, apt-get install bazel-bootstrap.'
    )
  query = subprocess.run(
    [
      'bazel',
      '--batch',
      f'--output_user_root={tmp_path}',
      'query',
      '--noshow_progress',
      '//...',
    ],
    cwd=build_targets.ROOT,
    capture_output=True,
    text=True,
    timeout=200,
    check=False,
  )
  assert query.returncode == 0, query.stderr
  names = {f'//:{name}' for name in build_targets.modules()}
  assert set(query.stdout.split()) == names
