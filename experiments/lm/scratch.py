"""Small decoders that are trained from scratch on texts at hand.

The tokeniser is a byte-level BPE of the same texts, by the package
`tokenizers`; its template writes each turn with its role.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel_jax as bj
from experiments import harness
from experiments.lm import (
  batches,
  decoder,
  log_probs,
  tokenizer_files,
  weights,
)
from experiments.lm import config as config_lib
from experiments.lm import data as data_lib
from experiments.lm import tokenizer as tokenizer_lib

END = '<|end|>'


@dataclasses.dataclass(frozen=True)
class Scratch:
  """A decoder of Llama's family, and its training on texts.

  Attributes:
    depth: number of layers.
    width: width of the residual stream, a multiple of 2 heads.
    hidden: width of the feed-forward layers.
    heads: number of heads.
    vocabulary: number of tokens, with 256 bytes and the end.
    length: tokens of a row of texts.
    text_rows: rows of texts per update.
    updates: number of updates on texts.
    peak_rate: largest step size of Adam on texts; it decays to 0.
  """

  depth: int = 2
  width: int = 64
  hidden: int = 128
  heads: int = 4
  vocabulary: int = 1_024
  length: int = 96
  text_rows: int = 16
  updates: int = 2_000
  peak_rate: float = 3e-3


def config(sizes: Scratch, tokens: int) -> config_lib.Config:
  """Makes the config of a decoder with a number of tokens."""
  return config_lib.Config(
    family='llama',
    layers=sizes.depth,
    width=sizes.width,
    hidden=sizes.hidden,
    heads=sizes.heads,
    kv_heads=sizes.heads,
    head_width=sizes.width // sizes.heads,
    vocabulary=tokens,
    rope_base=1e4,
    norm_epsilon=1e-5,
    tied=True,
    context=4 * sizes.length,
  )


def make_tokenizer(
  texts: Sequence[str], vocabulary: int
) -> tokenizer_lib.Tokenizer:
  """Trains a tokeniser on texts.

  Args:
    texts: the texts.
    vocabulary: largest number of tokens, with 256 bytes and the end.

  Returns:
    A tokeniser with a template of roles.

  Raises:
    UserError: if the package `tokenizers` is not installed.
  """
  tokenizers = harness.load_extra('tokenizers', 'llm', 'a tokeniser')
  inner = tokenizers.Tokenizer(tokenizers.models.BPE())
  inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
    add_prefix_space=False
  )
  inner.decoder = tokenizers.decoders.ByteLevel()
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=vocabulary,
    special_tokens=[END],
    initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
    show_progress=False,
  )
  with tokenizer_files.parsing('the texts'):
    inner.train_from_iterator(texts, trainer)
  tokens = {'eos_token': END}
  return tokenizer_lib.Tokenizer(
    inner, tokenizer_lib.ROLES_TEMPLATE, inner.token_to_id(END), tokens
  )


def text_rows(
  tokenizer: tokenizer_lib.Tokenizer,
  examples: Sequence[data_lib.Example],
  length: int,
) -> np.ndarray:
  """Encodes dialogues one after another, cut into rows of one length.

  Args:
    tokenizer: the tokeniser.
    examples: prompts with their answers; rejected answers are left out.
    length: tokens of a row.

  Returns:
    int32 (rows, length).

  Raises:
    UserError: if the dialogues do not fill a row.
  """
  parts = [
    batches.encode_answer(tokenizer, example.prompt, example.answer)[0]
    for example in examples
  ]
  tokens = np.concatenate(parts) if parts else np.zeros(0, np.int32)
  count = len(tokens) // length
  if not count:
    raise harness.UserError(
      f'{len(examples)} dialogues have {len(tokens)} tokens, less than a row '
      f'of {length}: give more text, or shorter rows.'
    )
  return tokens[: count * length].reshape(count, length)


def pretrain(
  options: harness.Options,
  sizes: Scratch,
  tokenizer: tokenizer_lib.Tokenizer,
  examples: Sequence[data_lib.Example],
) -> weights.Model:
  """Trains a decoder to predict the tokens of texts.

  Args:
    options: options of the binary, with the folder of its runs.
    sizes: the decoder and its training.
    tokenizer: its tokeniser.
    examples: the texts.

  Returns:
    The trained model.
  """
  model = config(sizes, len(tokenizer.numbers()))
  rows = text_rows(tokenizer, examples, sizes.length)

  def loss(params, tokens):
    answers = log_probs.from_tokens(
      model, params, tokens, jnp.ones_like(tokens)
    )
    return bj.losses.sft(answers.log_probs, answers.mask)

  def batch(context):
    shape = (sizes.text_rows,)
    at = jax.random.randint(context.key, shape, 0, len(context.data))
    return context.data[at]

  solver = optax.chain(
    bj.gradient(loss, name='texts'),
    optax.clip_by_global_norm(1.0),
    optax.adam(optax.cosine_decay_schedule(sizes.peak_rate, sizes.updates)),
  )
  trained = harness.train(
    solver,
    harness.Task(
      lambda context: decoder.init(model, 0), batch, data=rows, shard=False
    ),
    harness.Training.from_options(
      options,
      steps=sizes.updates,
      chunk=-(-sizes.updates // 4),
      seeds=1,
      name='texts',
      settings=dataclasses.asdict(sizes),
    ),
  )
  params = jax.tree.map(lambda leaf: jnp.asarray(leaf[0]), trained.params)
  return weights.Model(model, params, None)
