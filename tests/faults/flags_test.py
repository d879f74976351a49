"""Any flag of any binary: a run, or one line that says why not."""

import contextlib
import importlib
import pathlib
import subprocess
import sys

import hypothesis
import pytest
from absl import flags
from hypothesis import strategies as st

from experiments import harness
from experiments.harness.app import flags as flags_lib
from experiments.harness.app import settings as settings_lib

ROOT = pathlib.Path(__file__).parents[2]
BINARIES = [
  '.'.join(path.relative_to(ROOT).with_suffix('').parts)
  for path in sorted((ROOT / 'experiments').rglob('*.py'))
  if '\nSTUDY = ' in path.read_text() and path.parent.name != 'harness'
]
TEXTS = (
  *('0', '-3', '0.0', '-0.0', '1e400', 'nan', '-inf', '1e-400', '1_0', '5'),
  *('', ',', '1,,2', '1,-2', 'a', 'True', 'None', '\N{SUPERSCRIPT TWO}', ' 3 '),
  *(str(2**31), str(10**30), '9' * 5_000, '0.5', '2000', '0,1', '1e9', '\0'),
)


def checked(name, *arguments):
  """The settings that a binary would run with."""
  binary = importlib.import_module(name)
  values = flags.FlagValues()
  flags_lib.define(binary.PRESETS, values=values)
  values(['binary', *arguments])
  options = flags_lib.resolve(
    binary.PRESETS, paper='a', binary='b', values=values
  )
  getattr(binary, 'check', lambda settings: None)(options.settings)
  return options.settings


@pytest.mark.parametrize('name', BINARIES)
def test_presets_pass(name):
  for preset in importlib.import_module(name).PRESETS:
    checked(name, f'--preset={preset}')


@pytest.mark.parametrize('name', BINARIES)
def test_the_help_of_a_flag_stands_alone(name):
  settings = next(iter(importlib.import_module(name).PRESETS.values()))
  for name, field in settings_lib.flatten(settings).items():
    text = field.description
    assert not text or text.endswith('.'), name  # Not cut off.
    # `--help` sorts flags: what stood above is somewhere else.
    assert not text.lower().startswith(('likewise', 'as in')), name


@pytest.mark.parametrize('name', BINARIES)
@hypothesis.settings(max_examples=40)
@hypothesis.given(data=st.data())
def test_any_text_is_a_value_or_one_line(name, data):
  binary = importlib.import_module(name)
  fields = settings_lib.flatten(next(iter(binary.PRESETS.values())))
  field = data.draw(st.sampled_from(sorted(set(fields) - {'seeds'})))
  text = data.draw(st.sampled_from(TEXTS) | st.text(max_size=8))
  with contextlib.suppress(harness.SettingsError):
    checked(name, f'--{field}={text}')


@pytest.mark.slow
@pytest.mark.parametrize(
  'words',
  [
    'pbgd.hyper_cleaning --chunk=0',
    'moco.tabular --preset=smoke --hidden=-3',
    'stsa.bilevel_zoo --calls=-1',
    'stsa.bilevel_zoo --batch_size=0',
    'aipod.federated --preset=smoke --clients=2000',
    'aipod.federated --preset=smoke --taking_part=9',
  ],
)
def test_the_process_says_one_line(words, tmp_path):
  module, *rest = words.split()
  process = subprocess.run(
    [
      *(sys.executable, '-m', f'experiments.{module}'),
      *(*rest, f'--workdir={tmp_path}'),
    ],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=False,
  )
  assert process.returncode == 1
  assert process.stderr.count('\n') == 1, process.stderr
  assert process.stderr.startswith(module.replace('.', '/'))
