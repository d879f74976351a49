"""What a model says of rows, and what it learns of them: runs of `rank`."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel_jax as bj
from experiments import harness
from experiments.lm import decoder, tables
from experiments.seal import controls, order
from experiments.seal.subjects import Made, Subject, losses_of, row_losses, take

FORMS = ('seal', 'seal_full')


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
    found = subject.tuning.answers(
      trained, frozen, part, max_answer=made.longest
    )
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
    harness.Task(
      init,
      lambda context: {**batch(context), 'frozen': context.frozen},
      data=data,
      shard=False,
      frozen=subject.frozen,
    ),
    harness.Training.from_options(
      run.options,
      steps=steps,
      chunk=min(8, steps),
      seeds=run.options.seeds[:1],
      name=run.folder,
      settings=run.identity,
      # A branch sums a softmax's divisor again.
      at_once=1,
    ),
  )


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


@dataclasses.dataclass(frozen=True)
class Selector:
  """How scores of rows are learnt, by `bj.solvers.seal`.

  Attributes:
    epochs: of the rows to rank; the paper has 3.
    batch_size: rows of either kind a step; the paper has 64.
    rate: step size of the scores' descent.
    weights: of the rows; the paper has 'softmax', by Adam.
    share: of the safe loss in the first epoch; the paper's.
    decay: by which the share of the safe loss falls each epoch; the paper's.
  """

  epochs: int = 2
  batch_size: int = 8
  rate: float = 1.0
  weights: Literal['softmax', 'mirror', 'sigmoid'] = 'mirror'
  share: Annotated[float, harness.Allowed(high=1.0)] = 1.0
  decay: Annotated[float, harness.Allowed(low=0.0, high=1.0)] = 0.03


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
  selector: Selector,
  *,
  rate: float,
  losses: tuple[str, str] = ('sft', 'sft'),
  full: bool = False,
) -> Selected:
  """Scores of rows by `bj.solvers.seal`, in whole epochs.

  Args:
    run: where it is kept.
    subject: the model.
    made: the rows to rank.
    safe: the safe rows, of which a step sees as many.
    selector: how scores are learnt.
    rate: of Adam, for the adapters.
    losses: of the safe rows and of the rows to rank, names of `objectives`;
      rows are made for them.
    full: whether to take the form with a third sequence.

  Returns:
    A `Selected`. Scores are divided by visits, which differ by one where an
    epoch is not whole batches.
  """
  count = len(made.places)
  size = min(selector.batch_size, count, len(safe.places))
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
    scores=bj.solvers.RowScores(
      optax.sgd(selector.rate), count, lambda b: b['index'], selector.weights
    ),
    penalty=bj.solvers.seal_penalty(
      selector.share, decay=selector.decay, epoch=each
    ),
    lower=optax.adam(rate),
    value=optax.adam(rate) if full else None,
  )
  found = train(
    run,
    subject,
    order.counted(solver, count, lambda b: b['index']),
    functools.partial(paired_batch, made, safe, size),
    {'rows': made.rows, 'safe': safe.rows},
    selector.epochs * each,
  )
  scores = np.asarray(bj.auxiliaries(found.state)['selector'][0], np.float64)
  visits = np.asarray(found.state.visits[0])
  history = {n: h[:, 0] for n, h in found.history.items()}
  return Selected(scores / np.maximum(visits, 1), history)


def paired_batch(made: Made, safe: Made, size: int, context: Any) -> Any:
  """Rows of a step, with their places in `index`, and as many safe rows."""
  key, step = context.seed_key, context.step
  at = order.batch_at(key, step, len(made.places), size)
  other = jax.random.fold_in(key, 1)
  there = order.batch_at(other, step, len(safe.places), size)
  return {
    'index': at,
    'rows': take(context.data['rows'], at),
    'safe': take(context.data['safe'], there),
  }


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
