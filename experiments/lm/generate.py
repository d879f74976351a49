r"""Answers prompts with a language model.

    python -m experiments.lm.generate --model=DIR --prompts=FILE.jsonl \
      --output=ANSWERS.jsonl

Expected: one answer per prompt, and their lengths. Time: on 2 cores, half an
hour for 640 answers of 64 tokens by the default model.

FILE has rows in any form of `experiments.lm.data`; their own answers are
ignored. Texts with turns after `Human:` and `Assistant:` are dialogues.
ANSWERS gets one line per prompt, in their order: `row`, the number in FILE;
`prompt`; `response`; `length` in tokens; and `ended`, false for an answer that
was cut. Such a file can be trained on, or compared by `experiments.lm.compare`.

Answers are stored in the workdir as they come: the same command continues after
a kill. `--adapters=DIR` adds adapters in the format of peft.
"""

import dataclasses
import json
import pathlib
import time
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

import jax
import numpy as np

from experiments import harness
from experiments.harness.app import progress
from experiments.harness.store import files, identity
from experiments.lm import (
  batches,
  generation,
  precision,
  row_files,
  weights,
)
from experiments.lm import data as data_lib
from experiments.lm import tokenizer as tokenizer_lib

# Stored answers in the workdir.
_STORE = 'answers.jsonl'
# Prompts of the preset `smoke`.
_MADE_UP = ('1234567:', 'Hello.', 'A prompt for the second bucket, of 64.')


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How the next token is chosen.

  Attributes:
    temperature: divides the logits; 0 takes the likeliest token.
    top_k: number of likeliest tokens to sample from; 0 for all.
    top_p: samples from the smallest set of likeliest tokens with at least this
      probability.
    seed: seed of the samples.
  """

  temperature: Annotated[float, harness.Allowed(low=0)] = 0.0
  top_k: Annotated[int, harness.Allowed(low=0)] = 0
  top_p: Annotated[float, harness.Allowed(high=1.0)] = 1.0
  seed: Annotated[int, harness.Allowed(low=0)] = 0

  def options(self) -> dict[str, Any]:
    """Options of `generation.make_generator`."""
    return {
      'temperature': self.temperature,
      'top_k': self.top_k or None,
      'top_p': None if self.top_p == 1 else self.top_p,
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(precision.Precision):
  """Settings of a run.

  Attributes:
    model: folder of Hugging Face or .gguf file; '' for SmolLM2-135M, 'random'
      for a small random model of bytes.
    adapters: folder of adapters in the format of peft; '' for none.
    prompts: file of prompts; '' for three made-up ones.
    output: file of the answers; '' for answers.jsonl in the workdir.
    limit: largest number of prompts, the first ones; 0 for all.
    max_prompt: longest prompt, in tokens.
    answer_length: longest answer, in tokens.
    batch_size: prompts answered together; more need more memory.
    bad_rows: whether invalid rows and longer prompts are refused or skipped.
    sampling: choice of the next token.
  """

  model: str = ''
  adapters: str = ''
  prompts: str = ''
  output: str = ''
  limit: Annotated[int, harness.Allowed(low=0)] = 0
  max_prompt: int = 1024
  answer_length: int = 256
  batch_size: int = 8
  bad_rows: Literal['refuse', 'skip'] = 'refuse'
  sampling: Sampling = Sampling()


PRESETS = {
  'user': Settings(),
  'smoke': Settings(model='random', answer_length=8),
}


def read(settings: Settings) -> tuple[list[data_lib.Example], list[str]]:
  """Reads the rows of the prompts, and one message per skipped row."""
  if not settings.prompts:
    return [data_lib.Example(i, t, '') for i, t in enumerate(_MADE_UP)], []
  content = data_lib.read(
    settings.prompts,
    skip=settings.bad_rows == 'skip',
    flag='--bad_rows=skip',
    prompts_only=True,
  )
  return content.examples[: settings.limit or None], content.wrong


def encode(
  settings: Settings,
  tokenizer: tokenizer_lib.Tokenizer,
  examples: Sequence[data_lib.Example],
  longest: int,
) -> tuple[list[data_lib.Example], list[list[int]], list[str]]:
  """Encodes prompts.

  Args:
    settings: of the run.
    tokenizer: tokeniser of the model.
    examples: rows of the prompts.
    longest: largest number of tokens.

  Returns:
    The rows that fit, their tokens, and one message per skipped row.

  Raises:
    UserError: if a prompt is too long or without tokens, unless such rows are
      skipped; or if none is left.
  """
  fitting, encoded, skipped = [], [], []
  for one in examples:
    tokens = batches.encode_prompt(tokenizer, one.prompt)
    if 0 < len(tokens) <= longest:
      fitting.append(one)
      encoded.append(tokens)
      continue
    reason = f'{len(tokens)} tokens, expected 1 to {longest}'
    message = f'{settings.prompts}, row {one.row} (from 0): {reason}.'
    if settings.bad_rows == 'refuse':
      raise harness.UserError(
        f'{message} --bad_rows=skip skips such rows; --max_prompt and the '
        'context of the model limit the length.'
      )
    skipped.append(message)
  if not fitting:
    raise harness.UserError(f'no prompt fits: {skipped[0]}')
  return fitting, encoded, skipped


def load(
  settings: Settings,
) -> tuple[weights.Model, tokenizer_lib.Tokenizer]:
  """Loads the model, with adapters merged, and its tokeniser."""
  dtype = settings.stored_dtype
  if settings.model == 'random':
    model, tokenizer = weights.make_random(dtype=dtype)
  else:
    model, tokenizer = weights.load_both(settings.model, dtype)
  return weights.merge_adapters(model, settings.adapters), tokenizer


def longest_prompt(settings: Settings, context: int) -> int:
  """Longest prompt that leaves room for its answer; `context` 0 is no limit."""
  room = context - settings.answer_length if context else settings.max_prompt
  if room < 1:
    raise harness.SettingsError(
      f'--answer_length={settings.answer_length} leaves no room for a prompt '
      f'in the context of the model, {context} tokens.'
    )
  return min(room, settings.max_prompt)


def buckets(lengths: Sequence[int], longest: int) -> tuple[int, ...]:
  """Lengths to which prompts are padded: powers of two, and the longest one."""
  needed = {min(max(32, 1 << (n - 1).bit_length()), longest) for n in lengths}
  return tuple(sorted(needed))


def answer(
  settings: Settings,
  model: weights.Model,
  tokenizer: tokenizer_lib.Tokenizer,
  prompts: Sequence[list[int]],
  folder: pathlib.Path,
) -> list[generation.Answer]:
  """Answers prompts, and stores each batch.

  Args:
    settings: of the run.
    model: the model.
    tokenizer: its tokeniser.
    prompts: tokens of the prompts.
    folder: folder of the stored answers. Those of an earlier run are used again
      if model, prompt and sampling were the same.

  Returns:
    The answers, in order.
  """
  choice = dataclasses.astuple(settings.sampling)
  run = (
    *(model.config, identity.digest(model.params), prompts, tokenizer.end),
    *(settings.compute, settings.answer_length, settings.batch_size, choice),
  )
  stamp = identity.digest_examples([np.frombuffer(str(run).encode(), np.uint8)])
  path = files.make_folder(folder) / _STORE
  done = {one.place: one for one in _stored(path, stamp)}
  generator = generation.make_generator(
    model.config,
    new=settings.answer_length,
    end=tokenizer.end,
    dtype=settings.compute_dtype,
    **settings.sampling.options(),
  )
  bar = progress.Progress('answers', len(prompts), len(done))
  if done:
    print(f'Answers of an earlier run that are used again: {len(done)}.')
  start, tokens, rate = time.monotonic(), 0, ''
  with files.locked(folder), path.open('a', encoding='utf-8') as file:
    file.write('\n')  # A kill may have left an incomplete line.
    for batch in generation.stream(
      tokenizer,
      generator,
      model.params,
      prompts,
      key=jax.random.key(settings.sampling.seed),
      buckets=buckets([len(one) for one in prompts], settings.max_prompt),
      rows=settings.batch_size,
      skip=done,
    ):
      for one in batch:
        done[one.place] = one
        with files.writing(folder):
          file.write(files.seal({'run': stamp, **one._asdict()}) + '\n')
      with files.writing(folder):
        file.flush()
      tokens += sum(one.length + one.ended for one in batch)
      rate = f'{tokens / (time.monotonic() - start):.3g} tokens/s'
      bar.update(len(done), rate)
  bar.close()
  if tokens:
    # With the time for compilation and for reading the prompts.
    print(f'Tokens of new answers: {tokens}, {rate}.')
  return [done[place] for place in range(len(prompts))]


def _stored(path: pathlib.Path, stamp: str) -> Iterator[generation.Answer]:
  """Yields the answers of a run; leaves out damaged lines."""
  for line in path.read_bytes().splitlines() if path.exists() else []:
    try:
      values = files.unseal(line)
    except ValueError:
      continue
    if values.pop('run', '') == stamp:
      yield generation.Answer(**values)


def write(
  path: pathlib.Path,
  examples: Sequence[data_lib.Example],
  answers: Sequence[generation.Answer],
) -> None:
  """Writes one line per prompt."""
  lines = []
  for one, own in zip(examples, answers, strict=True):
    prompt: Any = one.prompt
    row = {
      'row': one.row,
      'prompt': prompt if isinstance(prompt, str) else list(map(dict, prompt)),
      'response': own.text,
      'length': own.length,
      'ended': own.ended,
    }
    lines.append(json.dumps(row, ensure_ascii=False) + '\n')
  files.write_text(path, ''.join(lines))
  print(f'Answers: {path}')


def main(options: harness.Options) -> harness.Report:
  """Answers all prompts and writes them."""
  settings = options.settings
  if not settings.prompts and options.preset != 'smoke':
    raise harness.MissingDataError(
      '--prompts is missing: give a file of prompts, such as a .jsonl file '
      'with lines {"prompt": "..."}.'
    )
  examples, wrong = read(settings)
  model, tokenizer = load(settings)
  longest = longest_prompt(settings, model.config.context)
  examples, prompts, too_long = encode(settings, tokenizer, examples, longest)
  if skipped := wrong + too_long:
    print(row_files.describe(settings.prompts, skipped))
  folder = pathlib.Path(options.workdir)
  answers = answer(settings, model, tokenizer, prompts, folder / 'stored')
  write(pathlib.Path(settings.output or folder / _STORE), examples, answers)
  results = harness.Results()
  results.add(
    answers=len(answers),
    skipped=len(skipped),
    mean_length=np.mean([one.length for one in answers]),
    ended=np.mean([one.ended for one in answers]),
  )
  return harness.Report(results, rows=())


STUDY = harness.Study(main, PRESETS)


if __name__ == '__main__':
  harness.run(STUDY)
