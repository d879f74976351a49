"""Tests batches: whole epochs, one bucket a step, the same step by step."""

import jax
import numpy as np
import pytest

from experiments import harness
from experiments.speech import audio, feed


def _examples(lengths, broken=()):
  def load(row):
    if row in broken:
      raise audio.AudioError(f'utterance {row} is broken.', 'broken')
    return np.full(lengths[row], row + 1.0, np.float32)

  return feed.Examples(
    load=load,
    lengths=np.array(lengths),
    labels=[
      np.arange(1, 1 + row % 4, dtype=np.int32) for row in range(len(lengths))
    ],
    names=[f'u{row}' for row in range(len(lengths))],
    texts=['x'] * len(lengths),
  )


def _feed(plan, *, lengths=None, broken=(), seeds=(0, 1), count=12, **more):
  lengths = lengths or [3 + row % 7 for row in range(count)]
  rows = {
    'ctc': [np.arange(0, len(lengths), 2)] * len(seeds),
    'ssl': [np.arange(len(lengths))] * len(seeds),
  }
  return feed.Feed(
    _examples(lengths, broken),
    rows,
    np.array(plan),
    **{'edges': (6, 9), 'batch_size': 2, 'seeds': seeds} | more,
  )


def _names(part):
  """Rows of each member's part of a batch, (batch, members)."""
  return np.asarray(part['audio'])[:, :, 0].astype(int) - 1


def test_a_batch_has_what_its_step_asks_for_and_one_length():
  stream = _feed([0, 1, 2] * 4)
  for step, code in enumerate([0, 1, 2] * 4):
    batch = stream.batch(step)
    assert tuple(batch) == feed.STEPS[code]
    sizes = {part['audio'].shape for part in batch.values()}
    assert len(sizes) == 1 and sizes.pop()[:2] == (2, 2)
    for loss, part in batch.items():
      assert ('labels' in part) == (loss == 'ctc')
      for member in range(2):
        for i in range(2):
          row, n = _names(part)[i, member], part['length'][i, member]
          content = part['audio'][i, member]
          assert n == 3 + row % 7
          assert (content[:n] == row + 1).all() and not content[n:].any()
          if loss == 'ctc':
            assert row % 2 == 0
            count = part['label_length'][i, member]
            assert count == row % 4
            labels = part['labels'][i, member]
            assert labels[:count].tolist() == list(range(1, 1 + count))


def test_every_row_comes_once_an_epoch():
  lengths = [4] * 8
  stream = _feed([0] * 12, lengths=lengths, edges=(4,))
  rows = np.stack([_names(stream.batch(k)['ssl']) for k in range(12)])
  for member in range(2):
    for epoch in range(3):
      epoch_rows = rows[4 * epoch : 4 * epoch + 4, :, member].ravel()
      assert sorted(epoch_rows) == list(range(8))
  # Seeds and epochs have orders of their own.
  assert (rows[:, :, 0] != rows[:, :, 1]).any()
  assert (rows[:4] != rows[4:8]).any()


def test_buckets_have_their_shares_in_any_stretch():
  stream = _feed([1] * 200, lengths=[4] * 6 + [8] * 18, edges=(4, 8))
  long = np.array(
    [stream.batch(k)['ctc']['audio'].shape[2] == 8 for k in range(200)]
  )
  for start in range(0, 200, 40):
    assert 27 <= long[start : start + 40].sum() <= 33


def test_batches_go_on_where_a_run_was_ended():
  stream = _feed([0, 1, 1, 2, 1] * 3)
  batches = list(stream.batches(0))
  late = list(stream.batches(7))
  assert len(batches) == 15 and len(late) == 8
  for one, other in zip(batches[7:], late):
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_broken_audio_is_named_and_another_taken(capsys):
  stream = _feed([0] * 12, lengths=[4] * 8, edges=(4,), broken=(3,))
  rows = np.concatenate([_names(stream.batch(k)['ssl']) for k in range(12)])
  again = np.concatenate([_names(stream.batch(k)['ssl']) for k in range(12)])
  assert 3 not in rows and (rows == again).all()
  assert stream.broken == {'u3': 'broken'}
  assert capsys.readouterr().err.count('u3 is left out') == 1


def test_what_stands_for_broken_audio_has_its_own_transcript():
  stream = _feed([2] * 8, lengths=[4] * 8, edges=(4,), broken=(2,))
  for step in range(8):
    part = stream.batch(step)['ctc']
    rows = _names(part)
    assert 2 not in rows
    np.testing.assert_array_equal(part['label_length'], rows % 4)
  assert stream.broken == {'u2': 'broken'}


def test_a_bucket_without_transcripts_is_refused():
  with pytest.raises(harness.SettingsError, match='fewer buckets'):
    _feed([1], lengths=[4, 4, 4, 9], edges=(4, 9))
  # Nobody asks for transcripts here.
  _feed([0], lengths=[4, 4, 4, 9], edges=(4, 9))


def test_edges_divide_evenly_and_hold_the_longest():
  lengths = np.arange(1, 101)
  edges = feed.bucket_edges(lengths, 4, 10)
  assert edges == (30, 60, 80, 100)
  assert feed.bucket_edges(np.full(9, 7), 3, 5) == (10,)


def test_waste_is_the_share_of_padding():
  stream = _feed([0], lengths=[2, 4, 8, 8], edges=(4, 8), seeds=(0,))
  assert stream.waste() == pytest.approx(1 - 22 / 24)


def test_every_sample_and_every_label_tells_runs_apart():
  count = 101

  def describe(row=None, kind=None):
    stream = _examples([3 + row % 7 for row in range(count)], broken=(7,))
    labels = [one.copy() for one in stream.labels]
    if kind == 'label':
      labels[row][-1] += 1
    elif kind == 'moved':  # To the next transcript.
      labels[row + 1] = np.append(labels[row][-1:], labels[row + 1])
      labels[row] = labels[row][:-1]

    def load(i):
      samples = stream.load(i)
      samples[-1] += i == row and kind == 'sample'
      return samples

    examples = stream._replace(labels=labels, load=load)
    rows = {loss: [np.arange(count)] for loss in ('ctc', 'ssl')}
    fed = feed.Feed(
      examples, rows, np.array([1]), edges=(9,), batch_size=2, seeds=(0,)
    )
    assert not fed.files
    return fed.description()

  before = describe()
  assert before == describe()
  for kind in ('sample', 'label', 'moved'):
    for row in (1, 2, 50, 51, 90, 99):
      after = describe(row, kind)
      assert {k for k in after if after[k] != before[k]} == {
        'audio and transcripts'
      }


def test_audio_in_files_tells_runs_apart_by_their_bytes_and_places():
  parts = [
    audio.Part(f'{row // 2}.flac', '', 80 * (row % 2), 80, 16_000, 8_000)
    for row in range(6)
  ]

  def make(parts):
    examples = _examples([4] * 6)._replace(load=None, parts=parts)
    rows = {loss: [np.arange(6)] for loss in ('ctc', 'ssl')}
    return feed.Feed(
      examples, rows, np.array([1]), edges=(9,), batch_size=2, seeds=(0,)
    )

  stream = make(parts)
  assert stream.files == ('0.flac', '1.flac', '2.flac')
  other = make([*parts[:3], parts[3]._replace(first=81), *parts[4:]])
  assert other.files == stream.files
  assert other.description() != stream.description()
