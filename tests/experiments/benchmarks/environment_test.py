"""Processes of other environments: what they answer, and how they fail."""

import subprocess
import sys

import pytest

from experiments.benchmarks import environment

STEPS = """
import sys

def adds(by):
  held = [0]
  def run(steps):
    held[0] += by * steps
    print('packages print what they like')
    if held[0] > 10:
      raise ValueError('too much')
    if held[0] == 7:
      sys.exit(3)
  return run

def breaks():
  raise KeyError('no such case')
"""


@pytest.fixture
def process(tmp_path, monkeypatch):
  """Starts cases of a module of this test."""
  (tmp_path / 'steps_of_a_test.py').write_text(STEPS)
  monkeypatch.setenv('PYTHONPATH', str(tmp_path))

  def start(case, **options):
    return environment.own_process('steps_of_a_test', case, **options)

  return start


def test_a_process_answers_by_seconds_and_bytes(process):
  with process('adds', by=1) as one:
    for _ in range(2):
      wall, cpu = one.run(3)
      assert wall >= 0 and cpu >= 0
    assert one.memory() >= 0


@pytest.mark.parametrize(
  ('case', 'options', 'steps', 'says'),
  [
    ('breaks', {}, 0, "KeyError: 'no such case'"),
    ('none', {}, 0, 'AttributeError'),
    ('adds', {'by': 11}, 1, 'ValueError: too much'),
    ('adds', {'by': 7}, 1, 'ended with status 3'),
  ],
)
def test_a_failure_is_told_in_one_line(process, case, options, steps, says):
  with (
    pytest.raises(environment.MissingPeerError, match=says) as info,
    process(case, **options) as one,
  ):
    one.run(steps)
  assert '\n' not in str(info.value)


def test_packages_are_looked_for_where_they_are_to_be(monkeypatch, tmp_path):
  peers = environment.Peers(sys.executable)
  peers.require('json', 'numpy')
  with pytest.raises(environment.MissingPeerError, match='lacks no_such'):
    peers.require('json', 'no_such')
  for choice, says in (
    ('none', 'left out by --peers=none'),
    (str(tmp_path), 'is not an executable Python'),
  ):
    with pytest.raises(environment.MissingPeerError, match=says):
      environment.Peers(choice).require('json')
  monkeypatch.setenv(environment.PYTHON_VARIABLE, sys.executable)
  assert environment.Peers().python == sys.executable


def test_an_environment_is_made_once_and_a_failure_is_tried_again(
  monkeypatch, tmp_path, capsys
):
  monkeypatch.delenv(environment.PYTHON_VARIABLE, raising=False)
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
  created, status = [], [1]
  monkeypatch.setattr(
    environment.venv,
    'create',
    lambda folder, **_: (created.append(folder), folder.mkdir(parents=True)),
  )
  monkeypatch.setattr(
    environment.subprocess,
    'run',
    lambda command, **_: subprocess.CompletedProcess(
      command, status[0], '', 'a warning\nno such version\n'
    ),
  )
  with pytest.raises(environment.MissingPeerError, match=': no such version'):
    _ = environment.Peers().python
  created[0].rmdir()
  status[0] = 0
  for _ in range(2):
    assert environment.Peers().python.startswith(str(tmp_path))
  assert len(created) == 2
  assert capsys.readouterr().out.count('Creating the environment') == 2


def test_a_clone_that_cannot_be_made_says_where_to_put_it(
  monkeypatch, tmp_path
):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
  monkeypatch.setitem(
    environment.REPOSITORIES, 'one', (str(tmp_path / 'none'), 'abc')
  )
  with pytest.raises(environment.MissingPeerError, match='put a clone of'):
    environment.repository('one')
  folder = environment.cache() / 'repositories' / 'one'
  folder.mkdir()
  assert environment.repository('one') == folder
