"""The methods, as plans of steps, and their one solver.

The upper problem is recognition, by a head of its own; the lower one is a loss
of audio alone, by another head. The encoder is shared. Since the lower loss has
no part of the recogniser's head, the value function of the lower problem is a
constant, and the penalty method needs no third sequence: its step weighs the
gradient of the encoder alone, and leaves both heads theirs.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Annotated, Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import optax

import bilevel_jax as bj
from experiments import harness
from experiments.speech import feed

TITLES = {
  'supervised': 'supervised',
  'supervised_longer': 'supervised, as many gradients as BL-JUST',
  'pretrain': 'pre-training, then fine-tuning',
  'joint': 'weighted sum',
  'bl_just': 'BL-JUST',
  'no_exploration': 'BL-JUST without exploration',
  'no_tuning': 'BL-JUST without final fine-tuning',
}
_SSL, _BOTH, _CTC = range(len(feed.STEPS))


@dataclasses.dataclass(frozen=True)
class Shares:
  """Parts of a run.

  Attributes:
    pretraining: share of the updates of `pretrain` on audio alone.
    exploring: share of BL-JUST's updates on audio alone.
    tuning: share of the final fine-tuning, on transcripts alone.
    rounds: of exploration and joint updates.
  """

  pretraining: Annotated[float, harness.Allowed(0, 1)] = 0.4
  exploring: Annotated[float, harness.Allowed(0, 1)] = 0.1
  tuning: Annotated[float, harness.Allowed(0, 1)] = 0.1
  rounds: int = 5


def gradients(plan: np.ndarray) -> dict[str, int]:
  """Gradients of either loss in a plan, by name."""
  has = lambda loss: sum(
    int(np.sum(plan == code))
    for code, step in enumerate(feed.STEPS)
    if loss in step
  )
  return {loss: has(loss) for loss in ('ctc', 'ssl')}


def plan(method: str, steps: int, shares: Shares) -> np.ndarray:
  """Codes of `feed.STEPS` of the updates of a method.

  Args:
    method: one of `TITLES`.
    steps: updates; of `supervised_longer`, those of the others.
    shares: parts of a run.

  Returns:
    One code an update, int8.
  """
  part = lambda share: round(share * steps)
  full = lambda count, code: np.full(count, code, np.int8)
  if method == 'supervised':
    return full(steps, _CTC)
  if method == 'supervised_longer':
    longer = sum(gradients(plan('bl_just', steps, shares)).values())
    return full(longer, _CTC)
  if method == 'pretrain':
    first = part(shares.pretraining)
    return np.concatenate([full(first, _SSL), full(steps - first, _CTC)])
  exploring = method in ('bl_just', 'no_tuning')
  explored = part(shares.exploring) if exploring else 0
  tuned = 0 if method == 'no_tuning' else part(shares.tuning)
  rounds = shares.rounds if explored else 1
  joint = steps - explored - tuned
  parts = []
  for i in range(rounds):
    share = lambda count, i=i: count * (i + 1) // rounds - count * i // rounds
    parts += [full(share(explored), _SSL), full(share(joint), _BOTH)]
  return np.concatenate([*parts, full(tuned, _CTC)])


class Steps(NamedTuple):
  """Step sizes of AdamW and the penalty.

  Attributes:
    rate: the largest of recognition and of joint updates, after a warm-up;
      falls to a hundredth by a cosine.
    audio: of updates on audio alone.
    tuning: of the final fine-tuning.
    penalty: the largest weight of the loss of audio in joint updates; rises
      linearly from 0, or is constant in `joint`.
    decay: of the weights, a unit of the step size.
    clip: the largest norm of an encoder's or a head's gradient.
    warm: updates of the warm-up.
  """

  rate: Any
  audio: Any
  tuning: Any
  penalty: Any
  decay: float = 1e-2
  clip: float = 5.0
  warm: int = 100


class TurnsState(NamedTuple):
  """The states of the solvers that take turns, by the losses of a step."""

  solvers: dict[str, Any]


def in_turns(
  solvers: Mapping[str, optax.GradientTransformation],
) -> optax.GradientTransformationExtraArgs:
  """Solvers of one set of sequences, told apart by the keys of a batch.

  Each has its own moments and its own count of schedules; only the one whose
  turn it is moves.

  Args:
    solvers: by the names of a batch's parts, sorted and joined by '+'.

  Returns:
    A solver whose batch is a mapping.
  """

  def init_fn(params):
    return TurnsState({name: one.init(params) for name, one in solvers.items()})

  def update_fn(batch, state, params=None, **extra):
    turn = '+'.join(sorted(batch))
    updates, mine = solvers[turn].update(
      batch, state.solvers[turn], params, **extra
    )
    return updates, TurnsState(state.solvers | {turn: mine})

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def solver(
  method: str,
  order: np.ndarray,
  steps: Steps,
  ctc: Callable[[Any, Any], Any],
  ssl: Callable[[Any, Any], Any],
) -> optax.GradientTransformationExtraArgs:
  r"""The solver of a method, for the sequences encoder, recogniser, predictor.

  .. math::
    \theta_{k+1} &= \theta_k - \alpha_k u(\nabla_\theta L_{CTC}(\theta_k,
      \phi_k) + \gamma_k \nabla_\theta L_{ssl}(\theta_k, \eta_k)) \\
    \phi_{k+1} &= \phi_k - \alpha_k u(\nabla_\phi L_{CTC}), \qquad
    \eta_{k+1} = \eta_k - \alpha_k u(\nabla_\eta L_{ssl})

  in joint updates; in those of one loss, its gradients alone.

  Args:
    method: one of `TITLES`.
    order: the plan.
    steps: step sizes.
    ctc: the loss of transcripts, of (sequences, its part of a batch).
    ssl: the loss of audio alone, likewise.

  Returns:
    A solver. `bj.values` gives `ctc`, `ssl` of joint updates, `exploration` and
    `supervised` of the others.

  Source: Saif, Cui, Shen, Lu, Kingsbury and Chen, Joint Unsupervised and
  Supervised Training for Automatic Speech Recognition via Bilevel Optimization,
  2024.
  """
  counts = {code: int(np.sum(order == code)) for code in (_SSL, _BOTH, _CTC)}

  def warmed(count):
    warm = min(steps.warm, max(count // 10, 1))
    return lambda k: jnp.minimum((k + 1) / warm, 1.0)

  def falling(peak, count):
    cosine = optax.cosine_decay_schedule(1.0, count, 0.01)
    warm = warmed(count)
    return lambda k: peak * warm(k) * cosine(k)

  def flat(peak, count):
    warm = warmed(count)
    return lambda k: peak * warm(k)

  def moves(rate, *names):
    link = optax.chain(
      optax.clip_by_global_norm(steps.clip),
      optax.adamw(rate, b2=0.98, weight_decay=steps.decay),
    )
    return dict.fromkeys(names, link)

  made = {}
  if counts[_SSL]:
    make = falling if method == 'pretrain' else flat
    made['ssl'] = bj.descend(
      bj.gradient(
        lambda z, batch: ssl(z, batch['ssl']),
        name='exploration',
        of=('encoder', 'predictor'),
      ),
      **moves(make(steps.audio, counts[_SSL]), 'encoder', 'predictor'),
    )
  if counts[_BOTH]:
    weight = steps.penalty
    if method != 'joint':
      ramp = max(counts[_BOTH] - 1, 1)
      weight = lambda k: steps.penalty * jnp.minimum(k / ramp, 1.0)
    made['ctc+ssl'] = bj.descend(
      bj.oracles.aggregated(
        bj.multi_objective(
          [ctc, ssl],
          ('ctc', 'ssl'),
          rest=('recogniser', 'predictor'),
          per_task=True,
        ),
        bj.aggregators.scale_by_penalty(weight, rescale=False),
      ),
      **moves(
        falling(steps.rate, counts[_BOTH]), 'encoder', 'recogniser', 'predictor'
      ),
    )
  if counts[_CTC]:
    rate = falling(steps.rate, counts[_CTC])
    if counts[_BOTH]:
      rate = falling(steps.tuning, counts[_CTC])
    made['ctc'] = bj.descend(
      bj.gradient(
        lambda z, batch: ctc(z, batch['ctc']),
        name='supervised',
        of=('encoder', 'recogniser'),
      ),
      **moves(rate, 'encoder', 'recogniser'),
    )
  return in_turns(made)
