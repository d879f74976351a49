"""Steps in PyTorch, and of packages for it; see `serve`.

Each function makes a case and returns `run(steps)`. Sizes, losses and step
sizes are those of our benchmark with the same name.
"""

import functools
import itertools

import torch
from torch import nn
from torch.nn import functional

CLASSES = 10


def repeat(step):
  """Repeats a step."""

  def run(steps):
    for _ in range(steps):
      step()

  return run


def v_pbgd(model, rows, features, hidden, classes, seeds=1):
  """V-PBGD on data hyper-cleaning; runs several seeds one at a time."""
  torch.manual_seed(0)
  draw = lambda: torch.rand(rows, features)
  train, validation = draw(), draw()

  def apply(y, images):
    if model == 'linear':
      return torch.addmm(y[1], images, y[0])
    inner = torch.sigmoid(torch.addmm(y[1], images, y[0]))
    return torch.addmm(y[3], inner, y[2])

  def weights():
    sizes = {'linear': [(features, classes)]}.get(
      model, [(features, hidden), (hidden, classes)]
    )
    for fan_in, fan_out in sizes:
      yield (0.05 * torch.randn(fan_in, fan_out)).requires_grad_()
      yield torch.zeros(fan_out, requires_grad=True)

  def one_seed():
    labels = torch.randint(classes, (2, rows))
    x = (0.05 * torch.randn(rows)).requires_grad_()
    y = list(weights())
    w = [z.detach().clone().requires_grad_() for z in y]

    def lower(x, y):
      losses = functional.cross_entropy(
        apply(y, train), labels[0], reduction='none'
      )
      return torch.mean(torch.sigmoid(x) * losses)

    count = 0

    def step():
      nonlocal count
      penalty = min(0.2, 0.2 * count / 30_000)
      count += 1
      slopes = torch.autograd.grad(lower(x.detach(), w), w)
      with torch.no_grad():
        for z, slope in zip(w, slopes):
          z -= 0.01 * slope
        at_value = functional.cross_entropy(
          apply(w, train), labels[0], reduction='none'
        )
      gap = lower(x, y) - torch.mean(torch.sigmoid(x) * at_value)
      upper = functional.cross_entropy(apply(y, validation), labels[1])
      loss = (upper + penalty * gap) / max(penalty, 1.0)
      slopes = torch.autograd.grad(loss, [x, *y])
      with torch.no_grad():
        for z, slope in zip([x, *y], slopes):
          z -= 0.1 * slope

    return step

  steps = [one_seed() for _ in range(seeds)]

  def run(count):
    for step in steps:
      repeat(step)(count)

  return run


def _digits(width, rows):
  """Makes a network with weighted digits: losses, parameters, weights."""
  torch.manual_seed(0)
  widths = (width, width, width, CLASSES)
  y = []
  for fan_in, fan_out in itertools.pairwise(widths):
    y.append((torch.randn(fan_in, fan_out) / fan_in**0.5).requires_grad_())
    y.append(torch.zeros(fan_out, requires_grad=True))
  images = torch.randn(2, rows, width)
  labels = torch.randint(CLASSES, (2, rows))

  def logits(y, images):
    for w, b in zip(y[:-2:2], y[1:-2:2]):
      images = torch.tanh(torch.addmm(b, images, w))
    return torch.addmm(y[-1], images, y[-2])

  def upper(x, y):
    del x
    return functional.cross_entropy(logits(y, images[1]), labels[1])

  def lower(x, y):
    losses = functional.cross_entropy(
      logits(y, images[0]), labels[0], reduction='none'
    )
    decay = sum((z**2).sum() for z in y) / 2
    return torch.mean(torch.sigmoid(x) * losses) + decay

  return lower, upper, y, torch.zeros(rows, requires_grad=True)


def implicit_torchopt(width, rows, products):
  """An implicit hypergradient by conjugate gradients."""
  import torchopt

  lower, upper, y, x = _digits(width, rows)

  def optimality(y, x):
    return torch.func.grad(lambda y: lower(x, y))(y)

  solve = torchopt.linear_solve.solve_cg(maxiter=products, rtol=0.0, atol=0.0)

  @torchopt.diff.implicit.custom_root(optimality, argnums=1, solve=solve)
  def solution(y, x):
    return tuple(z.detach().clone().requires_grad_() for z in y)

  start = tuple(y)

  def step():
    return torch.autograd.grad(upper(x, solution(start, x)), x)

  return repeat(step)


def unrolled_torchopt(width, rows, steps, rate):
  """A hypergradient through steps of gradient descent."""
  import torchopt

  lower, upper, y, x = _digits(width, rows)

  class Model(nn.Module):
    def __init__(self):
      super().__init__()
      for i, z in enumerate(y):
        self.register_parameter(f'z{i}', nn.Parameter(z.detach().clone()))

    def all(self):
      return [getattr(self, f'z{i}') for i in range(len(y))]

  model = Model()
  optimiser = torchopt.MetaSGD(model, lr=rate)
  first = torchopt.extract_state_dict(model, by='reference')
  state = torchopt.extract_state_dict(optimiser, by='reference')

  def step():
    for _ in range(steps):
      optimiser.step(lower(x, model.all()))
    slope = torch.autograd.grad(upper(x, model.all()), x)
    torchopt.recover_state_dict(model, first)
    torchopt.recover_state_dict(optimiser, state)
    return slope

  return repeat(step)


def unrolled_higher(width, rows, steps, rate):
  """A hypergradient through steps of gradient descent, by `higher`."""
  import higher

  lower, upper, y, x = _digits(width, rows)

  class Model(nn.Module):
    def __init__(self):
      super().__init__()
      self.list = nn.ParameterList(nn.Parameter(z.detach().clone()) for z in y)

    def forward(self, loss):
      return loss(x, list(self.list))

  model = Model()
  optimiser = torch.optim.SGD(model.parameters(), lr=rate)

  def step():
    with higher.innerloop_ctx(model, optimiser) as (functional_model, inner):
      for _ in range(steps):
        inner.step(functional_model(lower))
      return torch.autograd.grad(functional_model(upper), x)

  return repeat(step)


def aggregator(name, objectives, hidden, batch, options):
  """A step of TorchJD on a shared trunk and a head per objective."""
  from torchjd import aggregation, autojac

  torch.manual_seed(0)
  options = dict(options)
  if name == 'Constant':
    options = {'weights': torch.ones(objectives) / objectives}
  combine = getattr(aggregation, name)(**options)
  trunk = nn.Sequential(
    nn.Linear(784, hidden, bias=False),
    nn.ReLU(),
    nn.Linear(hidden, hidden, bias=False),
    nn.ReLU(),
  )
  heads = nn.ModuleList(
    nn.Linear(hidden, CLASSES, bias=False) for _ in range(objectives)
  )
  images = torch.randn(batch, 784)
  labels = torch.randint(CLASSES, (objectives, batch))
  optimiser = torch.optim.SGD([*trunk.parameters(), *heads.parameters()], 1e-3)

  def step():
    optimiser.zero_grad()
    features = trunk(images)
    losses = [
      functional.cross_entropy(head(features), wanted)
      for head, wanted in zip(heads, labels)
    ]
    autojac.mtl_backward(losses, features=features)
    autojac.jac_to_grad(trunk.parameters(), combine)
    optimiser.step()

  return repeat(step)


def language_model(objective, sizes, rows, length, answer, rank):
  """A step of SFT or DPO on adapters of queries and values, by peft.

  Like in our benchmark, the head only sees the answers, and the reference's
  log-probabilities are precomputed.
  """
  import peft
  import transformers

  torch.manual_seed(0)
  config = transformers.LlamaConfig(
    **sizes, attention_dropout=0.0, use_cache=False
  )
  model = peft.get_peft_model(
    transformers.LlamaForCausalLM(config),
    peft.LoraConfig(
      r=rank,
      lora_alpha=rank,
      lora_dropout=0.0,
      target_modules=['q_proj', 'v_proj'],
      task_type='CAUSAL_LM',
    ),
  )
  model.train()
  count = rows if objective == 'sft' else 2 * rows
  tokens = torch.randint(sizes['vocab_size'], (count, length))
  wanted = tokens[:, -answer:]
  trained = [p for p in model.parameters() if p.requires_grad]
  optimiser = torch.optim.Adam(trained, lr=1e-3, betas=(0.9, 0.95))

  def log_probs():
    # The position before each token of the answer predicts it.
    logits = model(input_ids=tokens, logits_to_keep=answer + 1).logits[:, :-1]
    return -functional.cross_entropy(
      logits.transpose(1, 2), wanted, reduction='none'
    )

  reference = None
  if objective == 'dpo':
    with torch.no_grad():
      reference = log_probs().sum(1)

  def step():
    optimiser.zero_grad()
    nats = log_probs()
    if objective == 'sft':
      loss = -nats.mean()
    else:
      chosen, rejected = torch.chunk(nats.sum(1) - reference, 2)
      loss = -functional.logsigmoid(0.1 * (chosen - rejected)).mean()
    loss.backward()
    optimiser.step()

  return repeat(step)


sft = functools.partial(language_model, 'sft')
dpo = functools.partial(language_model, 'dpo')
# Imported before the memory of a step is measured.
sft.imports = dpo.imports = (
  'peft',
  'transformers.models.llama.modeling_llama',
)
