"""Folders that a run writes: its own, and none that is another's."""

import pytest

from experiments import harness
from experiments.lm import output_folders

pytest.importorskip('safetensors', reason='needs the extra llm')


def writer(text):
  def make(folder):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / 'model.safetensors').write_text(text)

  return make


def refused(workdir, folder):
  with pytest.raises(harness.UserError, match='this run has not written'):
    output_folders.require_own(workdir, folder)


def test_several_folders_are_a_run_s_own_and_no_other_s(tmp_path):
  run, other = tmp_path / 'run', tmp_path / 'other'
  folders = [tmp_path / name for name in 'ab']
  text = lambda folder: (folder / 'model.safetensors').read_text()
  for folder in folders:
    output_folders.write(run, folder, '1', writer('one'))
  for folder in folders:
    output_folders.require_own(run, folder)
    refused(other, folder)
  # The same stamp is not written again; another one, and none, are.
  output_folders.write(run, folders[0], '1', writer('not'))
  assert text(folders[0]) == 'one'
  output_folders.write(run, folders[0], '2', writer('two'))
  assert text(folders[0]) == 'two' and text(folders[1]) == 'one'
  output_folders.write(run, folders[1], '', writer('anew'))
  assert text(folders[1]) == 'anew'
  # What others have put there is theirs, and a folder that is gone is nobody's.
  writer('foreign')(folders[0])
  refused(run, folders[0])
  (folders[0] / 'model.safetensors').unlink()
  output_folders.write(run, folders[0], '2', writer('again'))
  assert text(folders[0]) == 'again'


def test_a_kill_leaves_a_folder_of_the_run(tmp_path):
  def killed(folder):
    writer('half')(folder)
    (folder / 'adapters').mkdir()
    (folder / 'adapters' / 'adapter_model.safetensors').write_text('half')
    raise KeyboardInterrupt

  run, folder = tmp_path / 'run', tmp_path / 'a'
  with pytest.raises(KeyboardInterrupt):
    output_folders.write(run, folder, '1', killed)
  refused(tmp_path / 'other', folder)
  output_folders.write(run, folder, '1', writer('whole'))
  assert (folder / 'model.safetensors').read_text() == 'whole'
  assert not (folder / 'adapters' / 'adapter_model.safetensors').exists()
  # A record that is damaged says nothing: then they may be another's.
  (run / 'written.json').write_text('{}')
  refused(run, folder)
