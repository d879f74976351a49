"""Converts text to tokens and back, and dialogues to text by a chat template.

Control tokens, such as the end of an answer, come only from the template and
from this program. Their text within a user's text is encoded as plain text:
`hide` marks it before the template is applied, and `encode_rendered` keeps it
plain.
"""

import json
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from experiments import harness
from experiments.lm import checked_files, control_tokens
from experiments.lm.config import Config
from experiments.lm.control_tokens import MARK

# Pre-tokenisers by their names in GGUF files.
_SPLITS = {
  'smollm': 'digits',
  'default': 'bytes',
  'gpt-2': 'bytes',
}
# Most characters of a chat template.
_MOST_TEMPLATE = 2**20
# Types of tokens in GGUF files. User-defined tokens match before merges.
_CONTROL, _USER_DEFINED = 3, 4

Message = Mapping[str, str]


class Tokenizer(NamedTuple):
  """A tokeniser with a chat template.

  Attributes:
    inner: a tokeniser of the package `tokenizers`.
    template: the chat template in Jinja; '' without one.
    end: number of the token that ends an answer.
    tokens: special tokens by name for the template: 'bos_token', 'eos_token'.
    source: file of the template, for messages.
    vocabulary: file of the tokens, for messages.
  """

  inner: Any
  template: str
  end: int
  tokens: Mapping[str, str]
  source: str = ''
  vocabulary: str = 'the model'

  def encode(self, text: str, *, first: bool = False) -> list[int]:
    """Encodes a trusted text, with control tokens.

    Args:
      text: any text.
      first: whether to prepend the start token that some models need. A
        template writes it itself.

    Returns:
      Token numbers.
    """
    return self.inner.encode(text, add_special_tokens=first).ids

  def encode_plain(self, text: str, *, first: bool = False) -> list[int]:
    """Encodes a user's text, without control tokens.

    Args:
      text: any text; the text of a control token is encoded as plain text.
      first: as in `encode`.

    Returns:
      Token numbers.
    """
    controls = self.controls()
    if not controls.count(text):
      return self.encode(text, first=first)
    self.inner.encode_special_tokens = True
    try:
      ids = self.encode(text, first=first)
      if controls.unflagged.intersection(self.encode(text)):
        # The file does not flag these as special: splits their text.
        first_part, *parts = controls.fragments(text)
        ids = self.encode(first_part, first=first)
        ids += [i for part in parts for i in self.encode(part)]
    finally:
      self.inner.encode_special_tokens = False
    return ids

  def hide(self, message: Message) -> Message:
    """Marks the texts of control tokens in a message.

    Args:
      message: message with `role` and `content`.

    Returns:
      The message with marks, for `render` and then `encode_rendered`.
    """
    content = message['content']
    hidden = self.controls().mark(content.replace(MARK, 2 * MARK))
    return message if hidden == content else {**message, 'content': hidden}

  def encode_rendered(self, text: str) -> list[int]:
    """Encodes a rendered dialogue of messages from `hide`.

    Args:
      text: text from `render`.

    Returns:
      Token numbers, with the control tokens of the template only.
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
    """Returns the control tokens."""
    return control_tokens.find(self.inner, self.end, tuple(self.tokens.items()))

  def decode(self, tokens: Sequence[int]) -> str:
    """Decodes tokens, including special ones."""
    return self.inner.decode(list(tokens), skip_special_tokens=False)

  def numbers(self) -> dict[str, int]:
    """Returns the number of each token, including special ones."""
    return self.inner.get_vocab(with_added_tokens=True)

  def render(self, messages: Sequence[Message], *, answer: bool = False) -> str:
    """Renders a dialogue by the chat template.

    Args:
      messages: messages with `role` and `content`.
      answer: whether to append the opening of an answer.

    Returns:
      The text.

    Raises:
      UserError: if there is no template, or it refuses the messages.
    """
    if not self.template:
      raise harness.UserError(
        'the model has no chat template: put one into its folder as '
        'chat_template.jinja, or give prompts as texts (keys prompt and '
        'response) instead of messages, instructions or dialogues.'
      )
    templates = harness.load_extra(
      'experiments.lm.chat_templates', 'llm', 'a chat template'
    )
    variables = {
      'messages': [dict(m) for m in messages],
      'add_generation_prompt': answer,
      **self.tokens,
    }
    place = f'{self.source}: ' if self.source else ''
    try:
      return templates.render(self.template, variables)
    except harness.UserError as error:
      raise harness.UserError(f'{place}{error}') from error
    except Exception as error:  # Templates may raise anything.
      raise harness.UserError(
        f'{place}the chat template fails for these messages: '
        f'{checked_files.one_line(error)}'
      ) from error

  def save(self, folder: str | pathlib.Path) -> None:
    """Writes the files that `load` reads."""
    folder = pathlib.Path(folder)
    self.inner.save(str(folder / 'tokenizer.json'))
    fields = {
      'tokenizer_class': 'PreTrainedTokenizerFast',
      **self.tokens,
      'chat_template': self.template,
    }
    (folder / 'tokenizer_config.json').write_text(
      json.dumps(fields, indent=2, ensure_ascii=False) + '\n', encoding='utf-8'
    )


def load(vocabulary: Any, config: Config | None = None) -> Tokenizer:
  """Loads the tokeniser of a model.

  Args:
    vocabulary: a folder with `tokenizer.json`, or the fields of a GGUF file,
      from `weights.load`.
    config: config of the model, to check the size of its embedding; or None.

  Returns:
    A `Tokenizer`.

  Raises:
    UserError: if files are missing, the vocabulary is not supported, or a token
      has no embedding.
  """
  if isinstance(vocabulary, Mapping):
    tokenizer = _from_fields(vocabulary)
  else:
    tokenizer = _from_folder(pathlib.Path(vocabulary))
  if config is not None:
    check(tokenizer, config)
  return tokenizer


def check(tokenizer: Tokenizer, config: Config) -> None:
  """Checks that a model has an embedding for each token.

  An embedding may have more rows than there are tokens.

  Raises:
    UserError: if a token has no embedding; a device would silently use another
      one or NaN.
  """
  numbers = tokenizer.numbers()
  word, largest = max(numbers.items(), key=lambda item: item[1])
  if largest >= config.vocabulary:
    raise harness.UserError(
      f'{tokenizer.vocabulary}: the tokeniser has the token {word!r} with the '
      f'number {largest}, but the model has only {config.vocabulary} '
      'embeddings: take the tokeniser of the model, or enlarge the embedding '
      'for added tokens.'
    )


def _from_folder(folder: pathlib.Path) -> Tokenizer:
  path = folder / 'tokenizer.json'
  if not checked_files.exists(path):
    raise harness.UserError(
      f'{folder} has no tokenizer.json; other formats are not supported.'
    )
  inner = _read_vocabulary(path, folder)
  config_file = folder / 'tokenizer_config.json'
  fields: dict[str, Any] = {}
  if checked_files.exists(config_file):
    fields = checked_files.read_json(config_file, folder)
  template, source = _chat_template(config_file, fields), config_file
  if checked_files.exists(template_file := folder / 'chat_template.jinja'):
    source = template_file
    template = checked_files.read_text(source, folder, _MOST_TEMPLATE)
  tokens = {}
  for name in ('bos_token', 'eos_token', 'pad_token', 'unk_token'):
    if token := fields.get(name):
      token = token.get('content') if isinstance(token, dict) else token
      tokens[name] = checked_files.typed(config_file, {name: token}, name, str)
  end = inner.token_to_id(tokens.get('eos_token', ''))
  if end is None:
    raise harness.UserError(
      f'{config_file} has no eos_token of tokenizer.json: set the token that '
      'ends an answer.'
    )
  return Tokenizer(inner, template, end, tokens, str(source), str(path))


def _read_vocabulary(path: pathlib.Path, folder: pathlib.Path) -> Any:
  """Reads a `tokenizer.json`; raises DamagedDataError."""
  tokenizers = harness.load_extra('tokenizers', 'llm', 'a tokeniser')
  text = checked_files.read_text(path, folder)
  with harness.parsing(path, 'tokeniser'):
    inner = tokenizers.Tokenizer.from_str(text)
    # Prompts are never cut or padded by the tokeniser.
    inner.no_truncation()
    inner.no_padding()
    numbers = inner.get_vocab(with_added_tokens=True).values()
  if len(set(numbers)) < len(numbers) or not numbers:
    raise harness.DamagedDataError(
      f'{path} has no tokens, or several tokens of one number.'
    )
  if getattr(inner.model, 'dropout', None) is not None:
    raise harness.DamagedDataError(
      f'{path} has dropout={inner.model.dropout}, which splits words at '
      'random: set it to null.'
    )
  return inner


def _chat_template(path: pathlib.Path, fields: Mapping[str, Any]) -> str:
  """Returns the default template of a `tokenizer_config.json`; '' if unset."""
  template = fields.get('chat_template') or ''
  if isinstance(template, list):  # Several templates by name.
    named = [t for t in template if isinstance(t, dict) and 'name' in t]
    if len(named) < len(template):
      raise harness.DamagedDataError(
        f'{path} has chat_template without names, expected a text or a list of '
        'name and template.'
      )
    template = {str(t['name']): t.get('template') for t in named}
    template = template.get('default') or ''
  if not isinstance(template, str) or len(template) > _MOST_TEMPLATE:
    raise harness.DamagedDataError(
      f'{path} has no text of at most {_MOST_TEMPLATE:,} characters for '
      'chat_template.'
    )
  return template


def _from_fields(fields: Mapping[str, Callable[[], Any]]) -> Tokenizer:
  source = fields['file']() if 'file' in fields else 'the GGUF file'
  with harness.parsing(source, 'tokeniser'):
    values = {name: field() for name, field in fields.items()}
  kind, split = values.get('ggml.model'), values.get('ggml.pre', 'default')
  if kind != 'gpt2' or split not in _SPLITS:
    raise harness.UserError(
      f'{source}: the tokeniser is {kind!r} with the split {split!r}; '
      f"supported: 'gpt2' with {', '.join(_SPLITS)}. Give the folder of "
      'Hugging Face with its tokenizer.json.'
    )
  words = _listed(source, values, 'ggml.tokens', str)
  merges = _listed(source, values, 'ggml.merges', str)
  kinds = _listed(source, values, 'ggml.token_type', int)
  if len(set(words)) < len(words) or len(kinds) > len(words):
    raise harness.DamagedDataError(
      f'{source} has a token twice, or more entries of ggml.token_type than '
      'tokens.'
    )
  template = values.get('chat_template', '')
  checked_files.typed(source, values, 'chat_template', str, '')
  with harness.parsing(source, 'tokeniser'):
    inner = _byte_pairs(words, merges, kinds, _SPLITS[split])
  most = len(words) - 1
  end = checked_files.integer(source, values, 'ggml.eos_token_id', 0, most)
  tokens = {'eos_token': words[end]}
  if values.get('ggml.bos_token_id') is not None:
    first = checked_files.integer(source, values, 'ggml.bos_token_id', 0, most)
    tokens['bos_token'] = words[first]
  return Tokenizer(inner, template, end, tokens, str(source), str(source))


def _listed(
  source: Any, values: Mapping[str, Any], name: str, kind: type
) -> list[Any]:
  """Returns a list of values of a type; only token types may be missing."""
  default = [] if kind is int else None
  listed = checked_files.typed(source, values, name, list, default)
  if not all(type(one) is kind for one in listed):
    raise harness.DamagedDataError(
      f'{source} has {name} with other values than {kind.__name__}.'
    )
  return listed


def _byte_pairs(
  words: Sequence[str], merges: Sequence[str], kinds: Sequence[int], split: str
) -> Any:
  """Makes the tokeniser of a GGUF file."""
  tokenizers = harness.load_extra('tokenizers', 'llm', 'a tokeniser')
  pairs = [tuple(merge.split(' ', 1)) for merge in merges]
  if wrong := [pair for pair in pairs if len(pair) < 2]:
    raise ValueError(f'the merge {wrong[0][0]!r} has one part')
  inner = tokenizers.Tokenizer(
    tokenizers.models.BPE(
      vocab={word: i for i, word in enumerate(words)},
      merges=pairs,
      fuse_unk=False,
    )
  )
  splitter = tokenizers.pre_tokenizers.ByteLevel(
    add_prefix_space=False, use_regex=True
  )
  if split == 'digits':
    digits = tokenizers.pre_tokenizers.Digits(individual_digits=True)
    splitter = tokenizers.pre_tokenizers.Sequence([digits, splitter])
  inner.pre_tokenizer = splitter
  inner.decoder = tokenizers.decoders.ByteLevel()
  inner.add_tokens(
    [
      tokenizers.AddedToken(
        words[i], special=kind == _CONTROL, normalized=False
      )
      for i, kind in enumerate(kinds)
      if kind in (_CONTROL, _USER_DEFINED)
    ]
  )
  return inner
