"""What a model says of rows, and what it learns of them: runs of `rank`."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel_jax as bj
from experiments import harness
from experiments.lm import batches, decoder, objectives, tables
from experiments.lm import tuning as tuning_lib
from experiments.seal import controls, order

FORMS = ('seal', 'seal_full')
# Of what leaves the frozen layers, for all rows of a file.
CACHE_BYTES = 8 * 2**30


class Made(NamedTuple):
  """Rows as a model takes them.

  Attributes:
    rows: arrays by name with a leading axis of rows: `tokens`, `mask`, and
      `tokens_x`, what leaves the frozen layers; of comparisons the same of
      `chosen` and `rejected`; and what a reference says, for a loss that has
      one.
    places: of each among the examples, (rows,).
    longest: tokens of the longest answer.
  """

  rows: tables.Rows
  places: np.ndarray
  longest: int


class Subject(NamedTuple):
  """A model, of which the last layers are trained.

  Attributes:
    tuning: what is trained.
    frozen: what is not.
    below: the layers under those that are trained, None without any.
    words: the tokeniser.
    shape: numbers of the losses.
  """

  tuning: tuning_lib.Tuning
  frozen: Any
  below: Any
  words: Any
  shape: objectives.Shape = objectives.Shape()

  def make(
    self,
    examples: Sequence[Any],
    longest: int,
    *,
    loss: str = 'sft',
    source: str = '',
    skip: bool = False,
  ) -> Made:
    """Encodes rows, those that fit, and runs the frozen layers once.

    Args:
      examples: the rows.
      longest: tokens of a prompt with its answer.
      loss: what for: of comparisons, or of what is to be learnt of them alone.
      source: where they are from, for messages.
      skip: whether to leave out rows that the model's template refuses.

    Raises:
      UserError: if none fits, one has no second answer and the loss is of
        comparisons, or what is to be held is too large.
    """
    pairs = loss in objectives.COMPARISONS
    if not pairs:
      examples = [one._replace(rejected=None) for one in examples]
    for one in examples:
      if pairs and one.rejected is None:
        raise harness.UserError(
          f'{source}: row {one.row} (from 0) has one answer, but {loss} '
          'compares two, chosen and rejected.'
        )
    encoded = batches.encode(
      self.words,
      examples,
      longest=longest,
      source=source,
      flag='--longest',
      skip=skip,
    )
    # One length for all sets: one program.
    table = tables.make(encoded, 1, buckets=(longest,))
    if self.below is not None:
      _require_room(len(encoded.rows) * (1 + pairs), longest, self.tuning)
      table = tuning_lib.cache(
        self.tuning.config, self.below, table, dtype=self.tuning.dtype
      )
    if loss in objectives.REFERENCED:
      table = objectives.reference_columns(self.tuning, self.frozen, table)
    rows = tables.rows_of(table)
    rows.pop('index')
    return Made(rows, np.array(encoded.places), table.longest[0])


def _require_room(rows: int, longest: int, how: tuning_lib.Tuning) -> None:
  """Raises UserError if what leaves the frozen layers cannot be held."""
  size = jnp.dtype(how.dtype or jnp.float32).itemsize
  needed = rows * longest * how.config.width * size
  if needed > CACHE_BYTES:
    raise harness.UserError(
      f'what leaves the frozen layers takes {needed / 2**30:.1f} GB for {rows} '
      f'rows of {longest} tokens, more than {CACHE_BYTES / 2**30:.0f}: with '
      '--layers=0 all layers get adapters and nothing is kept, at the price of '
      'a whole pass a step; or take a smaller --longest, or fewer rows at once.'
    )


def row_losses(
  subject: Subject, trained: Any, frozen: Any, rows: tables.Rows, longest: int
) -> jax.Array:
  """Minus the mean log-probability of each answer's tokens, (rows,)."""
  found = subject.tuning.answers(trained, frozen, rows, longest=longest)
  return -found.mean


def losses_of(
  name: str,
  subject: Subject,
  trained: Any,
  frozen: Any,
  rows: tables.Rows,
  longest: int,
) -> jax.Array:
  """The loss of each row by an objective, (rows,); `sft` is `row_losses`.

  Of `kto`, which compares rows, all have the same: that of the batch.
  """
  if name == 'sft':
    return row_losses(subject, trained, frozen, rows, longest)
  found = objectives.answers(
    name, subject.tuning, trained, frozen, rows, subject.shape, longest=longest
  )
  if name == 'kto':
    loss = objectives.of_answers(name, found, rows, subject.shape)
    return jnp.full(len(rows['chosen']), loss)
  return objectives.of_rows(name, found, rows, subject.shape)


def _by_parts(
  function: Callable[..., Any], rows: tables.Rows, size: int
) -> Any:
  """A function of rows, some at a time, as numpy arrays."""
  count = len(rows['tokens'])
  found = []
  for first in range(0, count, size):
    at = np.arange(first, first + size) % count  # One shape for all parts.
    part = jax.tree.map(
      np.asarray, function({n: r[at] for n, r in rows.items()})
    )
    found.append(jax.tree.map(lambda a, n=count - first: a[:n], part))
  return jax.tree.map(lambda *parts: np.concatenate(parts), *found)


def reader(
  subject: Subject, made: Made, *, size: int = 16
) -> Callable[[Any], tuple[np.ndarray, np.ndarray]]:
  """From adapters to losses of all answers' tokens, and which are tokens."""

  @jax.jit
  def one(trained, frozen, part):
    found = subject.tuning.answers(trained, frozen, part, longest=made.longest)
    return -found.log_probs, found.mask

  return lambda trained: _by_parts(
    lambda part: one(trained, subject.frozen, part), made.rows, size
  )


def representations(
  subject: Subject, trained: Any, made: Made, *, size: int = 16
) -> np.ndarray:
  """Means over an answer's tokens of what leaves the frozen layers.

  Of what leaves the last one if none is frozen; (rows, width).
  """

  @jax.jit
  def one(trained, frozen, part):
    x = part.get('tokens_x')
    if x is None:
      params = subject.tuning.params(trained, frozen)
      x = decoder.embed(params, part['tokens'], subject.tuning.dtype)
      x = decoder.run_layers(subject.tuning.config, params['layers'], x)
    mask = part['mask'][..., None]
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return jnp.sum(jnp.where(mask > 0, x, 0), 1) / jnp.sum(mask, 1)

  return _by_parts(
    lambda part: one(trained, subject.frozen, part), made.rows, size
  )


def gradient_similarity(
  subject: Subject, trained: Any, made: Made, safe: Made, *, size: int = 16
) -> np.ndarray:
  """The inner product of each row's gradient with that of the safe rows."""

  @jax.jit
  def slope(trained, frozen, part):
    loss = lambda t: row_losses(subject, t, frozen, part, safe.longest).sum()
    return jax.grad(loss)(trained)

  total: Any = None
  count = len(safe.places) - len(safe.places) % size or len(safe.places)
  for first in range(0, count, size):
    part = {n: r[first : first + size] for n, r in safe.rows.items()}
    one = slope(trained, subject.frozen, part)
    total = one if total is None else jax.tree.map(jnp.add, total, one)
  direction = controls.unit(total)

  @jax.jit
  def along(trained, frozen, part, direction):
    losses = lambda t: row_losses(subject, t, frozen, part, made.longest)
    return controls.by_gradient(losses, trained, direction)

  return _by_parts(
    lambda part: along(trained, subject.frozen, part, direction),
    made.rows,
    size,
  )


class Run(NamedTuple):
  """Where runs are kept, and what they are of.

  Attributes:
    options: of the binary.
    folder: of the run, below the workdir.
    identity: settings on which a run depends.
  """

  options: harness.Options
  folder: str
  identity: Any


def train(
  run: Run, subject: Subject, solver: Any, batch: Any, data: Any, steps: int
) -> harness.Trained:
  """Trains adapters; a batch also has the frozen weights, under `frozen`."""

  def init(context):
    return subject.tuning.init(context.frozen, context.key)

  return harness.train(
    solver,
    init,
    lambda context: {**batch(context), 'frozen': context.frozen},
    steps=steps,
    chunk=min(8, steps),
    seeds=run.options.seeds[:1],
    data=data,
    shard=False,
    frozen=subject.frozen,
    workdir=run.options.workdir,
    save_seconds=run.options.save_seconds,
    name=run.folder,
    settings=run.identity,
    # A softmax's divisor is summed anew in a branch.
    at_once=1,
  )


def take(rows: tables.Rows, at: Any) -> tables.Rows:
  """Some of the rows."""
  return {name: leaf[at] for name, leaf in rows.items()}


def fine_tuned(
  run: Run,
  subject: Subject,
  made: Made,
  *,
  steps: int,
  size: int,
  rate: float,
) -> Any:
  """The adapters after steps of fine-tuning on rows."""
  loss = lambda y, b: jnp.mean(
    row_losses(subject, y, b['frozen'], b['rows'], made.longest)
  )

  def batch(context):
    at = order.batch_at(context.seed_key, context.step, len(made.places), size)
    return {'rows': take(context.data, at)}

  solver = optax.chain(bj.gradient(loss), optax.adam(rate))
  found = train(run, subject, solver, batch, made.rows, steps)
  return jax.tree.map(lambda leaf: leaf[0], found.params)


class Selected(NamedTuple):
  """What `selected` gives.

  Attributes:
    scores: by which to keep rows, (rows,): of each visit.
    history: losses over the run, by name.
  """

  scores: np.ndarray
  history: dict[str, np.ndarray]


def selected(
  run: Run,
  subject: Subject,
  made: Made,
  safe: Made,
  *,
  epochs: int,
  size: int,
  rate: float,
  selector_rate: float,
  losses: tuple[str, str] = ('sft', 'sft'),
  weights: str = 'mirror',
  share: float = 1.0,
  decay: float = 0.03,
  full: bool = False,
) -> Selected:
  """Scores of rows by `bj.solvers.seal`, in whole epochs.

  Args:
    run: where it is kept.
    subject: the model.
    made: the rows to rank.
    safe: the safe rows, of which a step sees as many.
    epochs: of the rows to rank.
    size: rows in a batch.
    rate: of Adam, for the adapters.
    selector_rate: of descent, for the scores.
    losses: of the safe rows and of the rows to rank, names of `objectives`;
      rows are made for them.
    weights: as in `seal`.
    share: of the safe loss in the first epoch.
    decay: by which it falls each epoch.
    full: whether to take the form with a third sequence.

  Returns:
    A `Selected`. Scores are divided by visits, which differ by one where an
    epoch is not whole batches.
  """
  count = len(made.places)
  each = order.steps_of_epoch(count, size)
  held, own = losses
  below = lambda y, b: losses_of(
    own, subject, y, b['frozen'], b['rows'], made.longest
  )
  above = lambda y, b: jnp.mean(
    losses_of(held, subject, y, b['frozen'], b['safe'], safe.longest)
  )
  solver = bj.solvers.seal(
    above,
    below,
    rows=count,
    index=lambda b: b['index'],
    penalty=bj.solvers.seal_penalty(share, decay=decay, epoch=each),
    selector=optax.sgd(selector_rate),
    lower=optax.adam(rate),
    value=optax.adam(rate) if full else None,
    weights=weights,
  )

  def batch(context):
    key, step = context.seed_key, context.step
    at = order.batch_at(key, step, count, size)
    other = jax.random.fold_in(key, 1)
    there = order.batch_at(other, step, len(safe.places), size)
    return {
      'index': at,
      'rows': take(context.data['rows'], at),
      'safe': take(context.data['safe'], there),
    }

  found = train(
    run,
    subject,
    order.counted(solver, count, lambda b: b['index']),
    batch,
    {'rows': made.rows, 'safe': safe.rows},
    epochs * each,
  )
  scores = np.asarray(bj.auxiliaries(found.state)['selector'][0], np.float64)
  visits = np.asarray(found.state.visits[0])
  history = {n: h[:, 0] for n, h in found.history.items()}
  return Selected(scores / np.maximum(visits, 1), history)


def control_scores(
  subject: Subject,
  made: Made,
  safe: Made,
  anchors: Made | None,
  tuned: Callable[[], Any],
  texts: tuple[list[str], list[str]],
) -> dict[str, Callable[[], np.ndarray]]:
  """The controls by name, each to be called; losses are computed once.

  Args:
    subject: the model.
    made: the rows to rank.
    safe: the safe rows.
    anchors: unsafe rows, if there are any.
    tuned: gives the adapters after tuning on safe rows.
    texts: of the rows and of the safe ones.
  """
  start = subject.tuning.init(subject.frozen, jax.random.key(0))
  read = reader(subject, made)
  before = functools.cache(lambda: read(start))
  after = functools.cache(lambda: read(tuned())[0])
  of = lambda rows: representations(subject, start, rows)
  known: dict[str, Callable[[], np.ndarray]] = {
    'initial_loss': lambda: controls.by_loss(*before()),
    'tuned_loss': lambda: controls.by_loss(after(), before()[1]),
    'excess': lambda: controls.by_excess(after(), *before()),
    'excess_tokens': lambda: controls.by_excess_tokens(after(), *before()),
    'distance': lambda: controls.by_distance(of(made), of(safe)),
    'gradient': lambda: gradient_similarity(subject, start, made, safe),
    'ngrams': lambda: controls.hashed_ngrams(*texts),
    'longer': lambda: controls.by_length(before()[1]),
    'shorter': lambda: -controls.by_length(before()[1]),
    'random': lambda: controls.random(len(made.places), 0),
  }
  if anchors is not None:
    known['distance_both'] = lambda: controls.by_distance(
      of(made), of(safe), of(anchors)
    )
  return known
