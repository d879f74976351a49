"""Methods that hyper-cleaning compares: step sizes, solvers and their cost.

The cost of an update is counted in gradients; a Hessian-vector product counts
as two.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax

import bilevel_jax as bj
from experiments import harness
from experiments.pbgd import cleaning

HESSIAN_VECTOR_PRODUCT = 2


@dataclasses.dataclass(frozen=True)
class Recipe:
  """Step sizes and inner steps of a method on a model.

  Attributes:
    upper: step size of the logits.
    lower: step size of the classifier.
    value: step size of the value sequence.
    penalty: final value.
    ramp: fraction of the updates during which the penalty rises from 0.
    inner_steps: steps of the inner loop.
    truncate: number of last inner steps that are differentiated.
  """

  upper: float
  lower: float
  value: float = 0.0
  penalty: float = 0.0
  ramp: float = 0.0
  inner_steps: int = 0
  truncate: int = 0


# Published settings (Shen and Chen, 2023); ramps are fractions of the steps.
# Not published: RHG and T-RHG have a fifth of the published inner steps, for
# more updates within the budget, and Adam on the logits; BOME and F2SA use
# V-PBGD's step sizes.
RECIPES = {
  ('v_pbgd', 'linear'): Recipe(0.1, 0.1, 0.01, 0.2, 30 / 40),
  ('v_pbgd', 'mlp'): Recipe(0.1, 0.01, 0.01, 0.1, 10 / 80),
  ('g_pbgd', 'linear'): Recipe(0.3, 0.5, 0.0, 37.0, 5 / 40),
  ('g_pbgd', 'mlp'): Recipe(0.5, 0.5, 0.0, 37.0, 30 / 50),
  ('f2sa', 'linear'): Recipe(0.1, 0.1, 0.01, 0.2, 30 / 40),
  ('f2sa', 'mlp'): Recipe(0.1, 0.01, 0.01, 0.1, 10 / 80),
  ('bome', 'linear'): Recipe(0.1, 0.1, 0.1, inner_steps=10),
  ('bome', 'mlp'): Recipe(0.1, 0.1, 0.1, inner_steps=10),
  ('rhg', 'linear'): Recipe(0.1, 0.1, inner_steps=100),
  ('rhg', 'mlp'): Recipe(0.1, 0.4, inner_steps=100),
  ('t_rhg', 'linear'): Recipe(0.1, 0.1, inner_steps=100, truncate=20),
  ('t_rhg', 'mlp'): Recipe(0.1, 0.4, inner_steps=100, truncate=20),
}
# Step size of single-level training, as of V-PBGD's classifier; not published.
PLAIN_STEP = 0.1

BILEVEL = ('v_pbgd', 'g_pbgd', 'f2sa', 'bome', 'rhg', 't_rhg', 'suggested')
CONTROLS = ('val_only', 'noisy_train', 'clean_part', 'both', 'agreement')

MEANINGS = {
  'suggested': 'v_pbgd with step sizes and penalty from `bj.suggest`.',
  'val_only': 'control: trains on the clean digits of the upper loss alone.',
  'noisy_train': 'control: trains on all polluted digits with equal weights.',
  'clean_part': 'control: trains on the correctly labelled digits alone.',
  'both': 'control: trains on clean and polluted digits, of a tuned weight.',
  'agreement': 'control: keeps the digits whose label `val_only` predicts.',
}

# Methods with an inner loop: they get the gradient budget of V-PBGD. All others
# take as many steps as V-PBGD.
_NESTED = ('bome', 'rhg', 't_rhg')


def cost(method: str, model: str) -> int:
  """Cost of one update in gradients; Hessian-vector products count as two."""
  recipe = RECIPES.get((method, model))
  inner = 0 if recipe is None else recipe.inner_steps
  products = HESSIAN_VECTOR_PRODUCT
  return {
    'v_pbgd': 4,
    'suggested': 4,
    'g_pbgd': 2 + products,
    'f2sa': 3,
    'bome': 3 + inner,
    'rhg': 1 + inner + products * inner,
    't_rhg': 1 + inner + products * (recipe.truncate if recipe else 0),
  }.get(method, 1)


def total_cost(counts: Mapping[str, Any]) -> Any:
  """Cost of a run in gradients, from `bj.counts` of its state."""
  return sum(
    value * (HESSIAN_VECTOR_PRODUCT if name.startswith('hessian') else 1)
    for name, value in counts.items()
    if name.startswith(('gradients/', 'hessian_vector_products/'))
  )


def updates(
  method: str, model: str, *, steps: int, chunk: int
) -> tuple[int, int]:
  """Updates of a method within the budget, and per chunk.

  Args:
    method: name.
    model: name.
    steps: steps of V-PBGD, which define the budget.
    chunk: steps of V-PBGD between two measurements.

  Returns:
    The number of updates, a multiple of the chunk, and the chunk.
  """
  if method not in _NESTED:
    return steps, chunk
  updates_per_step = cost('v_pbgd', model) / cost(method, model)
  chunk = max(1, round(chunk * updates_per_step))
  return max(1, int(steps * updates_per_step / chunk)) * chunk, chunk


def make_solver(
  method: str,
  model: str,
  classifier: harness.Network,
  *,
  updates: int,
  scale: chex.Numeric = 1.0,
  recipe: Recipe | None = None,
) -> optax.GradientTransformationExtraArgs:
  """Makes the solver of a method.

  Args:
    method: one of `BILEVEL`, or 'plain' for gradient descent on
      `cleaning.weighted_loss`.
    model: 'linear' or 'mlp', selects the recipe.
    classifier: the model.
    updates: number of updates of the run, for the ramp of the penalty.
    scale: multiplies all step sizes.
    recipe: defaults to the method's entry in `RECIPES`; 'suggested' has none
      and requires it.

  Returns:
    A solver for `CleaningBatch`, or for `WeightedBatch` if 'plain'.
  """
  if method == 'plain':
    loss = cleaning.weighted_loss(classifier)
    return optax.chain(bj.gradient(loss), optax.sgd(scale * PLAIN_STEP))
  recipe = recipe or RECIPES[method, model]
  problem = cleaning.cleaning_problem(classifier)
  sgd = lambda rate: optax.sgd(scale * rate)
  ramp = max(1, round(recipe.ramp * updates))
  penalty = optax.linear_schedule(0.0, recipe.penalty, ramp)
  # Unrolled methods restart each inner loop at the same initial weights.
  first = classifier.init(jax.random.key(0))
  unrolled = {
    'upper': optax.adam(scale * recipe.upper),
    'lower': bj.Sequence(
      sgd(recipe.lower),
      steps=recipe.inner_steps or None,
      start=lambda params: first,
      restart=True,
    ),
    'checkpoint': 10 if model == 'mlp' else None,
  }
  descent = {'upper': sgd(recipe.upper), 'lower': sgd(recipe.lower)}
  value = sgd(recipe.value)
  make: dict[str, Callable[[], optax.GradientTransformationExtraArgs]] = {
    'v_pbgd': lambda: bj.v_pbgd(
      problem, penalty=penalty, value=value, **descent
    ),
    'g_pbgd': lambda: bj.g_pbgd(problem, penalty=penalty, **descent),
    'f2sa': lambda: bj.f2sa(problem, penalty=penalty, value=value, **descent),
    'bome': lambda: bj.bome(
      problem, value=bj.Sequence(value, steps=recipe.inner_steps), **descent
    ),
    'rhg': lambda: bj.rhg(problem, **unrolled),
    't_rhg': lambda: bj.t_rhg(problem, truncate=recipe.truncate, **unrolled),
  }
  make['suggested'] = make['v_pbgd']
  return make[method]()


def suggested_recipe(
  classifier: harness.Network,
  batch: cleaning.CleaningBatch,
  key: chex.PRNGKey,
) -> Recipe:
  """Untuned settings of V-PBGD by `bj.suggest` at the initial point.

  The target gap is a tenth of the initial lower loss; the penalty rises over
  three quarters of the run.

  Args:
    classifier: the model.
    batch: digits with the labels of one noise seed.
    key: PRNG key of the initial weights and of the power iterations.

  Returns:
    A recipe of Python floats.
  """
  problem = cleaning.cleaning_problem(classifier)
  first, power = jax.random.split(key)
  count = batch.train_labels.shape[0]
  params = bj.BilevelParams(jnp.zeros(count), classifier.init(first))

  @jax.jit
  def suggest(params, batch):
    gap = 0.1 * problem.lower(*params, batch)
    # A classifier that fits every label has no minimiser: at the start alone.
    at_start = bj.diagnostics.WalkSettings(points=1)
    return bj.suggest(problem, params, batch, key=power, gap=gap, walk=at_start)

  suggestion = suggest(params, batch)
  return Recipe(
    upper=float(suggestion.upper),
    lower=float(suggestion.lower),
    value=float(suggestion.value),
    penalty=float(suggestion.penalty),
    ramp=3 / 4,
  )
