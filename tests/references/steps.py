"""Updates of published methods in plain NumPy: vectors, loops, matrices.

A method is a generator of the sequences after each update. Losses are `Loss`
objects, step sizes are functions of the number of updates so far, an update is
`z - rate * direction`, and `pick(batch, t)` is the batch of inner step t.
"""

import itertools

import jax
import numpy as np

from tests.references.problem import full_batch

# Compiling would take longer than the few runs of each program.
QUICKLY = {
  'xla_backend_optimization_level': 0,
  'xla_cpu_use_fusion_emitters': False,
  'xla_cpu_parallel_codegen_split_count': 1,
}


def in_double(function):
  """A compiled function of float64 arrays to NumPy arrays."""
  compiled = jax.jit(function, compiler_options=QUICKLY)

  def call(*args):
    with jax.enable_x64(True):
      return jax.tree.map(np.asarray, compiled(*args))

  return call


class Loss:
  """A loss(x, y, batch) with its derivatives; `xy` has a row for each x."""

  def __init__(self, loss):
    """Of a function of vectors."""
    slope = jax.grad(loss, 1)
    self.value = in_double(loss)
    self.x, self.y = in_double(jax.grad(loss, 0)), in_double(slope)
    self.yy = in_double(jax.jacobian(slope, 1))
    self.xy = in_double(lambda *z: jax.jacobian(slope, 0)(*z).T)


def everywhere(z):
  """The whole space, as a set."""
  return z


# Penalties.


def v_pbgd(
  f, g, x, y, batches, *, penalty, upper, lower, value,
  steps=1, pick=full_batch, momentum=0.0, restart=False, rescale=True,
  upper_set=everywhere, lower_set=everywhere, joint_set=None,
  proximity=np.inf, lower_steps=1, lower_pick=full_batch,
):  # fmt: skip
  """V-PBGD; with a proximity, MEHA from one point.

  With several lower steps, y moves in each and x in the last.
  """
  w = y
  for k, batch in enumerate(batches):
    gamma, velocity, y_0 = penalty(k), 0.0, y
    w = y if restart else w
    for t in range(steps):
      before, sample = w, pick(batch, t)
      slope = g.y(x, w, sample) + (w - y) / proximity
      velocity = momentum * velocity + slope
      w = lower_set(w - value(k) * velocity)
    scale = min(1 / gamma, 1) if rescale and gamma else 1
    for t in range(lower_steps):
      b = lower_pick(batch, t)
      d_x = f.x(x, y, b) + gamma * (g.x(x, y, b) - g.x(x, w, b))
      d_y = f.y(x, y, b) + gamma * (g.y(x, y, b) - (y - w) / proximity)
      if t < lower_steps - 1:
        y = lower_set(y - lower(k) * scale * d_y)
    losses = {
      'upper': f.value(x, y, b),
      'lower': g.value(x, y, b),
      'gap': g.value(x, y, b)
      - g.value(x, w, b)
      - np.sum((y - w) ** 2) / (2 * proximity),
      'value': g.value(x, before, sample)
      + np.sum((before - y_0) ** 2) / (2 * proximity),
    }
    x, y = x - upper(k) * scale * d_x, y - lower(k) * scale * d_y
    x, y = joint_set(x, y) if joint_set else (upper_set(x), lower_set(y))
    yield {'upper': x, 'lower': y, 'value': w, 'losses': losses}


def v_pbsgd_points(g, x, y, batch, *, steps, pick, value, lower_set):
  """The points w_2 ... w_{T+1} of V-PBSGD's inner loop."""
  points = []
  for t in range(steps):
    y = lower_set(y - value / np.sqrt(t + 1) * g.y(x, y, pick(batch, t)))
    points.append(y)
  return points


def v_pbsgd_step(
  f, g, x, y, w, batch, *, gamma, upper, lower, upper_set, lower_set
):
  """V-PBSGD's step of both variables, from the point drawn."""
  scale = min(1 / gamma, 1)
  d_x = f.x(x, y, batch) + gamma * (g.x(x, y, batch) - g.x(x, w, batch))
  d_y = f.y(x, y, batch) + gamma * g.y(x, y, batch)
  return upper_set(x - upper * scale * d_x), lower_set(y - lower * scale * d_y)


def g_pbgd(f, g, x, y, batches, *, penalty, upper, lower, momentum=0.0):
  """G-PBGD, the upper variable with heavy-ball momentum."""
  velocity = 0.0
  for k, batch in enumerate(batches):
    gamma, slope = penalty(k), g.y(x, y, batch)
    scale = min(1 / gamma, 1)
    d_x = f.x(x, y, batch) + gamma * g.xy(x, y, batch) @ slope
    d_y = f.y(x, y, batch) + gamma * g.yy(x, y, batch) @ slope
    velocity = momentum * velocity + scale * d_x
    x, y = x - upper(k) * velocity, y - lower(k) * scale * d_y
    yield {'upper': x, 'lower': y, 'losses': {'penalty': slope @ slope / 2}}


def prox_linear_pbgd(
  f, g, x, y, batches, *, penalty, step, upper_set=everywhere,
  lower_set=everywhere,
):  # fmt: skip
  """The prox-linear step, by a long ascent of its dual."""
  for k, batch in enumerate(batches):
    gamma, alpha, n = penalty(k), step(k), x.size
    slope = g.y(x, y, batch)
    matrix = np.hstack([g.xy(x, y, batch).T, g.yy(x, y, batch)])
    gradient = np.hstack([f.x(x, y, batch), f.y(x, y, batch)])
    z, u = np.hstack([x, y]), np.zeros_like(y)
    length = 1 / (alpha * np.linalg.norm(matrix, 2) ** 2)
    for _ in range(2000):
      new = z - alpha * (gradient + matrix.T @ u)
      new = np.hstack([upper_set(new[:n]), lower_set(new[n:])])
      u = u + length * (slope + matrix @ (new - z))
      u = u * min(1, gamma / np.linalg.norm(u))
    x, y = new[:n], new[n:]
    losses = {
      'penalty': np.linalg.norm(slope),
      'multiplier': np.linalg.norm(u),
    }
    yield {'upper': x, 'lower': y, 'losses': losses}


def bome(
  f, g, x, y, batches, *, eta, upper, lower, value, steps, pick=full_batch,
  lower_steps=1,
):  # fmt: skip
  """BOME: a dynamic barrier in place of a penalty."""
  for k, batch in enumerate(batches):
    w = y
    for t in range(steps):
      w = w - value(k) * g.y(x, w, pick(batch, t))
    for t in range(lower_steps):
      b = pick(batch, t) if lower_steps > 1 else batch
      d_f = np.hstack([f.x(x, y, b), f.y(x, y, b)])
      d_q = np.hstack([g.x(x, y, b) - g.x(x, w, b), g.y(x, y, b)])
      rate = eta(k) * d_q @ d_q
      d = d_f + max((rate - d_f @ d_q) / (d_q @ d_q), 0) * d_q
      if t == lower_steps - 1:
        x = x - upper(k) * d[: x.size]
      y = y - lower(k) * d[x.size :]
    yield {'upper': x, 'lower': y, 'value': w}


def shortest_pair(one, two):
  """Weights of the shortest convex combination of two vectors."""
  difference = two - one
  share = np.clip(-one @ difference / (difference @ difference), 0, 1)
  return np.array([1 - share, share])


def constrained_pair(rows, q, rho):
  """FORUM's weights of two objectives, exactly: the best of all candidates.

  On the simplex, the objective is quadratic on each side of the point where
  the penalty's weight becomes positive.
  """
  slack = rho - rows @ q / (q @ q)

  def height(share):
    weights = np.array([1 - share, share])
    s = max(0.0, weights @ slack)
    d = weights @ rows + s * q
    return d @ d - s * rho * q @ q

  candidates = [0.0, 1.0]
  if slack[0] * slack[1] < 0:
    candidates.append(slack[0] / (slack[0] - slack[1]))
  for active in (0.0, 1.0):
    first = rows[0] + active * slack[0] * q
    move = rows[1] - rows[0] + active * (slack[1] - slack[0]) * q
    linear = active * (slack[1] - slack[0]) * rho * q @ q
    candidates.append((linear / 2 - first @ move) / (move @ move))
  share = min((c for c in candidates if 0 <= c <= 1), key=height)
  return np.array([1 - share, share])


def forum(
  upper_losses, g, x, y, batches, *, rho, averaging, upper, lower, value, steps,
  pick=full_batch,
):  # fmt: skip
  """FORUM of two upper losses."""
  mean = np.zeros(2)
  for k, b in enumerate(batches):
    w = descend_lower(g, x, y, b, rate=value(k), steps=steps, pick=pick)
    rows = np.stack(
      [np.hstack([f.x(x, y, b), f.y(x, y, b)]) for f in upper_losses]
    )
    q = np.hstack([g.x(x, y, b) - g.x(x, w, b), g.y(x, y, b)])
    mean = mean + averaging(k) * (constrained_pair(rows, q, rho) - mean)
    s = max(0.0, mean @ (rho - rows @ q / (q @ q)))
    d = mean @ rows + s * q
    losses = {
      'one': upper_losses[0].value(x, y, b),
      'two': upper_losses[1].value(x, y, b),
      'gap': g.value(x, y, b) - g.value(x, w, b),
    }
    x, y = x - upper(k) * d[: x.size], y - lower(k) * d[x.size :]
    yield {'upper': x, 'lower': y, 'value': w, 'losses': losses}


def moml(
  upper_losses, g, x, y, batches, *, upper, lower, steps, pick=full_batch
):  # fmt: skip
  """MOML of two upper losses, through the steps of gradient descent."""
  for k, batch in enumerate(batches):
    derivative = np.zeros((y.size, x.size))
    for t in range(steps):
      b = pick(batch, t)
      turned = g.yy(x, y, b) @ derivative + g.xy(x, y, b).T
      y = y - lower(k) * g.y(x, y, b)
      derivative = derivative - lower(k) * turned
    rows = [
      f.x(x, y, batch) + derivative.T @ f.y(x, y, batch) for f in upper_losses
    ]
    d = shortest_pair(*rows) @ np.stack(rows)
    losses = {
      'one': upper_losses[0].value(x, y, batch),
      'two': upper_losses[1].value(x, y, batch),
    }
    x = x - upper(k) * d
    yield {'upper': x, 'lower': y, 'losses': losses}


def f2sa(
  f, g, x, y, batches, *, penalty, upper, lower, value, steps=1,
  pick=full_batch,
  upper_set=everywhere, lower_set=everywhere,
):  # fmt: skip
  """F2SA, in two loops; with one step, from one point."""
  z = y
  for k, batch in enumerate(batches):
    gamma, x_scale = penalty(k), 1.0
    scale = min(1 / gamma, 1)
    old_y, old_z = y, z
    for t in range(steps):
      b = pick(batch, t)
      z = lower_set(z - value(k) * g.y(x, z, b))
      d_y = f.y(x, y, b) + gamma * g.y(x, y, b)
      y = lower_set(y - lower(k) * scale * d_y)
    at_y, at_z = y, z
    if steps == 1:
      at_y, at_z, x_scale = old_y, old_z, scale
    gap = g.x(x, at_y, batch) - g.x(x, at_z, batch)
    d_x = f.x(x, at_y, batch) + gamma * gap
    x = upper_set(x - upper(k) * x_scale * d_x)
    yield {'upper': x, 'lower': y, 'value': z}


def seal(
  losses, y, batches, *, rows, penalty, lower, selector, value=None, steps=1,
  weights='softmax', momentum=0.0,
):  # fmt: skip
  """SEAL: sums over all rows, and a loop over those of a batch.

  `losses` have `value` and `slope` of the upper loss, and `rows` and
  `row_slopes` of each row of a batch.
  """
  scores, speed, z = np.zeros(rows), np.zeros(rows), y
  for k, batch in enumerate(batches):
    at, gamma = batch['index'], penalty(k)
    p = 1 / (1 + np.exp(-scores))
    slope = p * (1 - p)
    if weights != 'sigmoid':
      p = rows * np.exp(scores) / np.exp(scores).sum()
      slope = p if weights == 'softmax' else np.ones(rows)
    losses_then = {}
    for _ in range(steps if value else 0):
      losses_then['value'] = p[at] @ losses.rows(z, batch) / len(at)
      z = z - value(k) * p[at] @ losses.row_slopes(z, batch) / len(at)
    gaps = losses.rows(y, batch)
    losses_then['upper'] = losses.value(y, batch)
    losses_then['lower'] = p[at] @ gaps / len(at)
    weighted = p[at] @ losses.row_slopes(y, batch) / len(at)
    direction = (losses.slope(y, batch) + gamma * weighted) / (1 + gamma)
    y = y - lower(k) * direction
    if value:
      gaps = gaps - losses.rows(z, batch)
      losses_then['gap'] = p[at] @ gaps / len(at)
    total = {}
    for i, one in zip(at, gaps):
      total[i] = total.get(i, 0) + slope[i] * one / len(at)
    for i, one in total.items():
      speed[i] = momentum * speed[i] + one
      scores[i] -= selector(k) * speed[i]
    yield {'x': y, 'selector': scores.copy(), 'losses': losses_then} | (
      {'value': z} if value else {}
    )


# Derivatives of an inner loop.


def rhg(
  f, g, x, y, batches, *, upper, lower, steps, truncate=None, pick=full_batch,
  momentum=0.0, start=None, box=np.inf,
):  # fmt: skip
  """RHG and T-RHG by forward derivatives of y_T, with a row for each y.

  A start is the matrix of a linear function of x.
  """
  for k, batch in enumerate(batches):
    derivative = np.zeros((y.size, x.size))
    if start is not None:
      y, derivative = start @ x, start
    velocity, d_velocity = np.zeros_like(y), np.zeros_like(derivative)
    for t in range(steps):
      if truncate and t == steps - truncate:
        derivative, d_velocity = np.zeros_like(derivative), 0 * d_velocity
      b = pick(batch, t)
      turned = g.yy(x, y, b) @ derivative + g.xy(x, y, b).T
      velocity = momentum * velocity + g.y(x, y, b)
      d_velocity = momentum * d_velocity + turned
      y = y - lower(k) * velocity
      derivative = derivative - lower(k) * d_velocity
      derivative = derivative * (np.abs(y) < box)[:, None]
      y = np.clip(y, -box, box)
    d_x = f.x(x, y, batch) + derivative.T @ f.y(x, y, batch)
    losses = {'upper': f.value(x, y, batch)}
    x = x - upper(k) * d_x
    yield {'upper': x, 'lower': y, 'losses': losses}


def descend_lower(g, x, y, batch, *, rate, steps, pick):
  """Steps of gradient descent on the lower loss."""
  for t in range(steps):
    y = y - rate * g.y(x, y, pick(batch, t))
  return y


def pzobo(
  f, g, x, y, batches, *, upper, lower, steps, smoothing, directions,
  pick=full_batch,
):  # fmt: skip
  """PZOBO along recorded directions, a list for each update."""
  for k, batch in enumerate(batches):
    loop = {'rate': lower(k), 'steps': steps, 'pick': pick}
    end = descend_lower(g, x, y, batch, **loop)
    d_x = f.x(x, end, batch)
    for u in directions[k]:
      moved = descend_lower(g, x + smoothing * u, y, batch, **loop)
      response = (moved - end) / smoothing @ f.y(x, end, batch)
      d_x = d_x + response * u / len(directions[k])
    x, y = x - upper(k) * d_x, end
    yield {'upper': x, 'lower': y}


# Implicit derivatives.


def solve_exactly(matrices, right, start):
  """The solution; that of least norm if there are several."""
  return np.linalg.lstsq(matrices(0), right, rcond=1e-10)[0]


def series(terms, eta, *, warm=False):
  """Steps of gradient descent on the linear system."""

  def solve(matrices, right, start):
    q = start if warm else eta * right
    for t in range(terms):
      q = q + eta * (right - matrices(t) @ q)
    return q

  return solve


def one_term(bound, eta, length):
  """One term of the Neumann series, scaled by the number of terms."""

  def solve(matrices, right, start):
    q = eta * bound * right
    for t in range(length):
      q = q - eta * matrices(t) @ q
    return q

  return solve


def one_conjugate_step(matrices, right, start):
  """The first conjugate-gradient step from the start."""
  matrix, residual = matrices(0), right - matrices(0) @ start
  length = residual @ residual / (residual @ matrix @ residual)
  return start + length * residual


def implicit(
  f, g, x, y, batches, *, upper, lower, steps, solves, pick=full_batch,
  linear_pick=full_batch,
):  # fmt: skip
  """A lower loop, a linear system, an upper step: AID, stocBiO, BSA, AmIGO."""
  q = np.zeros_like(y)
  for k, batch in enumerate(batches):
    y = descend_lower(g, x, y, batch, rate=lower(k), steps=steps, pick=pick)
    matrices = lambda t, x=x, y=y, b=batch: g.yy(x, y, linear_pick(b, t))
    q = solves[k](matrices, f.y(x, y, batch), q)
    x = x - upper(k) * (f.x(x, y, batch) - g.xy(x, y, batch) @ q)
    yield {'upper': x, 'lower': y}


class Equations:
  """The set A y + h(x) = c, by the pseudo-inverse."""

  def __init__(self, matrix, right, coupling=None):
    """Of A, c and h, a function of the vector x."""
    self.inverse, self.matrix, self.right = (
      np.linalg.pinv(matrix),
      matrix,
      right,
    )
    self.h = in_double(coupling or (lambda x: 0 * right))
    self.slope = in_double(jax.jacobian(coupling)) if coupling else None
    _, sizes, rows = np.linalg.svd(matrix)
    self.kernel = rows[int(np.sum(sizes > 1e-10)) :].T

  def project(self, z, x=None):
    """The nearest point of the set."""
    return z - self.inverse @ (self.matrix @ z + self.h(x) - self.right)

  def correction(self, f, g, x, y, batch, solve, matrices):
    """The hypergradient minus the upper loss's partial gradient in x."""
    v, slope, hessian = self.kernel, f.y(x, y, batch), g.yy(x, y, batch)
    inside = lambda t: v.T @ matrices(t) @ v
    q = v @ solve(inside, v.T @ slope, np.zeros(v.shape[1]))
    pulled = self.slope(x).T @ self.inverse.T @ (hessian @ q - slope)
    return pulled - g.xy(x, y, batch) @ q


def aipod(
  f, g, x, y, batches, *, upper, lower, steps, solves, above, below,
  pick=full_batch, linear_pick=full_batch,
):  # fmt: skip
  """AiPOD: projected steps in turn."""
  for k, batch in enumerate(batches):
    for t in range(steps):
      y = below.project(y - lower(k) * g.y(x, y, pick(batch, t)), x)
    matrices = lambda t, x=x, y=y, b=batch: g.yy(x, y, linear_pick(b, t))
    w = below.correction(f, g, x, y, batch, solves[k], matrices)
    x = above.project(x - upper(k) * (f.x(x, y, batch) + w))
    yield {'upper': x, 'lower': y}


def e_aipod(
  f, g, x, y, batches, *, upper, lower, probability, coins, upper_steps,
  relaxation, above, below, pick=full_batch, linear_pick=full_batch,
  in_steps=False,
):  # fmt: skip
  """E-AiPOD with given coins, a list of them for each update.

  The published r is in units of a gradient; `in_steps` keeps its product with
  the step size from one update to the next instead, where that falls.
  """
  r = np.zeros_like(y)
  for k, batch in enumerate(batches):
    beta, p = lower(k), probability(k)
    if in_steps and k:
      r = r * lower(k - 1) / beta
    for t, heads in enumerate(coins[k]):
      hat = y - beta * (g.y(x, y, pick(batch, t)) - r)
      if heads:
        y = below.project(hat - beta / p * r, x)
        r = r + p / beta * (y - hat)
      else:
        y = hat
    matrices = lambda t, x=x, y=y, b=batch: g.yy(x, y, linear_pick(b, t))
    w = below.correction(f, g, x, y, batch, solve_exactly, matrices)
    end = x
    for t in range(upper_steps):
      end = end - upper(k) * (f.x(end, y, pick(batch, t)) + w)
    delta = relaxation(k)
    x = above.project((1 - delta) * x + delta * end)
    yield {'upper': x, 'lower': y}


# One loop.


def directions(f, g, x, y, v, f_batch, g_batch):
  """SOBA's of the upper and the lower variable and of the linear system."""
  d_v = g.yy(x, y, g_batch) @ v - f.y(x, y, f_batch)
  d_x = f.x(x, y, f_batch) - g.xy(x, y, g_batch) @ v
  return np.hstack([d_x, g.y(x, y, g_batch), d_v])


def soba(
  f, g, x, y, batches, *, upper, lower, linear, averaging=1.0, radius=np.inf,
  in_turn=False,
):  # fmt: skip
  """SOBA; MA-SOBA with an average of the upper direction, from zero."""
  v, h = np.zeros_like(y), np.zeros_like(x)
  for k, batch in enumerate(batches):
    if in_turn:
      y = y - lower(k) * g.y(x, y, batch)
      v = v - linear(k) * (g.yy(x, y, batch) @ v - f.y(x, y, batch))
      x = x - upper(k) * (f.x(x, y, batch) - g.xy(x, y, batch) @ v)
      yield {'upper': x, 'lower': y, 'linear': v}
      continue
    d_x, d_y, d_v = np.split(
      directions(f, g, x, y, v, batch, batch), [x.size, x.size + y.size]
    )
    h = (1 - averaging) * h + averaging * d_x
    x, y, v = x - upper(k) * h, y - lower(k) * d_y, v - linear(k) * d_v
    v = v * min(1, radius / np.linalg.norm(v))
    yield {'upper': x, 'lower': y, 'linear': v}


def stale_soba(f, g, x, y, batches, *, upper, lower, linear, delays):
  """SOBA with directions at the point of earlier updates."""
  z, sizes = np.hstack([x, y, np.zeros_like(y)]), [x.size, x.size + y.size]
  points = [z]
  for k, (batch, delay) in enumerate(zip(batches, delays, strict=True)):
    then = np.split(points[k - delay], sizes)
    d = directions(f, g, *then, batch, batch)
    rates = np.repeat([upper(k), lower(k), linear(k)], [x.size, *[y.size] * 2])
    z = z - rates * d
    points.append(z)
    yield dict(zip(('upper', 'lower', 'linear'), np.split(z, sizes)))


def from_memory(new, table, visited, i):
  """SAGA's direction: a row corrected by its table entry and the mean."""
  direction = new if not visited[i] else new - table[i] + table[visited].mean(0)
  table[i], visited[i] = new, True
  return direction


def descent_ascent(g, x, y, batches, *, upper, lower):
  """A saddle point of one loss: y descends, x ascends, from one point."""
  for k, batch in enumerate(batches):
    d_x, d_y = g.x(x, y, batch), g.y(x, y, batch)
    x, y = x + upper(k) * d_x, y - lower(k) * d_y
    yield {'upper': x, 'lower': y}


def saba(f, g, x, y, batches, *, upper, lower, linear, parts, chosen):
  """SABA; each loss's part of the directions has a table of its own."""
  v, n = np.zeros_like(y), x.size
  tables = [np.zeros((size, n + 2 * y.size)) for size in parts]
  visited = [np.zeros(size, bool) for size in parts]
  for k, batch in enumerate(batches):
    both = directions(f, g, x, y, v, *batch)
    of_f = np.hstack(
      [f.x(x, y, batch[0]), np.zeros_like(y), -f.y(x, y, batch[0])]
    )
    d = 0.0
    for row, *memory in zip((of_f, both - of_f), tables, visited, chosen[k]):
      d = d + from_memory(row, *memory)
    d_x, d_y, d_v = np.split(d, [n, n + y.size])
    x, y, v = x - upper(k) * d_x, y - lower(k) * d_y, v - linear(k) * d_v
    yield {'upper': x, 'lower': y, 'linear': v}


def saba_at_once(f, g, x, y, batches, *, parts, chosen, **rates):
  """SABA with one table of sums."""
  v, table = np.zeros_like(y), np.zeros((parts, x.size + 2 * y.size))
  visited = np.zeros(parts, bool)
  for k, batch in enumerate(batches):
    new = directions(f, g, x, y, v, batch, batch)
    d = from_memory(new, table, visited, chosen[k])
    d_x, d_y, d_v = np.split(d, [x.size, x.size + y.size])
    x, y = x - rates['upper'](k) * d_x, y - rates['lower'](k) * d_y
    v = v - rates['linear'](k) * d_v
    yield {'upper': x, 'lower': y, 'linear': v}


def sustain(
  f, g, x, y, batches, *, upper, lower, decay, solves, linear_pick=full_batch,
  lower_steps=1, pick=full_batch,
):  # fmt: skip
  """SUSTAIN and MRBO: both directions corrected at the previous point."""

  def both(k, x, y, batch):
    matrices = lambda t: g.yy(x, y, linear_pick(batch, t))
    q = solves[k](matrices, f.y(x, y, batch), None)
    return np.hstack(
      [f.x(x, y, batch) - g.xy(x, y, batch) @ q, g.y(x, y, batch)]
    )

  d = before = None
  for k, whole_batch in enumerate(batches):
    for t in range(lower_steps):
      batch = pick(whole_batch, t)
      new = both(k, x, y, batch)
      if before is not None:
        new = new + (1 - decay(k)) * (d - both(k, *before, batch))
      d, before = new, (x, y)
      if t == lower_steps - 1:
        x = x - upper(k) * d[: x.size]
      y = y - lower(k) * d[x.size :]
    yield {'upper': x, 'lower': y}


def vrbo(
  f, g, x, y, batches, *, upper, lower, solve, period, steps, pick, large,
  linear_pick=full_batch,
):  # fmt: skip
  """VRBO in the library's form: x moves with the last step of y."""

  def both(x, y, batch):
    matrices = lambda t: g.yy(x, y, linear_pick(batch, t))
    q = solve(matrices, f.y(x, y, batch), None)
    return np.hstack(
      [f.x(x, y, batch) - g.xy(x, y, batch) @ q, g.y(x, y, batch)]
    )

  d = before = None
  for k, batch in enumerate(batches):
    for t in range(steps):
      if t == 0 and k % period == 0:
        d = both(x, y, large(batch))
      else:
        b = pick(batch, t)
        d = d + both(x, y, b) - both(*before, b)
      before = x, y
      if t == steps - 1:
        x = x - upper(k) * d[: x.size]
      y = y - lower(k) * d[x.size :]
    yield {'upper': x, 'lower': y}


def srba(f, g, x, y, batches, *, upper, lower, linear, period, small, large):
  """SRBA: fresh directions each period, differences between."""
  z, sizes = np.hstack([x, y, np.zeros_like(y)]), [x.size, x.size + y.size]
  at = lambda z, b: directions(f, g, *np.split(z, sizes), b, b)
  d = before = None
  for k, batch in enumerate(batches):
    if k % period == 0:
      d = at(z, large(batch))
    else:
      d = d + at(z, small(batch)) - at(before, small(batch))
    before = z
    rates = np.repeat([upper(k), lower(k), linear(k)], [x.size, *[y.size] * 2])
    z = z - rates * d
    x, y, v = np.split(z, sizes)
    yield {'upper': x, 'lower': y, 'linear': v}


def raised(matrix, min_eigenvalue):
  """A symmetric matrix with eigenvalues raised to at least `min_eigenvalue`."""
  values, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
  return vectors @ np.diag(np.maximum(values, min_eigenvalue)) @ vectors.T


def stable(f, g, x, y, batches, *, upper, lower, decay, min_eigenvalue):
  """STABLE; the recursion continues from the matrix before it is raised."""
  h_yy = h_xy = before = None
  for k, b in enumerate(batches):
    yy, xy = g.yy(x, y, b), g.xy(x, y, b)
    if before is not None:
      yy = yy + (1 - decay(k)) * (h_yy - g.yy(*before, b))
      xy = xy + (1 - decay(k)) * (h_xy - g.xy(*before, b))
    h_yy, h_xy, before = yy, xy, (x, y)
    safe = raised(yy, min_eigenvalue)
    q = np.linalg.solve(safe, f.y(x, y, b))
    new = x - upper(k) * (f.x(x, y, b) - xy @ q)
    y = y - lower(k) * g.y(x, y, b)
    y = y - np.linalg.solve(safe, xy.T @ (new - x))
    x = new
    yield {'upper': x, 'lower': y}


def stsa(increments, start, batches, *, rates, order='simultaneous'):
  """Coupled sequences, at once or in turn."""
  z = dict(start)
  for k, batch in enumerate(batches):
    visited = dict(z)
    for name, increment in increments.items():
      at = z if order == 'alternating' else visited
      z[name] = z[name] + rates[name](k) * increment(*at.values(), batch)
    yield dict(z)


# Compositions of expectations.


class Level:
  """A level's value and Jacobian."""

  def __init__(self, function):
    """Of a function of (vector, batch)."""
    self.value = in_double(function)
    self.slope = in_double(jax.jacobian(function))


def compositional(
  levels, x, batches, *, main, tracking, start, pick, averaging=1.0,
  corrected=False,
):  # fmt: skip
  """SCGD, NASA with an average, SCSC with corrected levels."""
  means, z, before = list(start), np.zeros_like(x), None
  for k, batch in enumerate(batches):
    b, points = tracking(k), [x, *means]
    new = []
    for n in range(len(means)):
      now = levels[n].value(points[n], pick(batch, n))
      mean = (1 - b) * means[n] + b * now
      if corrected and before is None:
        mean = now
      elif corrected:
        mean += (1 - b) * (now - levels[n].value(before[n], pick(batch, n)))
      new.append(mean)
    at = [x, *new] if corrected else points
    d = levels[-1].slope(at[-1], pick(batch, len(means)))
    for n in reversed(range(len(means))):
      d = levels[n].slope(at[n], pick(batch, n)).T @ d
    z = (1 - averaging) * z + averaging * d
    x, means, before = x - main(k) * z, new, points
    yield {'main': x, **{f'level_{n + 1}': m for n, m in enumerate(means)}}


# Several objectives.


def simplex(v):
  """The nearest point of the simplex, by trying each support."""
  candidates = []
  for size in range(1, v.size + 1):
    for support in map(list, itertools.combinations(range(v.size), size)):
      point = np.zeros_like(v)
      point[support] = v[support] + (1 - v[support].sum()) / size
      if point.min() >= 0:
        candidates.append(point)
  return min(candidates, key=lambda point: np.sum((point - v) ** 2))


def least_norm(gram):
  """The weights of least norm on the simplex, by trying each support."""
  candidates, n = [], len(gram)
  for size in range(1, n + 1):
    for support in map(list, itertools.combinations(range(n), size)):
      inside = np.linalg.solve(gram[np.ix_(support, support)], np.ones(size))
      point = np.zeros(n)
      point[support] = inside / inside.sum()
      if point.min() >= 0:
        candidates.append(point)
  return min(candidates, key=lambda w: w @ gram @ w)


def moco(
  losses, x, batches, *, rate, tracking, weight_step, ridge, radius=np.inf,
  exact=False, corrected=False,
):  # fmt: skip
  """MoCo from zero, MoCo+ from the first Jacobian."""
  tracked, before = np.zeros((len(losses.value(x, batches[0])), x.size)), None
  weights = np.full(len(tracked), 1 / len(tracked))
  for k, batch in enumerate(batches):
    rows = losses.slope(x, batch)
    if corrected:
      if before is not None:
        old = losses.slope(before, batch)
        rows = rows + (1 - tracking(k)) * (tracked - old)
      tracked, before = rows, x
    else:
      tracked = tracked + tracking(k) * (rows - tracked)
    lengths = np.linalg.norm(tracked, axis=1, keepdims=True)
    inside = tracked * np.minimum(1, radius / lengths)
    if not corrected:
      tracked = inside
    gram = inside @ inside.T + ridge(k) * np.eye(len(weights))
    step = weights - weight_step(k) * gram @ weights
    weights = least_norm(gram) if exact else simplex(step)
    x = x - rate(k) * inside.T @ weights
    yield {'x': x, 'weights': weights}


def famo(losses, x, batches, *, rate, weight_rate, weight_decay, minima):
  """FAMO: Adam on the logits, along the change of the logarithms.

  As in the authors' code, 1e-8 is added to a loss above its minimum.
  """
  minima = minima - 1e-8
  logits = np.zeros(len(losses.value(x, batches[0])))
  first, second = np.zeros_like(logits), np.zeros_like(logits)
  for k, batch in enumerate(batches):
    shares = np.exp(logits) / np.exp(logits).sum()
    above = losses.value(x, batch) - minima
    weights = shares / above / np.sum(shares / above)
    x = x - rate(k) * losses.slope(x, batch).T @ weights
    fall = np.log(above) - np.log(losses.value(x, batch) - minima)
    d = (np.diag(shares) - np.outer(shares, shares)) @ fall
    d = d + weight_decay * logits
    first, second = 0.9 * first + 0.1 * d, 0.999 * second + 0.001 * d**2
    root = np.sqrt(second / (1 - 0.999 ** (k + 1)))
    logits = logits - weight_rate(k) * first / (1 - 0.9 ** (k + 1)) / (
      root + 1e-8
    )
    yield {'x': x, 'weights': weights}
