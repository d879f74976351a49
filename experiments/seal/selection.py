"""Row losses, representations and learnt selection scores of a model."""

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
from experiments.seal.tuned_models import (
  EncodedRows,
  TunedModel,
  objective_losses,
  row_losses,
  take,
)

FORMS = ('seal', 'seal_full')


def _map_rows(
  function: Callable[..., Any], rows: tables.Rows, size: int
) -> Any:
  """Applies a function to `size` rows at a time; gives NumPy arrays."""
  count = len(rows['tokens'])
  outputs = []
  for first in range(0, count, size):
    at = np.arange(first, first + size) % count  # The same shape each time.
    output = jax.tree.map(np.asarray, function(take(rows, at)))
    outputs.append(jax.tree.map(lambda a, n=count - first: a[:n], output))
  return jax.tree.map(lambda *leaves: np.concatenate(leaves), *outputs)


def token_losses(
  model: TunedModel, encoded: EncodedRows, *, size: int = 16
) -> Callable[[Any], tuple[np.ndarray, np.ndarray]]:
  """Makes a function from adapters to losses (rows, tokens) and their mask."""

  @jax.jit
  def one(trained, frozen, rows):
    answers = model.tuning.answers(
      trained, frozen, rows, max_answer=encoded.max_length
    )
    return -answers.log_probs, answers.mask

  return lambda trained: _map_rows(
    lambda rows: one(trained, model.frozen, rows), encoded.rows, size
  )


def representations(
  model: TunedModel, trained: Any, encoded: EncodedRows, *, size: int = 16
) -> np.ndarray:
  """Means of hidden states over each answer's tokens, (rows, width).

  The hidden states are outputs of the last frozen layer, or of the last layer
  if none is frozen.
  """

  @jax.jit
  def one(trained, frozen, rows):
    x = rows.get('tokens_x')
    if x is None:
      params = model.tuning.params(trained, frozen)
      x = decoder.embed(params, rows['tokens'], model.tuning.dtype)
      x = decoder.run_layers(model.tuning.config, params['layers'], x)
    mask = rows['mask'][..., None]
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return jnp.sum(jnp.where(mask > 0, x, 0), 1) / jnp.sum(mask, 1)

  return _map_rows(
    lambda rows: one(trained, model.frozen, rows), encoded.rows, size
  )


def gradient_similarity(
  model: TunedModel,
  trained: Any,
  encoded: EncodedRows,
  safe: EncodedRows,
  *,
  size: int = 16,
) -> np.ndarray:
  """Inner products of row gradients with the safe gradient, (rows,)."""

  @jax.jit
  def gradient(trained, frozen, rows):
    loss = lambda t: row_losses(model, t, frozen, rows, safe.max_length).sum()
    return jax.grad(loss)(trained)

  total: Any = None
  count = len(safe.indices) - len(safe.indices) % size or len(safe.indices)
  for first in range(0, count, size):
    rows = take(safe.rows, slice(first, first + size))
    one = gradient(trained, model.frozen, rows)
    total = one if total is None else jax.tree.map(jnp.add, total, one)
  direction = controls.unit(total)

  @jax.jit
  def product(trained, frozen, rows, direction):
    losses = lambda t: row_losses(model, t, frozen, rows, encoded.max_length)
    return controls.by_gradient(losses, trained, direction)

  return _map_rows(
    lambda rows: product(trained, model.frozen, rows, direction),
    encoded.rows,
    size,
  )


class Run(NamedTuple):
  """Folder and identity of a training run.

  Attributes:
    options: of the binary.
    folder: of the run, below the workdir.
    identity: settings on which the run depends.
  """

  options: harness.Options
  folder: str
  identity: Any


def train(
  run: Run, model: TunedModel, solver: Any, batch: Any, data: Any, steps: int
) -> harness.Trained:
  """Trains adapters; batches also have the frozen weights, as `frozen`."""

  def init(context):
    return model.tuning.init(context.frozen, context.key)

  return harness.train(
    solver,
    harness.Task(
      init,
      lambda context: {**batch(context), 'frozen': context.frozen},
      data=data,
      shard=False,
      frozen=model.frozen,
    ),
    harness.Training.from_options(
      run.options,
      steps=steps,
      chunk=min(8, steps),
      seeds=run.options.seeds[:1],
      name=run.folder,
      settings=run.identity,
      # Mapped seeds would evaluate both branches: the rare one sums all scores.
      at_once=1,
    ),
  )


def fine_tune(
  run: Run,
  model: TunedModel,
  encoded: EncodedRows,
  *,
  steps: int,
  size: int,
  rate: float,
) -> Any:
  """Fine-tunes adapters on rows and gives the adapters."""
  loss = lambda y, b: jnp.mean(
    row_losses(model, y, b['frozen'], b['rows'], encoded.max_length)
  )
  count = len(encoded.indices)

  def batch(context):
    at = order.batch_at(context.seed_key, context.step, count, size)
    return {'rows': take(context.data, at)}

  solver = optax.chain(bj.gradient(loss), optax.adam(rate))
  trained = train(run, model, solver, batch, encoded.rows, steps)
  return jax.tree.map(lambda leaf: leaf[0], trained.params)


@dataclasses.dataclass(frozen=True)
class Selector:
  """How `bj.solvers.seal` learns the scores of rows.

  Attributes:
    epochs: epochs over the rows to rank; 3 in the paper.
    batch_size: rows of either kind in a step; 64 in the paper.
    rate: step size of the scores' descent.
    weights: how scores become weights of rows; 'softmax' in the paper, by Adam.
    mixing_ratio: weight of the safe loss in the first epoch, as in the paper.
    decay: decrease of this weight per epoch, as in the paper.
  """

  epochs: int = 2
  batch_size: int = 8
  rate: float = 1.0
  weights: Literal['softmax', 'mirror', 'sigmoid'] = 'mirror'
  mixing_ratio: Annotated[float, harness.Allowed(high=1.0)] = 1.0
  decay: Annotated[float, harness.Allowed(low=0.0, high=1.0)] = 0.03


class Selected(NamedTuple):
  """Results of `learn_scores`.

  Attributes:
    scores: mean score per visit, (rows,); the highest are kept.
    history: losses during the run, by name.
  """

  scores: np.ndarray
  history: dict[str, np.ndarray]


def learn_scores(
  run: Run,
  model: TunedModel,
  encoded: EncodedRows,
  safe: EncodedRows,
  selector: Selector,
  *,
  rate: float,
  losses: tuple[str, str] = ('sft', 'sft'),
  full: bool = False,
) -> Selected:
  """Learns scores of rows with `bj.solvers.seal`, in whole epochs.

  Args:
    run: folder and identity of the run.
    model: the model.
    encoded: the rows to rank.
    safe: the safe rows; a step reads as many as rows to rank.
    selector: how scores are learnt.
    rate: step size of Adam for the adapters.
    losses: objectives of the safe rows and of the rows to rank, for which the
      rows are encoded.
    full: whether to use the form with a third sequence.

  Returns:
    A `Selected`. Scores are divided by visits, which differ by one if an epoch
    is not a whole number of batches.
  """
  count = len(encoded.indices)
  size = min(selector.batch_size, count, len(safe.indices))
  epoch = order.steps_per_epoch(count, size)
  safe_objective, row_objective = losses
  lower = lambda y, b: objective_losses(
    row_objective, model, y, b['frozen'], b['rows'], encoded.max_length
  )
  upper = lambda y, b: jnp.mean(
    objective_losses(
      safe_objective, model, y, b['frozen'], b['safe'], safe.max_length
    )
  )
  solver = bj.solvers.seal(
    upper,
    lower,
    scores=bj.solvers.RowScores(
      optax.sgd(selector.rate), count, lambda b: b['index'], selector.weights
    ),
    penalty=bj.solvers.seal_penalty(
      selector.mixing_ratio, decay=selector.decay, epoch=epoch
    ),
    lower=optax.adam(rate),
    value=optax.adam(rate) if full else None,
  )
  trained = train(
    run,
    model,
    order.counted(solver, count, lambda b: b['index']),
    functools.partial(paired_batch, encoded, safe, size),
    {'rows': encoded.rows, 'safe': safe.rows},
    selector.epochs * epoch,
  )
  scores = np.asarray(bj.auxiliaries(trained.state)['selector'][0], np.float64)
  visits = np.asarray(trained.state.visits[0])
  history = {n: h[:, 0] for n, h in trained.history.items()}
  return Selected(scores / np.maximum(visits, 1), history)


def paired_batch(
  encoded: EncodedRows, safe: EncodedRows, size: int, context: Any
) -> Any:
  """Rows of a step, their indices as `index`, and as many safe rows."""
  key, step = context.seed_key, context.step
  at = order.batch_at(key, step, len(encoded.indices), size)
  safe_at = order.batch_at(
    jax.random.fold_in(key, 1), step, len(safe.indices), size
  )
  return {
    'index': at,
    'rows': take(context.data['rows'], at),
    'safe': take(context.data['safe'], safe_at),
  }


def control_scores(
  model: TunedModel,
  encoded: EncodedRows,
  safe: EncodedRows,
  reference_rows: EncodedRows | None,
  tune: Callable[[], Any],
  texts: tuple[list[str], list[str]],
) -> dict[str, Callable[[], np.ndarray]]:
  """Functions that compute the controls, by name; they share their losses.

  Args:
    model: the model.
    encoded: the rows to rank.
    safe: the safe rows.
    reference_rows: unsafe rows, or None.
    tune: gives the adapters after fine-tuning on the safe rows.
    texts: of the rows to rank and of the safe rows.
  """
  start = model.tuning.init(model.frozen, jax.random.key(0))
  losses = token_losses(model, encoded)
  before = functools.cache(lambda: losses(start))
  after = functools.cache(lambda: losses(tune())[0])
  represent = lambda rows: representations(model, start, rows)
  scores: dict[str, Callable[[], np.ndarray]] = {
    'initial_loss': lambda: controls.by_loss(*before()),
    'tuned_loss': lambda: controls.by_loss(after(), before()[1]),
    'excess': lambda: controls.by_excess(after(), *before()),
    'excess_tokens': lambda: controls.by_excess_tokens(after(), *before()),
    'distance': lambda: controls.by_distance(
      represent(encoded), represent(safe)
    ),
    'gradient': lambda: gradient_similarity(model, start, encoded, safe),
    'ngrams': lambda: controls.hashed_ngrams(*texts),
    'longer': lambda: controls.by_length(before()[1]),
    'shorter': lambda: -controls.by_length(before()[1]),
    'random': lambda: controls.random(len(encoded.indices), 0),
  }
  if reference_rows is not None:
    scores['distance_both'] = lambda: controls.by_distance(
      represent(encoded), represent(safe), represent(reference_rows)
    )
  return scores
