"""Compiled programs on disk: found again, never wrong, never in the way."""

import concurrent.futures
import itertools
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.harness.app import compile_cache

ROOT = pathlib.Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def _stop():
  compile_cache.stop()  # The one of the session.
  yield
  compile_cache.stop()


@pytest.fixture
def events():
  """Names of JAX's events during a test, and of what is compiled by then."""
  names = []
  one = lambda name, **_: names.append(name.rpartition('/')[-1])
  other = lambda *_, fun_name='', **__: names.extend(
    [fun_name] * bool(fun_name)
  )
  jax.monitoring.register_event_listener(one)
  jax.monitoring.register_event_duration_secs_listener(other)
  yield names
  jax.monitoring.unregister_event_listener(one)
  jax.monitoring.unregister_event_duration_listener(other)


def compute():
  """A program that no other test compiles, compiled anew at each call."""
  x = np.linspace(0.1, 1.3, 13, dtype=np.float32)
  compiled = jax.jit(lambda x: jnp.cumsum(jnp.sin(x) * 0.37)).lower(x).compile()
  return np.asarray(compiled(x))


def programs(folder):
  return sorted(folder.glob('*.program'))


def test_second_compilation_reads_the_first(tmp_path, events):
  """Bit for bit, also small programs."""
  plain = compute()
  assert compile_cache.use(tmp_path / 'new')
  cold = compute()
  assert 'cache_misses' in events and 'cache_hits' not in events
  warm = compute()
  assert 'cache_hits' in events
  np.testing.assert_array_equal(cold, plain, strict=True)
  np.testing.assert_array_equal(warm, plain, strict=True)
  assert len(programs(tmp_path / 'new')) == 1
  assert (tmp_path / 'new').stat().st_mode & 0o077 == 0


@pytest.mark.parametrize('damage', ('empty', 'torn', 'changed', 'other'))
def test_damaged_entry_is_compiled_again(tmp_path, events, damage):
  compile_cache.use(tmp_path)
  plain = compute()
  (path,) = programs(tmp_path)
  content = path.read_bytes()
  damaged = {
    'empty': b'',
    'torn': content[: len(content) // 2],
    'changed': content[:-9] + bytes([content[-9] ^ 1]) + content[-8:],
    'other': b'not a program' * 100,
  }
  path.write_bytes(damaged[damage])
  np.testing.assert_array_equal(compute(), plain, strict=True)
  assert 'cache_hits' not in events
  np.testing.assert_array_equal(compute(), plain, strict=True)
  assert 'cache_hits' in events  # It was replaced.


def test_a_resumed_run_does_not_compile_its_program_again(
  train, grid_solver, tmp_path, events
):
  """Functions made anew, as in a new process, have the programs of the old."""
  named = lambda event: [
    name for before, name in itertools.pairwise(events) if before == event
  ]
  compile_cache.use(tmp_path / 'programs')
  enough = lambda history: len(history['score']) >= 2
  run = lambda **more: train(solver=grid_solver(), select='score', **more)
  run(stop_when=enough)
  assert 'jit(chunk)' in named('cache_misses')
  events.clear()
  resumed = run()
  assert 'jit(chunk)' in named('cache_hits')
  # Small programs that place what was saved are new.
  assert set(named('cache_misses')) <= {'jit(stage)'}
  compile_cache.stop()
  whole = run(workdir=None)
  for one, other in zip(
    *(jax.tree.leaves(t.params) for t in (resumed, whole)), strict=True
  ):
    np.testing.assert_array_equal(one, other, strict=True)


def test_no_program_of_another_machine(tmp_path, monkeypatch, events):
  """Not of other processors, nor of other numbers of cores."""
  line = 'flags : avx avx512f\nmodel : 7\nbogomips : {}\n'
  cpuinfo = tmp_path / 'cpuinfo'
  monkeypatch.setattr(compile_cache, '_CPUINFO', cpuinfo)

  def hits(text, cores):
    cpuinfo.write_text(text)
    monkeypatch.setattr(
      os, 'sched_getaffinity', lambda _: range(cores), raising=False
    )
    compile_cache.use(tmp_path / 'programs')
    events.clear()
    compute()
    return 'cache_hits' in events

  assert not hits(line.format(1), 2)
  assert hits(line.format(2), 2)  # The clock may change.
  assert not hits(line.format(1).replace(' avx512f', ''), 2)
  assert not hits(line.format(1).replace('model : 7', 'model : 8'), 2)
  assert not hits(line.format(1), 4)
  cpuinfo.unlink()
  compile_cache.use(tmp_path / 'programs')
  events.clear()
  compute()
  assert 'cache_hits' not in events


def test_folder_that_cannot_be_written_costs_one_line(tmp_path, capsys):
  """No folder at all; one that is full; one that others write."""
  plain = compute()
  (tmp_path / 'file').write_text('')
  assert not compile_cache.use(tmp_path / 'file' / 'folder')
  np.testing.assert_array_equal(compute(), plain, strict=True)
  (line,) = capsys.readouterr().err.splitlines()
  assert str(tmp_path / 'file' / 'folder') in line
  assert '--compile_cache' in line

  compile_cache.use(tmp_path / 'gone')
  (tmp_path / 'gone').rmdir()
  for _ in range(2):
    np.testing.assert_array_equal(compute(), plain, strict=True)
  assert len(capsys.readouterr().err.splitlines()) == 1
  compile_cache.stop()

  (tmp_path / 'open').mkdir()
  (tmp_path / 'open').chmod(0o777)
  assert not compile_cache.use(tmp_path / 'open')
  assert 'every user' in capsys.readouterr().err


def test_where_programs_are_kept(tmp_path, monkeypatch):
  monkeypatch.setenv(compile_cache.VARIABLE, compile_cache.OFF)
  assert not compile_cache.use()
  assert compile_cache.use(tmp_path / 'flag')
  compile_cache.stop()
  monkeypatch.setenv(compile_cache.VARIABLE, str(tmp_path / 'variable'))
  assert compile_cache.use() and (tmp_path / 'variable').is_dir()
  compile_cache.stop()
  monkeypatch.delenv(compile_cache.VARIABLE)
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'xdg'))
  assert compile_cache.use()
  assert (tmp_path / 'xdg' / 'bilevel_jax' / 'programs').is_dir()
  compile_cache.stop()
  monkeypatch.setenv('XDG_CACHE_HOME', 'relative')
  monkeypatch.setenv('HOME', str(tmp_path / 'home'))
  home = tmp_path / 'home' / '.cache' / 'bilevel_jax' / 'programs'
  assert compile_cache.default_folder() == home


def test_jax_s_own_folder_takes_precedence(tmp_path):
  jax.config.update('jax_compilation_cache_dir', str(tmp_path / 'jax'))
  try:
    assert not compile_cache.use(tmp_path / 'ours')
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / 'jax')
    assert not (tmp_path / 'ours').exists()
  finally:
    jax.config.update('jax_compilation_cache_dir', None)


def test_least_recently_used_go_first(tmp_path):
  store = compile_cache.Store(tmp_path, max_bytes=3_500)
  stale, fresh = tmp_path / 'stale.tmp', tmp_path / 'fresh.tmp'
  for path in (stale, fresh):
    path.write_bytes(b'')
  os.utime(stale, (1, 1))
  for i, key in enumerate('abc'):
    store.put(key, bytes(1_000))
    for path in programs(tmp_path):
      if path.stat().st_mtime > 1_000:
        os.utime(path, (i + 1, i + 1))
  assert store.get('a') == bytes(1_000)  # Now it is the last one used.
  store.put('d', bytes(1_000))
  kept = {key for key in 'abcd' if store.get(key) is not None}
  assert kept == {'a', 'c', 'd'}
  assert not stale.exists() and fresh.exists()
  store.put('e', bytes(4_000))  # Larger than all.
  assert store.get('e') is None and store.get('d') is not None


def test_stores_share_a_folder(tmp_path):
  """Reads, writes and removals at once: what is read is right."""
  value = lambda key: (key * 7_001).encode()
  keys = [f'{i:03}' for i in range(30)]

  def work(seed):
    # No lock is shared, as between processes.
    store = compile_cache.Store(tmp_path, max_bytes=200_000)
    random, read = np.random.default_rng(seed), 0
    for key in random.choice(keys, 200):
      content = store.get(key)
      assert content in (None, value(key))
      read += content is not None
      if content is None:
        store.put(key, value(key))
    return read

  with concurrent.futures.ThreadPoolExecutor(4) as pool:
    assert sum(pool.map(work, range(4))) > 0
  left = sum(path.stat().st_size for path in programs(tmp_path))
  assert left <= 2 * 200_000
  assert not list(tmp_path.glob('*.tmp'))


SCRIPT = """
import sys
import jax, jax.numpy as jnp
from experiments.harness.app import compile_cache
names = []
jax.monitoring.register_event_listener(lambda name, **_: names.append(name))
assert compile_cache.use()
total = sum(
  jax.jit(lambda x: jnp.sum(jnp.tanh(x) * i))(jnp.arange(7.0)) for i in range(9)
)
print(float(total), sum('cache_hits' in name for name in names))
"""


@pytest.mark.slow
def test_processes_share_a_folder(tmp_path):
  """Four at once in an empty folder; then one that compiles nothing."""
  environment = os.environ | {compile_cache.VARIABLE: str(tmp_path)}
  start = lambda: subprocess.Popen(
    [sys.executable, '-c', SCRIPT],
    cwd=ROOT,
    env=environment,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )
  outputs = [p.communicate() for p in [start() for _ in range(4)]]
  outputs.append(start().communicate())
  assert {error for _, error in outputs} == {''}
  totals, hits = zip(*(out.split() for out, _ in outputs), strict=True)
  assert len(set(totals)) == 1
  assert int(hits[-1]) >= 9
