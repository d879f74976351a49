"""What the paper on SEAL claims, and how it is judged here."""

from experiments import harness

CLAIMS = (
  *(
    harness.Claim(
      f'Losses that stand still, whole epochs: {words} drops the rows that a '
      'sort of the losses would drop.',
      binary='static',
      metric=f'agreement/{name}/e3',
      at_least=0.95,
      published='-',
    )
    for name, words in (('descent', 'descent'), ('mirror', 'mirror descent'))
  ),
  harness.Claim(
    'Losses that stand still, three epochs: the published Adam on all scores '
    'drops fewer unsafe rows than descent.',
    binary='static',
    metric='unsafe_drop/adam/e3',
    at_most='unsafe_drop/descent/e3',
    lead=0.1,
    published='-',
    presets=('quick', 'paper'),
  ),
)
