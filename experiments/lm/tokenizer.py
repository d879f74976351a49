"""Converts text to tokens and back, and dialogues to text by a chat template.

Control tokens, such as the end of an answer, come only from the template and
from this program. Their text within a user's text is encoded as plain text:
`hide` marks it before the template is applied, and `encode_rendered` keeps it
plain.
"""

import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from experiments import harness
from experiments.lm import checked_files, control_tokens, tokenizer_files
from experiments.lm.config import Config
from experiments.lm.control_tokens import MARK

Message = Mapping[str, str]
# A chat template that writes each turn with its role.
ROLES_TEMPLATE = (
  "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{{ eos_token }}"
  '\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}'
)


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
    with tokenizer_files.parsing(self.vocabulary):
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
    parts = tokenizer_files.from_fields(vocabulary)
  else:
    parts = tokenizer_files.from_folder(pathlib.Path(vocabulary))
  tokenizer = Tokenizer(*parts)
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
