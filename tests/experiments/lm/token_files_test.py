"""Rows and tokens that stay on disk are those of tables in memory."""

import gzip
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import harness
from experiments.lm import (
  batches,
  byte_tokenizer,
  data,
  stored_examples,
  tables,
  token_files,
)

EXAMPLES = [
  data.Example(i, f'{i}:', 'abcdefgh'[: 1 + i % 7], 'z' * (1 + i % 3))
  for i in range(23)
]
DEMONSTRATIONS = [one._replace(rejected=None) for one in EXAMPLES]


def encode(folder, examples, called=None):
  """Encodes examples into a list and into a file."""

  def run(items=None):
    if called is not None:
      called.append(items)
    words = byte_tokenizer.make()
    return batches.encode(words, examples, max_length=9, items=items)

  return run(), token_files.load_or_encode(folder, 'all inputs', run)


@pytest.mark.parametrize('examples', [EXAMPLES, DEMONSTRATIONS])
def test_batches_are_those_of_a_table_in_memory(tmp_path, examples):
  memory, stored = encode(tmp_path, examples)
  assert 0 < memory.too_long == stored.too_long
  for name in ('rows', 'lengths', 'places'):
    np.testing.assert_array_equal(getattr(stored, name), getattr(memory, name))
  # Every third example is left out, as by a split.
  at = np.flatnonzero(np.arange(len(memory.items)) % 3)
  select = lambda encoded, items: tables.make(
    encoded._replace(
      items=items, rows=encoded.rows[at], lengths=encoded.lengths[at]
    ),
    2,
    buckets=(6, 9),
    columns={'score': at},
  )
  one = select(memory, [memory.items[i] for i in at])
  two = select(stored, stored.items.select(at))
  assert one.max_answers == two.max_answers and one.batches == two.batches
  params = jnp.arange(300.0)

  def function(params, rows, max_answer):
    masks = [rows[n] for n in rows if n.endswith('mask')]
    tokens = [rows[n] for n in ('tokens', 'chosen', 'rejected') if n in rows]
    terms = [jnp.sum(params[t] * m) for t, m in zip(tokens, masks, strict=True)]
    return jnp.sum(jnp.stack(terms) ** 2) + jnp.sum(rows['score']) + max_answer

  results = []
  for table in (one, two):
    gradient = jax.value_and_grad(tables.numbered_loss(function, table))
    run = jax.jit(
      lambda params, gradient=gradient: jax.lax.map(
        lambda k: gradient(params, k), jnp.arange(12)
      )
    )
    results.append(run(params))
  jax.tree.map(np.testing.assert_array_equal, *results)
  for bucket in (0, 1):
    (whole,) = one.chunks(bucket, 3)
    pieces = list(two.chunks(bucket, 3))
    assert len(pieces) > 1
    for name in pieces[0]:
      joined = np.concatenate([piece[name] for piece in pieces])
      np.testing.assert_array_equal(joined, whole[name])


def test_a_file_is_encoded_once_and_again_if_it_is_damaged(tmp_path):
  called = []
  _, first = encode(tmp_path, EXAMPLES, called)
  _, second = encode(tmp_path, EXAMPLES, called)
  # Twice into a list, once into a file.
  assert len(called) == 3
  jax.tree.map(np.testing.assert_array_equal, first.items[3], second.items[3])
  (path,) = tmp_path.glob('*.bin')
  raw = bytearray(path.read_bytes())
  raw[5] ^= 1
  path.write_bytes(raw)
  with pytest.warns(RuntimeWarning, match='damaged; encoding again'):
    _, third = encode(tmp_path, EXAMPLES, called)
  assert len(called) == 5
  np.testing.assert_array_equal(third.items.digest, first.items.digest)


def test_examples_are_parsed_when_they_are_read(tmp_path):
  path = tmp_path / 'rows.jsonl'
  task = {'instruction': 'Add', 'instances': [{'output': '3'}, {'output': '4'}]}
  rows = [{'prompt': 'a', 'response': 'é'}, task, {'text': 'b'}, {'no': 1}]
  lines = [json.dumps(row, ensure_ascii=False).encode() for row in rows]
  path.write_bytes(b'\xef\xbb\xbf' + b'\n\n'.join([*lines, b'{', lines[0]]))
  for kind, count in ((None, 5), ('demonstrations', 5)):
    stored = stored_examples.StoredExamples(path)
    expected = data.read(path, skip=True, kind=kind)
    content = data.read(path, skip=True, kind=kind, store=stored)
    assert content.wrong == expected.wrong and not content.raw
    assert [*stored] == expected.examples and len(stored) == count
    assert stored[2] == expected.examples[2]
  path.write_bytes(path.read_bytes().replace(b'3', b'"'))
  with pytest.raises(harness.UserError, match=r'row 1 .* the file was changed'):
    stored[1]


def test_lists_do_not_stay_on_disk(tmp_path):
  path = tmp_path / 'rows.json'
  path.write_text('[]')
  match = r'only in \.jsonl and \.jsonl\.gz files: save it'
  with pytest.raises(harness.UserError, match=match):
    data.read(path, store=stored_examples.StoredExamples(path))


def test_packed_files_are_unpacked_once(tmp_path, capsys):
  path, kept = tmp_path / 'rows.jsonl.gz', tmp_path / 'kept'
  rows = [{'prompt': f'{i}', 'response': i * 'é'} for i in range(1, 5)]
  lines = [json.dumps(row, ensure_ascii=False).encode() for row in rows]
  # Joined files.
  parts = [b'\n'.join(lines[:3]) + b'\n', b'\n'.join(lines[3:])]
  path.write_bytes(b''.join(map(gzip.compress, parts)))
  for _ in range(2):
    stored = stored_examples.StoredExamples(path, kept)
    data.read(path, store=stored)
    assert list(stored) == data.read(path).examples and len(stored) == 4
  assert capsys.readouterr().out.count('is unpacked to') == 1
  (unpacked,) = kept.glob('rows-*.jsonl')
  assert unpacked.read_bytes() == b''.join(parts)
  path.write_bytes(gzip.compress(parts[0]))
  stored = stored_examples.StoredExamples(path, kept)
  data.read(path, store=stored)
  assert len(stored) == 3
  path.write_bytes(path.read_bytes()[:-9])
  with pytest.raises(harness.UserError, match=r'rows\.jsonl\.gz'):
    stored_examples.StoredExamples(path, kept)
  assert len(list(kept.glob('*.jsonl'))) == 2


def test_several_files_have_to_be_joined(tmp_path):
  for name in ('a.jsonl,b.jsonl', '*.jsonl'):
    with pytest.raises(harness.UserError, match=r'joined: `cat A\.jsonl B'):
      data.read(tmp_path / name)
  with pytest.raises(harness.UserError, match=r'or join them: `cat A'):
    data.read(tmp_path)


def test_packed_rows_are_those_of_a_table_in_memory(tmp_path):
  """Also texts, whose first token has no prediction."""
  texts = [one._replace(prompt='') for one in DEMONSTRATIONS]
  for number, examples in enumerate((DEMONSTRATIONS, texts)):
    memory, stored = encode(tmp_path / str(number), examples)
    at = np.flatnonzero(np.arange(len(memory.items)) % 3)
    one, two = (
      tables.packed(
        encoded._replace(items=items, lengths=encoded.lengths[at]), 2, length=20
      )
      for encoded, items in (
        (memory, [memory.items[i] for i in at]),
        (stored, stored.items.select(at)),
      )
    )
    assert one.max_answers == two.max_answers and one.batches == two.batches
    drawn = [
      jax.jit(lambda k, table=table: table.take(0, k))(3)
      for table in (one, two)
    ]
    assert drawn[0].keys() == drawn[1].keys()
    jax.tree.map(np.testing.assert_array_equal, *drawn)
    assert len(set(drawn[0]['segments'][0].tolist())) > 2
  other = tables.packed(
    stored._replace(
      items=stored.items.select(at[1:]), lengths=stored.lengths[at[1:]]
    ),
    2,
    length=20,
  )
  assert other.digest.tobytes() != two.digest.tobytes()
