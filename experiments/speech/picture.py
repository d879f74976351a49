"""Draws an utterance: its spectrum and the network's aligned output."""

import io
import pathlib
from collections.abc import Sequence

import chex
import matplotlib.figure
import numpy as np

from experiments.harness.store import files
from experiments.harness.study.plots import COLOURS
from experiments.speech import alignment
from experiments.speech.units import BLANK

_GREY = '#999999'


def draw(
  path: files.Path,
  spectrum: chex.Array,
  log_probs: chex.Array,
  labels: chex.Array,
  symbols: Sequence[str],
  *,
  seconds: float,
  title: str = '',
) -> pathlib.Path:
  """Draws the spectrum, and below it the probability of each label of a text.

  Borders mark the start and end of each label on the likeliest path. Equal
  labels have the same colour.

  Args:
    path: the PNG file.
    spectrum: log energies, (frames, bands).
    log_probs: output of the network, (out frames, labels).
    labels: the recognised text, int (n,).
    symbols: symbol of each label, see `units.Units`.
    seconds: length of the utterance.
    title: title of the picture.

  Returns:
    The path.

  Raises:
    DamagedDataError: if no path has the labels, see `alignment.align`.
    WriteError: if the file cannot be written; names the folder.
  """
  spectrum = np.asarray(spectrum, np.float32)
  outputs = np.asarray(log_probs, np.float64)
  labels = np.asarray(labels, np.int32).reshape(-1)
  aligned = alignment.align(outputs, labels)
  step = seconds / len(outputs)
  times = (np.arange(len(outputs)) + 0.5) * step
  figure = matplotlib.figure.Figure(
    figsize=(max(6.4, min(2.0 * seconds, 16.0)), 4.8), layout='constrained'
  )
  above, below = figure.subplots(2, 1, sharex=True)
  above.imshow(
    spectrum.T,
    origin='lower',
    aspect='auto',
    cmap='magma',
    interpolation='nearest',
    extent=(0.0, seconds, 0.0, spectrum.shape[1]),
  )
  above.set(ylabel='band', title=title)
  below.plot(
    times,
    np.exp(outputs[:, BLANK]),
    color=_GREY,
    lw=0.9,
    ls=':',
    label='no label (blank)',
  )
  kinds = list(dict.fromkeys(labels.tolist()))
  for i, kind in enumerate(kinds):
    colour = COLOURS[i % len(COLOURS)]
    below.plot(times, np.exp(outputs[:, kind]), color=colour, linewidth=1.5)
  for label, start, stop in zip(labels, aligned.starts, aligned.stops):
    colour = COLOURS[kinds.index(label) % len(COLOURS)]
    for axes in (above, below):
      axes.axvspan(start * step, stop * step, color=colour, alpha=0.18, lw=0)
      axes.axvline(start * step, color=colour, lw=0.7)
    below.text(
      (start + stop) / 2 * step,
      1.03,
      '␣' if symbols[label] == ' ' else symbols[label],
      ha='center',
      va='bottom',
      fontsize=8,
      color=colour,
    )
  below.set(
    xlabel='time, seconds',
    ylabel='probability',
    ylim=(0.0, 1.15),
    xlim=(0.0, seconds),
  )
  below.legend(fontsize=7, loc='center right', framealpha=0.6)
  content = io.BytesIO()
  figure.savefig(content, format='png', dpi=150)
  path = pathlib.Path(path)
  files.write_bytes(path, content.getvalue())
  return path
