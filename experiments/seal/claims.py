"""Claims of the paper on SEAL, and the runs that judge them."""

from experiments import harness

PAPER = harness.Paper(
  'Safety-enhanced LLM fine-tuning by data selection, 2024',
  solvers=('seal',),
  headlines={
    'agreement/descent/epochs=3': 'fixed losses: agreement with a sort {}',
    'auroc_style_matched/seal/harmless': 'rejected answers: AUROC {}',
  },
)

_SUBSTITUTED = 'SmolLM2-135M, Alpaca and Dolly rows, HH harmless test rows'


def _on_rows(sentence: str, metric: str, **bound: object) -> harness.Claim:
  return harness.Claim(
    sentence,
    run='rank',
    metric=metric,
    presets=('quick', 'paper'),
    substituted=_SUBSTITUTED,
    **bound,  # type: ignore[arg-type]
  )


_HARMLESS = 'runs/seal/rank/quick/rows/harmless/scores.jsonl'
_ROWS = {'data': 'llm', 'extra': 'llm'}
RUNS = {
  'static': harness.Run('static'),
  'rank': harness.Run('rank', **_ROWS),
  'rank_dpo': harness.Run(
    'rank',
    **_ROWS,
    flags=(
      '--safe_loss=dpo',
      '--sets=harmless',
      '--methods=seal,initial_loss',
    ),
    presets=(),
  ),
  'rank_excess': harness.Run(
    'rank',
    **_ROWS,
    flags=(
      '--score=excess',
      '--sets=harmless',
      '--methods=seal_full,excess,initial_loss',
    ),
    presets=(),
  ),
  'evaluate': harness.Run('evaluate', presets=('smoke',)),
  **{
    f'evaluate_{name}': harness.Run(
      'evaluate',
      flags=(f'--scores=runs/seal/rank/quick/rows/{name}/scores.jsonl',),
      presets=(),
    )
    for name in ('harmless', 'shuffled')
  },
  'train_smoke': harness.Run('train', presets=('smoke',)),
  'train': harness.Run(
    'train',
    **_ROWS,
    flags=(
      f'--scores={_HARMLESS}',
      '--selection_methods=all,kept,clean,mixture,surgery',
    ),
    presets=(),
  ),
}

CLAIMS = (
  *(
    harness.Claim(
      f'Fixed losses, whole epochs: {title} drops the rows that a sort of the '
      'losses drops.',
      run='static',
      metric=f'agreement/{name}/epochs=3',
      at_least=0.95,
    )
    for name, title in (('descent', 'descent'), ('mirror', 'mirror descent'))
  ),
  harness.Claim(
    'Fixed losses, three epochs: the published Adam on all scores drops fewer '
    'unsafe rows than descent.',
    run='static',
    metric='unsafe_drop/adam/epochs=3',
    at_most='unsafe_drop/descent/epochs=3',
    lead=0.1,
    presets=('quick', 'paper'),
  ),
  _on_rows(
    'Shuffled answers among ordinary rows: the selector detects them (area '
    'under the ROC curve).',
    'auroc/seal/shuffled',
    at_least=0.8,
  ),
  _on_rows(
    'Shuffled answers: the selector is not below the loss of the first model.',
    'auroc/seal/shuffled',
    at_least='auroc/initial_loss/shuffled',
    lead=-0.02,
  ),
  _on_rows(
    'Rejected against chosen answers to other prompts: the selector is above '
    'the loss of the first model.',
    'auroc_style_matched/seal/harmless',
    at_least='auroc_style_matched/initial_loss/harmless',
    lead=0.05,
  ),
  *(
    _on_rows(
      'Rejected against chosen answers to other prompts: the selector is above '
      f'the control that keeps the {control} answers.',
      'auroc_style_matched/seal/harmless',
      at_least=f'auroc_style_matched/{control}/harmless',
      lead=0.05,
    )
    for control in ('longer', 'shorter')
  ),
)
