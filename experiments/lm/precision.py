"""The dtype of a model's arithmetic and of its weights: two settings."""

import dataclasses
from typing import Any, Literal

import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Precision:
  """Settings of every command that runs a language model.

  Attributes:
    compute: dtype of the arithmetic; bfloat16 is faster on accelerators.
      Weights that are trained, losses and logits stay float32.
    dtype: dtype in which weights are stored that are not trained, and in which
      a model is exported; `source` for that of the model's files.
  """

  compute: Literal['float32', 'bfloat16'] = 'float32'
  dtype: Literal['source', 'float32', 'bfloat16', 'float16'] = 'source'

  @property
  def compute_dtype(self) -> Any:
    """For `Tuning` and `generation`."""
    return jnp.dtype(self.compute)

  @property
  def stored_dtype(self) -> Any:
    """For `weights.load`; None for that of the files."""
    return None if self.dtype == 'source' else jnp.dtype(self.dtype)

  def export_dtype(self, source: Any) -> Any:
    """For `hugging_face.export`, where files have the dtype `source`."""
    return jnp.dtype(source if self.dtype == 'source' else self.dtype)
