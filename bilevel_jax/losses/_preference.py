"""Preference losses: of pairs of responses, or of single rated responses."""

import chex
import jax
import jax.numpy as jnp
import numpy as np

from bilevel_jax import _checks
from bilevel_jax.losses import _tokens


def _log_ratio(log_probs: chex.Array, reference: chex.Array) -> chex.Array:
  """Log-ratios of responses between the model and the reference; nats."""
  constant = jax.lax.stop_gradient(_tokens.bounded(reference))
  _same_rows(log_probs, reference)
  return _tokens.bounded(log_probs) - constant


def _same_rows(*arrays: chex.Array) -> None:
  """Raises ValueError for different shapes, which would broadcast."""
  shapes = [jnp.shape(array) for array in arrays]
  if len({*shapes}) > 1:
    raise ValueError(f'pass one number per response, got the shapes {shapes}.')


def _as_labels(wanted: chex.Array) -> chex.Array:
  """Converts labels of responses to booleans; 0 and -1 mean unwanted."""
  if not isinstance(wanted, jax.core.Tracer):
    values = np.asarray(wanted)
    invalid = values[~np.isin(values, (-1, 0, 1))]
    if invalid.size:
      raise ValueError(
        f'kto: wanted has the label {invalid[0]}: labels are True or 1 for a '
        'wanted response, and False, 0 or -1 for an unwanted one.'
      )
  return jnp.asarray(wanted) > 0


def preference_margin(
  chosen: chex.Array,
  rejected: chex.Array,
  reference_chosen: chex.Array,
  reference_rejected: chex.Array,
) -> chex.Array:
  r"""The margin of the implicit reward between chosen and rejected responses.

  .. math::
    h = \log \frac{\pi(y_w | x)}{\pi_{ref}(y_w | x)}
      - \log \frac{\pi(y_l | x)}{\pi_{ref}(y_l | x)}

  The implicit reward prefers the chosen response if h > 0; the mean of `h > 0`
  is the accuracy of that reward.

  Args:
    chosen: log-probabilities of the chosen responses, (rows,); nats, summed
      over tokens (for `ipo`, their mean).
    rejected: log-probabilities of the rejected responses, (rows,); nats.
    reference_chosen: those of the chosen responses under the reference,
      (rows,); constant in derivatives.
    reference_rejected: those of the rejected responses under the reference,
      (rows,); constant in derivatives.

  Returns:
    The margin of each row, (rows,); nats.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp
    >>> rows = jnp.array([[-4.0], [-9.0], [-5.0], [-8.0]])
    >>> print(bj.losses.preference_margin(*rows))
    [2.]
  """
  _same_rows(chosen, rejected)
  ratio = _log_ratio(chosen, reference_chosen)
  return ratio - _log_ratio(rejected, reference_rejected)


def dpo(
  chosen: chex.Array,
  rejected: chex.Array,
  reference_chosen: chex.Array,
  reference_rejected: chex.Array,
  *,
  beta: float = 0.1,
  smoothing: float = 0.0,
) -> chex.Array:
  r"""Direct preference optimisation.

  .. math::
    \ell = - \frac{1}{n} \sum [ (1 - \epsilon) \log \sigma(\beta h)
      + \epsilon \log \sigma(-\beta h) ]

  with the margin h of `preference_margin`.

  Args:
    chosen: as in `preference_margin`, summed over tokens.
    rejected: as `chosen`.
    reference_chosen: as `chosen`.
    reference_rejected: as `chosen`.
    beta: the inverse temperature :math:`\beta > 0`.
    smoothing: :math:`\epsilon` in [0, 1/2], the assumed rate of wrong labels.

  Returns:
    A scalar, 0 without rows; nats.

  Raises:
    ValueError: if a constant `beta` or `smoothing` is out of range.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp
    >>> same = jnp.zeros(3)
    >>> print(f'{bj.losses.dpo(same, same, same, same):.3f}')  # log 2
    0.693

  References:
    Rafailov, Sharma, Mitchell, Ermon, Manning and Finn, `Direct Preference
    Optimization <https://arxiv.org/abs/2305.18290>`_, 2023; smoothing:
    Mitchell, `A note on DPO with noisy preferences
    <https://ericmitchell.ai/cdpo.pdf>`_, 2023.
  """
  _checks.within('dpo', 'beta', beta, 0, open_low=True)
  _checks.within('dpo', 'the smoothing', smoothing, 0, 0.5)
  margin = beta * preference_margin(
    chosen, rejected, reference_chosen, reference_rejected
  )
  correct = (1 - smoothing) * jax.nn.softplus(-margin)
  return _tokens.mean(correct + smoothing * jax.nn.softplus(margin))


def ipo(
  chosen: chex.Array,
  rejected: chex.Array,
  reference_chosen: chex.Array,
  reference_rejected: chex.Array,
  *,
  beta: float = 0.1,
) -> chex.Array:
  r"""Identity preference optimisation: regresses the margin to a constant.

  .. math::
    \ell = \frac{1}{n} \sum \left( h - \frac{1}{2 \beta} \right)^2

  Args:
    chosen: as in `preference_margin`; means over tokens make margins comparable
      between responses of different lengths.
    rejected: as `chosen`.
    reference_chosen: as `chosen`.
    reference_rejected: as `chosen`.
    beta: the strength :math:`\beta > 0` of the pull to the reference.

  Returns:
    A scalar, 0 without rows; nats squared.

  Raises:
    ValueError: if a constant `beta` is not above zero.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp
    >>> zero = jnp.zeros(2)
    >>> print(bj.losses.ipo(zero + 4, zero, zero, zero, beta=0.1))
    1.0

  References:
    Azar, Rowland, Piot, Guo, Calandriello, Valko and Munos, `A General
    Theoretical Paradigm to Understand Learning from Human Preferences
    <https://arxiv.org/abs/2310.12036>`_, 2023.
  """
  _checks.within('ipo', 'beta', beta, 0, open_low=True)
  margin = preference_margin(
    chosen, rejected, reference_chosen, reference_rejected
  )
  return _tokens.mean((margin - 1 / (2 * beta)) ** 2)


def kto(
  log_probs: chex.Array,
  reference: chex.Array,
  wanted: chex.Array,
  baseline: chex.Array,
  *,
  beta: float = 0.1,
  wanted_weight: float = 1.0,
  unwanted_weight: float = 1.0,
) -> chex.Array:
  r"""Kahneman-Tversky optimisation from single responses, wanted or unwanted.

  .. math::
    \ell = \frac{1}{n} \sum \lambda \, [ 1 - \sigma( \pm \beta (r - z) ) ],
    \qquad r = \log \frac{\pi(y | x)}{\pi_{ref}(y | x)}, \quad
    z = \max \left( 0, \operatorname{mean} r' \right)

  with plus for a wanted response. The reference point z estimates the
  divergence from the reference by prompts paired with the responses to other
  prompts; it is constant in derivatives.

  Args:
    log_probs: log-probabilities of the responses, (rows,); nats, summed over
      tokens.
    reference: those under the reference, (rows,); constant in derivatives.
    wanted: whether a response is wanted, (rows,): True or 1 if it is; False, 0
      or -1 if not.
    baseline: :math:`r'`, log-ratios of mismatched prompts and responses, any
      shape; if it is empty, z is 0.
    beta: the inverse temperature :math:`\beta > 0`.
    wanted_weight: :math:`\lambda \ge 0` of wanted responses.
    unwanted_weight: :math:`\lambda \ge 0` of unwanted responses.

  Returns:
    A scalar, 0 without rows.

  Raises:
    ValueError: if a constant is out of range, or a label that is not traced is
      invalid.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp
    >>> zero = jnp.zeros(2)
    >>> wanted = jnp.array([True, False])
    >>> print(bj.losses.kto(zero, zero, wanted, baseline=zero))
    0.5

  References:
    Ethayarajh, Xu, Muennighoff, Jurafsky and Kiela, `KTO: Model Alignment as
    Prospect Theoretic Optimization <https://arxiv.org/abs/2402.01306>`_, 2024.
  """
  _checks.within('kto', 'beta', beta, 0, open_low=True)
  _checks.within('kto', 'wanted_weight', wanted_weight, 0)
  _checks.within('kto', 'unwanted_weight', unwanted_weight, 0)
  _same_rows(log_probs, wanted)
  wanted = _as_labels(wanted)
  ratio = _log_ratio(log_probs, reference)
  bounded = _tokens.bounded(baseline)
  point = jnp.maximum(jax.lax.stop_gradient(_tokens.mean(bounded)), 0)
  gap = beta * (ratio - point)
  value = jax.nn.sigmoid(jnp.where(wanted, -gap, gap))  # 1 - sigma(+-gap)
  weight = jnp.where(wanted, wanted_weight, unwanted_weight)
  return _tokens.mean(weight.astype(value.dtype) * value)


def log_odds(log_probs: chex.Array) -> chex.Array:
  r"""The log odds, :math:`\log p - \log(1 - p)`, from :math:`\log p`.

  Args:
    log_probs: mean log-probabilities of responses, any shape; nats. Values are
      at most minus the float spacing at 1.

  Returns:
    The log odds, of the same shape; nats.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp
    >>> print(f'{bj.losses.log_odds(jnp.log(0.8)):.3f}')  # log 4
    1.386
  """
  at = _tokens.bounded(log_probs)
  at = jnp.minimum(at, -jnp.finfo(at.dtype).eps)
  return at - jnp.log(-jnp.expm1(at))


def orpo(
  chosen: chex.Array, rejected: chex.Array, *, weight: float = 0.1
) -> chex.Array:
  r"""Odds-ratio preference optimisation: fine-tuning plus a preference term.

  .. math::
    \ell = - \frac{1}{n} \sum [ \log \bar\pi(y_w | x) + \lambda \log \sigma (
      \operatorname{logit} \bar\pi(y_w | x)
      - \operatorname{logit} \bar\pi(y_l | x) ) ]

  where :math:`\log \bar\pi` is a mean over tokens. There is no reference.

  Args:
    chosen: mean log-probabilities of the chosen responses over their tokens,
      (rows,); nats.
    rejected: those of the rejected responses, (rows,); nats.
    weight: :math:`\lambda \ge 0` of the preference term.

  Returns:
    A scalar, 0 without rows; nats per token.

  Raises:
    ValueError: if a constant weight is negative.

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp
    >>> both = jnp.full(2, -1.0)
    >>> print(f'{bj.losses.orpo(both, both, weight=1.0):.3f}')  # 1 + log 2
    1.693

  References:
    Hong, Lee and Thorne, `ORPO: Monolithic Preference Optimization without
    Reference Model <https://arxiv.org/abs/2403.07691>`_, 2024.
  """
  _checks.within('orpo', 'the weight', weight, 0)
  _same_rows(chosen, rejected)
  ratio = log_odds(chosen) - log_odds(rejected)
  sft_loss = -_tokens.bounded(chosen)
  return _tokens.mean(sft_loss + weight * jax.nn.softplus(-ratio))


def uft(
  log_probs: chex.Array,
  reference: chex.Array,
  scores: chex.Array,
  *,
  beta: float = 0.1,
  distance: str = 'squared',
) -> chex.Array:
  r"""Unified fine-tuning: fits an implicit reward to scores.

  .. math::
    \ell = \frac{1}{n} \sum ( \sigma(\beta r) - s )^2, \qquad
    r = \log \frac{\pi(y | x)}{\pi_{ref}(y | x)}

  or the cross-entropy of :math:`\sigma(\beta r)` with s. Demonstrations are
  responses with score 1, so one data set has demonstrations and feedback.

  Args:
    log_probs: log-probabilities of the responses, (rows,); nats, summed over
      tokens.
    reference: those under the reference, (rows,); constant in derivatives.
    scores: :math:`s` in [0, 1], (rows,). Traced scores are clipped to [0, 1],
      since the cross-entropy has no minimum for others.
    beta: the inverse temperature :math:`\beta > 0`.
    distance: 'squared' or 'cross_entropy'.

  Returns:
    A scalar, 0 without rows.

  Raises:
    ValueError: if a constant `beta` is not above zero, the distance is unknown,
      or scores that are not traced are outside [0, 1].

  Example:
    >>> import bilevel_jax as bj, jax.numpy as jnp
    >>> zero = jnp.zeros(2)
    >>> print(bj.losses.uft(zero, zero, scores=jnp.array([1.0, 0.5])))
    0.125

  References:
    Wang, Bi, Zhu, Mao, Wang and Wang, `UFT: Unifying Fine-Tuning of SFT and
    RLHF/DPO/UNA through a Generalized Implicit Reward Function
    <https://arxiv.org/abs/2410.21438>`_, 2024.
  """
  _checks.within('uft', 'beta', beta, 0, open_low=True)
  if distance not in ('squared', 'cross_entropy'):
    raise ValueError(
      f"uft: distance is 'squared' or 'cross_entropy', got {distance!r}."
    )
  _same_rows(log_probs, scores)
  _checks.within('uft', 'each of the scores', scores, 0, 1)
  reward = beta * _log_ratio(log_probs, reference)
  scores = jnp.clip(jnp.asarray(scores, reward.dtype), 0, 1)
  if distance == 'squared':
    return _tokens.mean((jax.nn.sigmoid(reward) - scores) ** 2)
  return _tokens.mean(
    scores * jax.nn.softplus(-reward) + (1 - scores) * jax.nn.softplus(reward)
  )
