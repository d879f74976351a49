"""Text to tokens and back, and dialogues to text by a model's own template.

Control tokens, such as the one that ends an answer, come from the template and
from this program only. Where a user's text holds the text of one, it is encoded
as plain text: `hide` marks it before the template is applied, and
`encode_rendered` keeps it plain.
"""

import functools
import json
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from experiments import harness
from experiments.lm import control_tokens
from experiments.lm.config import Config
from experiments.lm.control_tokens import MARK

# What splits text before merges, by the name that a GGUF file gives it.
_SPLITS = {
  'smollm': 'digits',
  'default': 'bytes',
  'gpt-2': 'bytes',
}
# Types of tokens in a GGUF file: control tokens, and words that are looked up
# before merges.
_CONTROL, _USER_DEFINED = 3, 4

Message = Mapping[str, str]


class Tokenizer(NamedTuple):
  """A tokeniser and its template.

  Attributes:
    inner: of the package `tokenizers`.
    template: in Jinja, of a dialogue; '' if the model has none.
    end: the number of the token that ends an answer.
    tokens: by name, what a template may use: 'bos_token', 'eos_token'.
  """

  inner: Any
  template: str
  end: int
  tokens: Mapping[str, str]

  def encode(self, text: str, *, first: bool = False) -> list[int]:
    """Numbers of the tokens of a trusted text, control tokens included.

    Args:
      text: any.
      first: whether a text begins here, so that the token comes before it that
        some models want there. A template writes it itself.

    Returns:
      The numbers.
    """
    return self.inner.encode(text, add_special_tokens=first).ids

  def encode_plain(self, text: str, *, first: bool = False) -> list[int]:
    """Numbers of the tokens of a user's text, none of them a control token.

    Args:
      text: any. The text of a control token is encoded as other text is.
      first: as in `encode`.

    Returns:
      The numbers; `decode` gives the text back, as far as it does for any.
    """
    controls = self.controls()
    if not controls.count(text):
      return self.encode(text, first=first)
    self.inner.encode_special_tokens = True
    try:
      ids = self.encode(text, first=first)
      if controls.unflagged.intersection(self.encode(text)):
        # The tokenizer file does not call these special: break their text.
        first_part, *parts = controls.fragments(text)
        ids = self.encode(first_part, first=first)
        ids += [i for part in parts for i in self.encode(part)]
    finally:
      self.inner.encode_special_tokens = False
    return ids

  def hide(self, message: Message) -> Message:
    """A message in which no text can become a control token.

    Args:
      message: with `role` and `content`.

    Returns:
      The same with marks, for `render` and then `encode_rendered`.
    """
    content = message['content']
    hidden = self.controls().broken(content.replace(MARK, 2 * MARK))
    return message if hidden == content else {**message, 'content': hidden}

  def encode_rendered(self, text: str) -> list[int]:
    """Numbers of the tokens of a rendered dialogue of hidden messages.

    Args:
      text: of `render`.

    Returns:
      The numbers. Control tokens are those of the template.
    """
    if MARK not in text:
      return self.encode(text)
    controls = self.controls()
    ids: list[int] = []
    for piece in controls.split(text):
      if piece in controls.numbers:
        ids.append(controls.numbers[piece])
      elif piece:
        ids += self.encode_plain(re.sub(f'{MARK}({MARK}?)', r'\1', piece))
    return ids

  def controls(self) -> control_tokens.Controls:
    """The control tokens: those called special, and the template's."""
    return control_tokens.find(self.inner, self.end, tuple(self.tokens.items()))

  def decode(self, tokens: Sequence[int]) -> str:
    """The text of tokens, special ones with it."""
    return self.inner.decode(list(tokens), skip_special_tokens=False)

  def numbers(self) -> dict[str, int]:
    """The number of each word, special ones with them."""
    return self.inner.get_vocab(with_added_tokens=True)

  def render(self, messages: Sequence[Message], *, answer: bool = False) -> str:
    """A dialogue as the model was trained to see it.

    Args:
      messages: each with `role` and `content`.
      answer: whether to end with what stands before an answer.

    Returns:
      The text.

    Raises:
      UserError: if there is no template, or it refuses the messages.
    """
    if not self.template:
      raise harness.UserError(
        'the model has no chat template: put one into its folder as '
        'chat_template.jinja, or give prompts as texts, with the keys prompt '
        'and response, not as messages, instructions, or dialogues of Human: '
        'and Assistant:.'
      )
    try:
      return _compiled(self.template).render(
        messages=[dict(m) for m in messages],
        add_generation_prompt=answer,
        **self.tokens,
      )
    except harness.UserError:
      raise
    except Exception as error:  # Whatever a template can do wrong.
      raise harness.UserError(
        f'the chat template does not take these messages: {error}'
      ) from error

  def save(self, folder: str | pathlib.Path) -> None:
    """Writes the files that `load` reads."""
    folder = pathlib.Path(folder)
    self.inner.save(str(folder / 'tokenizer.json'))
    told = {
      'tokenizer_class': 'PreTrainedTokenizerFast',
      **self.tokens,
      'chat_template': self.template,
    }
    (folder / 'tokenizer_config.json').write_text(
      json.dumps(told, indent=2, ensure_ascii=False) + '\n', encoding='utf-8'
    )


@functools.lru_cache(maxsize=8)
def _compiled(template: str) -> Any:
  """A template that sees nothing of this program; compiling it is slow."""
  sandbox = harness.load_extra('jinja2.sandbox', 'llm', 'a chat template')
  environment = sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True,
    lstrip_blocks=True,
    extensions=['jinja2.ext.loopcontrols'],
  )

  def refuse(message):
    raise harness.UserError(f'the chat template says: {message}')

  environment.globals['raise_exception'] = refuse
  environment.filters['tojson'] = lambda value, indent=None: json.dumps(
    value, ensure_ascii=False, indent=indent
  )
  return environment.from_string(template)


def load(vocabulary: Any, config: Config | None = None) -> Tokenizer:
  """The tokeniser of a model that `weights.load` has read.

  Args:
    vocabulary: a folder with `tokenizer.json`, or the fields of a GGUF file.
    config: of the model, to check that it has an embedding for every token.

  Returns:
    A `Tokenizer`.

  Raises:
    UserError: if files are missing, the vocabulary is of another kind, or it
      has tokens that the model has not.
  """
  if isinstance(vocabulary, Mapping):
    found = _from_fields(vocabulary)
  else:
    found = _from_folder(pathlib.Path(vocabulary))
  if config is not None:
    check(found, config)
  return found


def check(tokenizer: Tokenizer, config: Config) -> None:
  """Whether a tokeniser can be a model's.

  A model may have more rows than its tokeniser has tokens: they are padded.

  Raises:
    UserError: if it may give a number for which the model has no embedding; on
      a device that would be another token's, or no number, without a word.
  """
  numbers = tokenizer.numbers()
  word, largest = max(numbers.items(), key=lambda item: item[1])
  if largest >= config.vocabulary:
    raise harness.UserError(
      f'the tokeniser has the token {word!r} with the number {largest}, but '
      f'the model has embeddings for {config.vocabulary} only: they are not of '
      'one model, or tokens were added and the embedding was not made larger.'
    )


def _from_folder(folder: pathlib.Path) -> Tokenizer:
  tokenizers = harness.load_extra('tokenizers', 'llm', 'a tokeniser')
  path = folder / 'tokenizer.json'
  if not path.exists():
    raise harness.UserError(
      f'{folder} has no tokenizer.json; other formats are not read.'
    )
  inner = tokenizers.Tokenizer.from_file(str(path))
  given: dict[str, Any] = {}
  if (more := folder / 'tokenizer_config.json').exists():
    given = json.loads(more.read_text(encoding='utf-8'))
  template = given.get('chat_template') or ''
  if isinstance(template, list):  # Several, by name.
    template = {t['name']: t['template'] for t in template}.get('default', '')
  if (apart := folder / 'chat_template.jinja').exists():
    template = apart.read_text(encoding='utf-8')
  plain = lambda token: token['content'] if isinstance(token, dict) else token
  names = ('bos_token', 'eos_token', 'pad_token', 'unk_token')
  tokens = {n: plain(given[n]) for n in names if given.get(n)}
  end = inner.token_to_id(tokens.get('eos_token', ''))
  if end is None:
    raise harness.UserError(
      f'{folder}/tokenizer_config.json names no eos_token that '
      'tokenizer.json has: nothing would end an answer.'
    )
  return Tokenizer(inner, template, end, tokens)


def _from_fields(fields: Mapping[str, Callable[[], Any]]) -> Tokenizer:
  tokenizers = harness.load_extra('tokenizers', 'llm', 'a tokeniser')
  value = lambda name, default=None: (
    fields[name]() if name in fields else default
  )
  kind, split = value('ggml.model'), value('ggml.pre', 'default')
  if kind != 'gpt2' or split not in _SPLITS:
    raise harness.UserError(
      f'the tokeniser of the GGUF file is {kind!r} with the split {split!r}; '
      f"supported: 'gpt2' with {', '.join(_SPLITS)}. Take the folder of "
      'Hugging Face, with its tokenizer.json.'
    )
  words = value('ggml.tokens')
  pairs = [tuple(merge.split(' ', 1)) for merge in value('ggml.merges')]
  inner = tokenizers.Tokenizer(
    tokenizers.models.BPE(
      vocab={word: i for i, word in enumerate(words)},
      merges=pairs,
      fuse_unk=False,
    )
  )
  of_bytes = tokenizers.pre_tokenizers.ByteLevel(
    add_prefix_space=False, use_regex=True
  )
  if _SPLITS[split] == 'digits':
    alone = tokenizers.pre_tokenizers.Digits(individual_digits=True)
    of_bytes = tokenizers.pre_tokenizers.Sequence([alone, of_bytes])
  inner.pre_tokenizer = of_bytes
  inner.decoder = tokenizers.decoders.ByteLevel()
  kinds = value('ggml.token_type', [])
  inner.add_tokens(
    [
      tokenizers.AddedToken(
        words[i], special=kind == _CONTROL, normalized=False
      )
      for i, kind in enumerate(kinds)
      if kind in (_CONTROL, _USER_DEFINED)
    ]
  )
  end = int(value('ggml.eos_token_id'))
  tokens = {'eos_token': words[end]}
  if (first := value('ggml.bos_token_id')) is not None:
    tokens['bos_token'] = words[int(first)]
  return Tokenizer(inner, value('chat_template', ''), end, tokens)
