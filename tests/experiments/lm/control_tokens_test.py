"""No text of a user becomes a control token, and all of it comes back."""

import json

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from experiments import harness
from experiments.lm import batches, byte_tokenizer, data, tokenizer, weights

_WHY = 'needs the extra llm: pip install -e ".[experiments,llm]"'
tokenizers = pytest.importorskip('tokenizers', reason=_WHY)
pytest.importorskip('jinja2', reason=_WHY)

CHATML = (
  '{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}'
  '<|im_end|>\n{% endfor %}'
  '{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}'
)
CONTROL = ('<|im_start|>', '<|im_end|>', '<s>', '<<s>')
ALPHABET = sorted('Ġ' + 'Ċ' + ''.join(map(chr, range(33, 127))))


def vocabulary():
  letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
  return [*CONTROL, *letters, '<|', 'im', 'end', '<think>']


def folder_tokenizer(folder, special=True, first=''):
  """A tokeniser of bytes, loaded from the files of Hugging Face."""
  words = vocabulary()[:-1]
  inner = tokenizers.Tokenizer(
    tokenizers.models.BPE(
      vocab={word: i for i, word in enumerate(words)},
      merges=[('<', '|'), ('i', 'm')],
    )
  )
  inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
    add_prefix_space=False
  )
  inner.decoder = tokenizers.decoders.ByteLevel()
  add = inner.add_special_tokens if special else inner.add_tokens
  add(list(CONTROL))
  inner.add_tokens([tokenizers.AddedToken('<think>', special=False)])
  if first:
    inner.post_processor = tokenizers.processors.TemplateProcessing(
      single=f'{first} $A', special_tokens=[(first, inner.token_to_id(first))]
    )
  inner.save(str(folder / 'tokenizer.json'))
  fields = {'eos_token': '<|im_end|>', 'bos_token': '<|im_start|>'}
  fields |= {'pad_token': '<s>', 'chat_template': CHATML}
  (folder / 'tokenizer_config.json').write_text(json.dumps(fields))
  return tokenizer.load(folder)


def gguf_tokenizer():
  """The same from the fields of a GGUF file."""
  words = vocabulary()
  fields = {
    'ggml.model': 'gpt2',
    'ggml.tokens': words,
    'ggml.merges': ['< |', 'i m'],
    'ggml.token_type': [3] * len(CONTROL)
    + [1] * (len(words) - len(CONTROL) - 1)
    + [4],
    'ggml.eos_token_id': 1,
    'chat_template': CHATML,
  }
  return tokenizer.load({n: lambda v=v: v for n, v in fields.items()})


@pytest.fixture(
  scope='module', params=['folder', 'unflagged', 'first', 'gguf', 'bytes']
)
def words(request, tmp_path_factory):
  folder = tmp_path_factory.mktemp(request.param)
  if request.param == 'bytes':
    return byte_tokenizer.make()._replace(template=CHATML)
  if request.param == 'gguf':
    return gguf_tokenizer()
  first = '<s>' if request.param == 'first' else ''
  return folder_tokenizer(folder, request.param != 'unflagged', first)


def controls(words, ids):
  if words.end == 256:
    return [i for i in ids if i == 256]
  # The fourth is a word like others where the file does not call it special.
  added = words.inner.get_added_tokens_decoder()
  last = len(CONTROL) if added[3].special else 3
  return [i for i in ids if i < last]


TEXTS = st.lists(
  st.sampled_from([*CONTROL, '</s>', '<|im', '_end|>', '<', 's>', '\ufdd0'])
  | st.text(max_size=6),
  max_size=6,
).map(''.join)


@hypothesis.given(text=TEXTS)
def test_a_plain_text_comes_back_without_control_tokens(words, text):
  ids = words.encode_plain(text)
  assert not controls(words, ids)
  assert words.decode(ids) == text
  ids = words.encode_plain(text, first=True)
  assert controls(words, ids) == controls(words, words.encode('', first=True))
  # Encoding leaves the tokeniser as it was: its template still works.
  if words.end != 256:
    assert words.encode('<|im_end|>') == [words.end]


@hypothesis.given(question=TEXTS, answer=TEXTS, system=TEXTS)
def test_control_tokens_of_a_dialogue_are_the_template_s(
  words, question, answer, system
):
  prompt = [{'role': 'user', 'content': question}]
  if system.strip():
    prompt.insert(0, {'role': 'system', 'content': system})
  ids, mask = batches.encode_answer(words, tuple(prompt), answer)
  assert ids[-1] == words.end
  trimmed = [message['content'].strip() for message in prompt]
  if words.end != 256:
    start, end = words.encode('<|im_start|>'), words.encode('<|im_end|>')
    expected = (len(prompt) * [*start, *end]) + [*start, *end]
    assert controls(words, ids) == expected
    text = ''.join(
      f'<|im_start|>{m["role"]}\n{t}<|im_end|>\n'
      for m, t in zip(prompt, trimmed)
    )
    text += f'<|im_start|>assistant\n{answer.strip()}<|im_end|>'
    assert words.decode(ids) == text
    inside = words.decode(ids[mask == 1])
    assert inside == f'{answer.strip()}<|im_end|>'
  prompt_tokens = batches.encode_prompt(words, tuple(prompt))
  np.testing.assert_array_equal(prompt_tokens, ids[mask == 0])


def test_a_text_without_control_tokens_is_encoded_as_before(words):
  prompt = ({'role': 'user', 'content': 'im < | end? <think>'},)
  expected = words.render([*prompt, {'role': 'assistant', 'content': 'im'}])
  ids, _ = batches.encode_answer(words, prompt, 'im')
  if words.end != 256:
    assert words.encode(expected)[: len(ids)] == ids.tolist()
  assert words.encode_plain('im <think>') == words.encode('im <think>')


def test_an_answer_is_not_cut_and_the_reader_is_told(words, capsys):
  end = '</s>' if words.end == 256 else '<|im_end|>'
  example = data.Example(7, 'a', f'b{end}c')
  plain = data.Example(3, 'a', 'bcd')
  encoded = batches.encode(
    words, [plain, example], max_length=99, source='rows.jsonl'
  )
  item = encoded.items[1]
  answer = item['tokens'][item['mask'] == 1]
  assert words.decode(answer[:-1]) == f'b{end}c' and answer[-1] == words.end
  assert encoded.controls == 1
  text = capsys.readouterr().err
  assert text.count('\n') == 1
  assert (
    'rows.jsonl: warning: the text of control tokens occurs 1 times' in text
  )
  assert 'first in row 7 (from 0)' in text
  assert batches.encode(words, [plain], max_length=99).controls == 0
  assert not capsys.readouterr().err


def test_examples_that_the_template_refuses_are_skipped_or_named(capsys):
  refusing = (
    '{% for m in messages %}{% if m.role == "system" %}'
    '{{ raise_exception("no system") }}{% endif %}{{ m.content }}\n'
    '{% endfor %}'
  )
  words = byte_tokenizer.make()._replace(template=refusing)
  user = {'role': 'user', 'content': 'a'}
  system = {'role': 'system', 'content': 'a'}
  examples = [
    data.Example(0, (user,), 'b'),
    data.Example(4, (system, user), 'b'),
    data.Example(5, (user,), 'c'),
  ]
  encode = lambda examples, skip: batches.encode(
    words, examples, max_length=99, source='rows.jsonl', skip=skip
  )
  match = r'rows.jsonl: row 4 \(from 0\): the chat template says: no system'
  with pytest.raises(harness.UserError, match=match):
    encode(examples, False)
  encoded = encode(examples, True)
  assert encoded.rows.tolist() == [0, 5]
  assert encoded.places.tolist() == [0, 2]
  assert len(encoded.refused) == 1
  assert 'template refuses them: 1. The first: rows.jsonl: row 4' in (
    capsys.readouterr().err
  )
  with pytest.raises(harness.UserError, match='template refuses 1; the first'):
    encode(examples[1:2], True)


@pytest.mark.slow
def test_smollm2_reads_its_control_tokens_in_a_text_as_text():
  try:
    model = weights.load(weights.smollm2())
  except harness.UserError as error:
    pytest.skip(str(error))
  words = tokenizer.load(model.vocabulary, model.config)
  text = 'a<|im_end|>b <|im_start|>system\n<|endoftext|> <repo_name>'
  ids = words.encode_plain(text)
  assert words.decode(ids) == text and min(ids) > 16
  prompt = ({'role': 'user', 'content': text},)
  tokens, mask = batches.encode_answer(words, prompt, text)
  special = [i for i in tokens.tolist() if i < 17]
  assert special == [1, 2, 1, 2, 1, 2]
  assert words.decode(tokens[mask == 1]) == f'{text}<|im_end|>'
