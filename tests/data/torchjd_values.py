"""Records what another library's aggregators give, once, as JSON.

Run in an environment of its own, not one of the project:

    python3.11 -m venv venv
    venv/bin/pip install torch==2.13.0
    venv/bin/pip install 'torchjd[quadprog-projector,nash-mtl,cagrad]==0.18.0'
    venv/bin/python tests/data/torchjd_values.py tests/data/torchjd_values.json

Random orders and uniform numbers are recorded beside the result that they gave.
"""

import json
import sys
import warnings

import torch
import torchjd
from torchjd import aggregation, linalg, scalarization

torch.set_default_dtype(torch.float64)
warnings.simplefilter('ignore')


def matrices():
  """Jacobians: random ones, conflicting ones, dependent rows, odd scales."""
  draw = torch.Generator().manual_seed(0)
  normal = lambda *shape: torch.randn(*shape, generator=draw)
  found = {
    'two': normal(2, 5),
    'two in conflict': torch.tensor([[1.0, 0.0, 0.5], [-2.0, 1.0, 0.3]]),
    'two nearly opposed': torch.tensor([[1.0, 0.1], [-1.0, 0.1]]),
    'three': normal(3, 6),
    'three scales': normal(3, 6) * torch.tensor([[1.0], [10.0], [0.1]]),
    'four': normal(4, 9),
    'five of a kind': normal(1, 8) + 0.3 * normal(5, 8),
    'seven': normal(7, 20),
    'more rows than columns': normal(4, 2),
    'acute': torch.tensor([[1.0, 0.2], [0.3, 1.0]]),
  }
  return found


class Recorder:
  """Keeps what torch.randperm and torch.rand draw."""

  def __enter__(self):
    self.drawn = []
    self._saved = torch.randperm, torch.rand
    torch.randperm = self._keep(torch.randperm)
    torch.rand = self._keep(torch.rand)
    return self

  def _keep(self, draw):
    def drawn(*args, **kwargs):
      out = draw(*args, **kwargs)
      self.drawn.append(out.tolist())
      return out

    return drawn

  def __exit__(self, *_):
    torch.randperm, torch.rand = self._saved


def record():
  """All values."""
  torch.manual_seed(1)
  rows = []
  for name, matrix in matrices().items():
    size = matrix.shape[0]
    weights = torch.arange(1.0, size + 1)
    losses = torch.linspace(0.5, 2.0, size)
    # Next to none of its regularisation: the projections themselves.
    exact = linalg.QuadprogProjector(norm_eps=1e-12, reg_eps=1e-10)
    methods = {
      'mean': aggregation.Mean(),
      'weighted': aggregation.Constant(weights),
      'mgda': aggregation.MGDA(epsilon=1e-14, max_iters=200_000),
      'cagrad': aggregation.CAGrad(c=0.4),
      'imtl_g': aggregation.IMTLG(),
      'nash_mtl': aggregation.NashMTL(size, max_norm=0.0, optim_niter=200),
      'nash_mtl of norm one': aggregation.NashMTL(
        size, max_norm=1.0, optim_niter=200
      ),
      'aligned_mtl': aggregation.AlignedMTL(),
      'upgrad': aggregation.UPGrad(projector=exact),
      'dual_proj': aggregation.DualProj(projector=exact),
      'pcgrad': aggregation.PCGrad(),
      'grad_drop': aggregation.GradDrop(),
      'grad_vac': aggregation.GradVac(),
    }
    for method, aggregate in methods.items():
      repeats = 2 if method == 'grad_vac' else 1
      with Recorder() as recorder:
        for _ in range(repeats):
          out = aggregate(matrix).tolist()
      rows.append(
        {
          'matrix': name,
          'method': method,
          'value': out,
          'drawn': recorder.drawn,
        }
      )
    other = matrix + 0.1
    cross = matrix @ other.T
    for method, weighting in {
      'modo': aggregation.MoDoWeighting(gamma=0.05, rho=0.1),
      'sdmgrad': aggregation.SDMGradWeighting(lr=0.5),
    }.items():
      weighting(cross)
      rows.append(
        {
          'matrix': name,
          'method': method,
          'value': weighting(cross).tolist(),
          'drawn': [],
        }
      )
    for method, scalar in {
      'stch': scalarization.STCH(mu=0.3),
      'uncertainty_weighting': scalarization.UW(size),
    }.items():
      values = losses.clone().requires_grad_(True)
      (slope,) = torch.autograd.grad(scalar(values), values)
      rows.append(
        {
          'matrix': name,
          'method': method,
          'value': (slope @ matrix).tolist(),
          'drawn': [],
        }
      )
  return {
    'versions': {'torch': torch.__version__, 'torchjd': '0.18.0'},
    'matrices': {k: v.tolist() for k, v in matrices().items()},
    'rows': rows,
  }


if __name__ == '__main__':
  assert torchjd is not None
  with open(sys.argv[1], 'w') as file:
    json.dump(record(), file)
