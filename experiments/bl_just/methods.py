"""The compared methods: plans of steps, and their solver.

The upper problem is recognition, the lower problem a self-supervised loss. They
share an encoder and have separate heads. The lower loss does not depend on the
recogniser's head, so its value function is a constant, and the penalty method
needs no third sequence: the penalty scales the encoder's gradient alone.
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
MEANINGS = {
  'supervised': 'recognition loss on transcripts alone.',
  'supervised_longer': 'the same with as many gradients as BL-JUST.',
  'pretrain': 'self-supervised updates first, then recognition.',
  'joint': 'weighted sum of both losses.',
  'bl_just': 'self-supervised exploration, both losses by a penalty, tuning.',
  'no_exploration': 'bl_just without updates on audio alone.',
  'no_tuning': 'bl_just without the final updates on transcripts alone.',
}
_SSL, _BOTH, _CTC = range(len(feed.STEPS))


@dataclasses.dataclass(frozen=True)
class Shares:
  """Phases of a run, as fractions of its updates.

  Attributes:
    pretraining: fraction of the updates of `pretrain` on audio alone.
    exploring: fraction of the updates of BL-JUST on audio alone.
    tuning: fraction of the final fine-tuning, on transcripts alone.
    rounds: number of rounds of exploration and joint updates.
  """

  pretraining: Annotated[float, harness.Allowed(0, 1)] = 0.4
  exploring: Annotated[float, harness.Allowed(0, 1)] = 0.1
  tuning: Annotated[float, harness.Allowed(0, 1)] = 0.1
  rounds: int = 5


def gradients(plan: np.ndarray) -> dict[str, int]:
  """Counts the gradients of each loss in a plan."""
  counts = np.bincount(plan, minlength=len(feed.STEPS))
  return {
    loss: sum(int(n) for n, step in zip(counts, feed.STEPS) if loss in step)
    for loss in ('ctc', 'ssl')
  }


def plan(method: str, steps: int, shares: Shares) -> np.ndarray:
  """Makes the plan of a method: the code in `feed.STEPS` of each update.

  Args:
    method: one of `TITLES`.
    steps: number of updates; `supervised_longer` takes more.
    shares: phases of a run.

  Returns:
    int8 (updates,).
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


class StepSizes(NamedTuple):
  """Step sizes of AdamW and the penalty.

  Attributes:
    rate: peak step size of recognition and joint updates, with a warm-up and a
      cosine decay to a hundredth.
    audio: step size of updates on audio alone.
    exploration: schedule of `audio` in exploration: 'constant' as published, or
      'decaying' with the joint updates.
    tuning: peak step size of the final fine-tuning.
    penalty: largest weight of the self-supervised loss in joint updates; rises
      linearly from 0, or is constant in `joint`.
    decay: weight decay.
    clip: largest gradient norm of the encoder and of each head.
    warmup_steps: updates of the warm-up.
  """

  rate: Any
  audio: Any
  tuning: Any
  penalty: Any
  decay: float = 1e-2
  clip: float = 5.0
  warmup_steps: int = 100
  exploration: str = 'constant'


class TurnsState(NamedTuple):
  """States of the alternating solvers by the losses of a step."""

  solvers: dict[str, Any]


def in_turns(
  solvers: Mapping[str, optax.GradientTransformation],
) -> optax.GradientTransformationExtraArgs:
  """Alternates between solvers of the same sequences by the keys of a batch.

  Each solver has its own moments and step count.

  Args:
    solvers: solvers by the sorted keys of their batches, joined by '+'.

  Returns:
    A solver whose batch is a mapping.
  """

  def init_fn(params):
    return TurnsState({name: one.init(params) for name, one in solvers.items()})

  def update_fn(batch, state, params=None, **extra):
    turn = '+'.join(sorted(batch))
    updates, turn_state = solvers[turn].update(
      batch, state.solvers[turn], params, **extra
    )
    return updates, TurnsState(state.solvers | {turn: turn_state})

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def solver(
  method: str,
  order: np.ndarray,
  steps: StepSizes,
  ctc: Callable[[Any, Any], Any],
  ssl: Callable[[Any, Any], Any],
) -> optax.GradientTransformationExtraArgs:
  r"""Makes the solver of a method for encoder, recogniser and predictor.

  .. math::
    \theta_{k+1} &= \theta_k - \alpha_k u(\nabla_\theta L_{CTC}(\theta_k,
      \phi_k) + \gamma_k \nabla_\theta L_{ssl}(\theta_k, \eta_k)) \\
    \phi_{k+1} &= \phi_k - \alpha_k u(\nabla_\phi L_{CTC}), \qquad
    \eta_{k+1} = \eta_k - \alpha_k u(\nabla_\eta L_{ssl})

  in joint updates; other updates have the gradients of one loss.

  Args:
    method: one of `TITLES`.
    order: the plan.
    steps: step sizes.
    ctc: (sequences, part of a batch) -> loss of transcripts.
    ssl: (sequences, part of a batch) -> loss of audio alone.

  Returns:
    A solver. `bj.values` has `ctc` and `ssl` of joint updates, `exploration` of
    updates on audio alone and `supervised` of those on transcripts alone.

  Source: Saif, Cui, Shen, Lu, Kingsbury and Chen, Joint Unsupervised and
  Supervised Training for Automatic Speech Recognition via Bilevel Optimization,
  2024.
  """
  counts = {code: int(np.sum(order == code)) for code in (_SSL, _BOTH, _CTC)}

  def constant(peak, count):
    warmup = min(steps.warmup_steps, max(count // 10, 1))
    return lambda k: peak * jnp.minimum((k + 1) / warmup, 1.0)

  def decaying(peak, count):
    cosine = optax.cosine_decay_schedule(1.0, count, 0.01)
    warmed = constant(peak, count)
    return lambda k: warmed(k) * cosine(k)

  def optimisers(rate, *names):
    optimiser = optax.chain(
      optax.clip_by_global_norm(steps.clip),
      optax.adamw(rate, b2=0.98, weight_decay=steps.decay),
    )
    return dict.fromkeys(names, optimiser)

  solvers = {}
  if counts[_SSL]:
    decays = method == 'pretrain' or steps.exploration == 'decaying'
    rate = (decaying if decays else constant)(steps.audio, counts[_SSL])
    solvers['ssl'] = bj.descend(
      bj.gradient(
        lambda z, batch: ssl(z, batch['ssl']),
        name='exploration',
        of=('encoder', 'predictor'),
      ),
      **optimisers(rate, 'encoder', 'predictor'),
    )
  if counts[_BOTH]:
    weight = steps.penalty
    if method != 'joint':
      ramp = max(counts[_BOTH] - 1, 1)
      weight = lambda k: steps.penalty * jnp.minimum(k / ramp, 1.0)
    rate = decaying(steps.rate, counts[_BOTH])
    solvers['ctc+ssl'] = bj.descend(
      bj.oracles.aggregated(
        bj.multi_objective(
          [ctc, ssl],
          ('ctc', 'ssl'),
          rest=('recogniser', 'predictor'),
          per_task=True,
        ),
        bj.aggregators.scale_by_penalty(weight, rescale=False),
      ),
      **optimisers(rate, 'encoder', 'recogniser', 'predictor'),
    )
  if counts[_CTC]:
    peak = steps.tuning if counts[_BOTH] else steps.rate
    rate = decaying(peak, counts[_CTC])
    solvers['ctc'] = bj.descend(
      bj.gradient(
        lambda z, batch: ctc(z, batch['ctc']),
        name='supervised',
        of=('encoder', 'recogniser'),
      ),
      **optimisers(rate, 'encoder', 'recogniser'),
    )
  return in_turns(solvers)
