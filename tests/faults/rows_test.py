"""Rows of mixed formats: read right, skipped with a reason, or one error."""

import json

import hypothesis
from hypothesis import strategies as st

from experiments import harness
from experiments.lm import data

# Valid rows with the example that each is, written out here and not computed.
WORDS = st.text('abc \u00e9\U0001f600\n"\\', min_size=1, max_size=9).filter(
  str.strip
)
HH = st.text('abc \u00e9', min_size=1, max_size=9).map(str.strip).filter(bool)


def turn(role, content):
  return {'role': role, 'content': content}


@st.composite
def dialogue(draw, contents):
  """Turns of a user and an assistant, the last one of the user."""
  texts = draw(st.lists(contents, min_size=1, max_size=5))
  texts = texts[: 2 * ((len(texts) - 1) // 2) + 1]
  roles = ('user', 'assistant')
  return [turn(roles[i % 2], text) for i, text in enumerate(texts)]


def hh(turns):
  """The text of a dialogue that waits for an answer."""
  marks = {'user': 'Human', 'assistant': 'Assistant'}
  text = ''.join(f'\n\n{marks[t["role"]]}: {t["content"]}' for t in turns)
  return f'{text}\n\nAssistant:'


def sharegpt(turns):
  names = {'user': 'human', 'assistant': 'gpt', 'system': 'system'}
  return [{'from': names[t['role']], 'value': t['content']} for t in turns]


@st.composite
def valid(draw):
  """A row, and its prompt, answer and second answer."""
  turns, answer, second = draw(dialogue(WORDS)), draw(WORDS), draw(WORDS)
  marked, ha, hb = draw(dialogue(HH)), draw(HH), draw(HH)
  question, more = draw(HH), draw(WORDS)
  user = lambda text: (turn('user', text),)
  last = turn('assistant', answer)
  system = [turn('system', more)]
  row, expected = draw(
    st.sampled_from(
      [
        ({'messages': [*turns, last]}, (turns, answer, None)),
        (
          {'messages': [*system, *turns, last]},
          ([*system, *turns], answer, None),
        ),
        (
          {'conversations': sharegpt([*turns, last])},
          (turns, answer, None),
        ),
        (
          {'conversations': sharegpt([*turns, last]), 'system': more},
          ([*system, *turns], answer, None),
        ),
        ({'prompt': question, 'response': answer}, (question, answer, None)),
        (
          {'prompt': question, 'completion': answer, 'label': True},
          (question, answer, None),
        ),
        ({'prompt': turns, 'completion': [last]}, (turns, answer, None)),
        (
          {'instruction': question, 'input': '', 'output': answer},
          (user(question), answer, None),
        ),
        (
          {'instruction': question, 'input': more, 'output': answer},
          (user(f'{question}\n\n{more}'), answer, None),
        ),
        (
          {'instruction': question, 'context': more, 'response': answer},
          (user(f'{question}\n\n{more}'), answer, None),
        ),
        (
          {'instruction': hh(marked), 'input': '', 'output': answer},
          (marked, answer, None),
        ),
        ({'prompt': hh(marked), 'response': answer}, (marked, answer, None)),
        (
          {'question': question, 'answer': answer},
          (user(question), answer, None),
        ),
        (
          {'prompt': question, 'chosen': answer, 'rejected': second},
          (question, answer, second),
        ),
        (
          {
            'prompt': turns,
            'chosen': [last],
            'rejected': [turn('assistant', second)],
          },
          (turns, answer, second),
        ),
        (
          {
            'chosen': [*turns, last],
            'rejected': [*turns, turn('assistant', second)],
          },
          (turns, answer, second),
        ),
        (
          {
            'chosen': f'{hh(marked)} {ha}',
            'rejected': f'{hh(marked)} {hb}',
          },
          (marked, ha, hb),
        ),
      ]
    )
  )
  prompt, *answers = expected
  prompt = prompt if isinstance(prompt, str) else tuple(prompt)
  extra = draw(
    st.dictionaries(
      st.sampled_from(['id', 'source', 'category', 'score_chosen', 'lang']),
      st.integers() | WORDS | st.none(),
      max_size=2,
    )
  )
  return {**row, **extra}, (prompt, *answers)


# What makes any of these rows invalid, with a word of the reason.
def _message(change):
  def apply(row):
    for value in row.values():
      if isinstance(value, list):
        value[-1] = {**value[-1], **change}
        return row
    return {
      'messages': [turn('user', 'a'), {**turn('assistant', 'b'), **change}]
    }

  return apply


SPOILED = [
  (lambda row: {**row, 'label': False}, 'label is false'),
  (lambda row: {**row, 'kto_tag': False}, 'the label is false'),
  (lambda row: {**row, 'tools': [{'name': 'f'}]}, 'tools is not supported'),
  (lambda row: {**row, 'images': ['a.png']}, 'images is not supported'),
  (_message({'tool_calls': [{'id': 0}]}), "field 'tool_calls'"),
  (_message({'name': 'Bo'}), "field 'name'"),
  (_message({'weight': 1}), "field 'weight'"),
  (_message({'thinking': 'Hm'}), "field 'thinking'"),
  (lambda row: {'messages': [turn('assistant', 'a')]}, 'no user turn'),
  (
    lambda row: {'messages': [turn('user', 'a'), turn('tool', 'b')]},
    "role 'tool'",
  ),
  (lambda row: {'texts': 'a'}, 'keys are'),
  (lambda row: [row], 'a list, expected an object'),
  (lambda row: None, 'a null, expected an object'),
]

LINES = st.one_of(
  valid().map(lambda v: (json.dumps(v[0]).encode(), v[1])),
  valid().map(lambda v: (json.dumps(v[0], ensure_ascii=False).encode(), v[1])),
  st.tuples(valid(), st.sampled_from(SPOILED)).map(
    lambda v: (json.dumps(v[1][0](v[0][0])).encode(), v[1][1])
  ),
  valid().map(lambda v: (json.dumps(v[0]).encode()[:-1], 'invalid JSON')),
  valid().map(
    lambda v: (json.dumps(v[0]).encode()[:-1] + b'\xff', 'not UTF-8')
  ),
  st.sampled_from([(b'', None), (b' \t\r', None)]),
)
# Any JSON under the keys that mean something.
ANY = st.recursive(
  st.none()
  | st.booleans()
  | st.integers()
  | st.floats()
  | st.text(max_size=5)
  | st.sampled_from(['\ud800', 'Human: a', hh([turn('user', 'a')]), 'user']),
  lambda inner: (
    st.lists(inner, max_size=3)
    | st.dictionaries(
      st.sampled_from(['role', 'content', 'from', 'value', 'output', 'x']),
      inner,
      max_size=3,
    )
  ),
  max_leaves=6,
)
KEYS = st.sampled_from(
  [
    *('messages', 'conversations', 'prompt', 'instruction', 'question'),
    *('response', 'completion', 'output', 'answer', 'input', 'context'),
    *('system', 'instances', 'chosen', 'rejected', 'label', 'tools', 'history'),
  ]
)


@hypothesis.settings(max_examples=150)
@hypothesis.given(
  lines=st.lists(LINES, min_size=1, max_size=8),
  mark=st.booleans(),
  windows=st.booleans(),
)
def test_each_row_is_read_right_or_has_a_reason(
  tmp_path_factory, lines, mark, windows
):
  path = tmp_path_factory.mktemp('rows') / 'rows.jsonl'
  end = b'\r\n' if windows else b'\n'
  path.write_bytes(b'\xef\xbb\xbf' * mark + end.join(line for line, _ in lines))
  numbered = [
    (at, what) for at, (_, what) in enumerate(lines, 1) if what is not None
  ]
  expected = [
    (number, *what)
    for number, (_, what) in enumerate(numbered)
    if not isinstance(what, str)
  ]
  reasons = [
    (f'{path}, line {at} (row {number} from 0): ', what)
    for number, (at, what) in enumerate(numbered)
    if isinstance(what, str)
  ]
  if not expected:
    for skip in (False, True):
      try:
        data.read(path, skip=skip)
        raise AssertionError('no row is valid')
      except harness.UserError as error:
        assert '\n' not in str(error)
    return
  content = data.read(path, skip=True)
  assert [tuple(one)[:4] for one in content.examples] == expected
  assert len(content.wrong) == len(reasons)
  for line, (place, word) in zip(content.wrong, reasons):
    assert line.startswith(place) and word in line and '\n' not in line
  assert [raw is None for raw in content.raw] == [
    isinstance(what, str) for _, what in numbered
  ]
  try:
    assert data.read(path, flag='--skip') == content and not reasons
  except harness.UserError as error:
    place, word = reasons[0]
    assert str(error).startswith(place) and word in str(error)
    assert str(error).endswith('--skip skips such rows.')


@hypothesis.settings(max_examples=300)
@hypothesis.given(row=st.dictionaries(KEYS, ANY, max_size=4))
def test_no_row_ends_in_a_traceback(row):
  try:
    examples = data.as_examples(row)
  except harness.UserError as error:
    assert str(error) and '\n' not in str(error)
    return
  for one in examples:
    texts = [one.answer, one.prompt]
    if not isinstance(one.prompt, str):
      assert one.prompt[-1]['role'] == 'user'
      texts = [one.answer, *(m['content'] for m in one.prompt)]
    for text in [*texts, one.rejected or '']:
      text.encode()
    assert one.answer.strip()


@hypothesis.given(raw=st.binary(max_size=60), name=st.sampled_from(['l', '']))
def test_no_file_ends_in_a_traceback(tmp_path_factory, raw, name):
  path = tmp_path_factory.mktemp('rows') / f'rows.json{name}'
  path.write_bytes(raw)
  for skip in (False, True):
    try:
      data.read(path, skip=skip)
    except harness.UserError as error:
      assert str(path) in str(error)
