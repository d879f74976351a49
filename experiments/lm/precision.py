"""Settings of the dtypes of a model's arithmetic and weights."""

import dataclasses
from typing import Any, Literal

import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Precision:
  """Dtypes of a command that runs a language model.

  Attributes:
    compute: dtype of the arithmetic; bfloat16 is faster on accelerators.
      Trained weights, losses and logits stay float32.
    dtype: dtype of frozen weights and of exported models; `source` for that of
      the model's files.
  """

  compute: Literal['float32', 'bfloat16'] = 'float32'
  dtype: Literal['source', 'float32', 'bfloat16', 'float16'] = 'source'

  @property
  def compute_dtype(self) -> Any:
    """Dtype for `Tuning` and `generation`."""
    return jnp.dtype(self.compute)

  @property
  def stored_dtype(self) -> Any:
    """Dtype for `weights.load`; None for that of the files."""
    return None if self.dtype == 'source' else jnp.dtype(self.dtype)

  def export_dtype(self, source: Any) -> Any:
    """Dtype for `hugging_face.export`; `source` is that of the files."""
    return jnp.dtype(source if self.dtype == 'source' else self.dtype)
