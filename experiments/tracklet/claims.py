"""Claims of Hu, Huang and Shen, and the bounds that show them."""

from experiments import harness

PAPER = harness.Paper(
  'Multi-object tracking by tracklet search, 2020',
  solvers=('gradient',),
  headlines={
    'idf1_lead/search/teacher_forcing': 'IDF1 above teacher forcing {}',
    'idf1_lead/better/classical': 'above classical trackers {}',
  },
)

_SHARED = {
  'run': 'train',
  # Scenes of seconds and untrained networks show nothing.
  'presets': ('quick', 'paper'),
}
_ONLINE = 'MOTA 52.6, IDF1 51.3 (test, public detections)'
_EXPOSURE = {'run': 'exposure', 'presets': ('quick',)}
_SEARCHES = {
  'search': 'search',
  'rollouts': 'search on histories of the tracker',
}
_CONDITIONS = {'motion': 'Motion only', 'mixed': 'Mixed embeddings'}

RUNS = {
  'train': harness.Run('train', extra='mot'),
  'curve': harness.Run('curve', extra='mot', presets=('smoke', 'quick')),
  'exposure': harness.Run('exposure', extra='mot', presets=('smoke', 'quick')),
  'peers': harness.Run('peers', extra='peers', presets=('smoke', 'quick')),
}

CLAIMS = (
  harness.Claim(
    'Search in training beats teacher forcing with the same network: IDF1 of '
    'the online tracker.',
    run='train',
    metric='idf1_lead/search/teacher_forcing',
    at_least=0,
    published='ablation of the paper',
  ),
  harness.Claim(
    'Search in training has fewer identity switches than teacher forcing, '
    'online.',
    metric='switches_lead/search/teacher_forcing',
    at_most=0,
    published='ablation of the paper',
    **_SHARED,
  ),
  *(
    harness.Claim(
      f'{words} improves the pretrained weights: IDF1.',
      metric=f'idf1_lead/{name}/first_weights',
      at_least=0,
      **_SHARED,
    )
    for words, name in (
      ('Search in training', 'search'),
      ('More teacher forcing', 'teacher_forcing'),
    )
  ),
  harness.Claim(
    'Search in training raises the purity of a search with K = 4 above that '
    'after teacher forcing, by sums of scores.',
    metric='purity_lead/search/teacher_forcing/k4',
    at_least=0.08,
    **_SHARED,
  ),
  harness.Claim(
    'Search in training raises the purity of a search with K = 4 above that '
    'after teacher forcing, by log-probabilities.',
    metric='purity_lead/search/teacher_forcing/k4_normalised',
    at_least=0.08,
    **_SHARED,
  ),
  harness.Claim(
    'Search in training with K = 4 has a higher purity than teacher forcing '
    'without a search.',
    metric='purity/search/k4',
    at_least='purity/teacher_forcing/k1',
    **_SHARED,
  ),
  *(
    harness.Claim(
      f'Online, {name}: IDF1.',
      metric=f'idf1/{metric}',
      at_least=65,
      published=_ONLINE,
      **_SHARED,
    )
    for name, metric in (
      ('teacher forcing', 'teacher_forcing'),
      ('search', 'search'),
    )
  ),
  harness.Claim(
    'Online, search: MOTA.',
    metric='mota/search',
    at_least=61.5,
    published=_ONLINE,
    **_SHARED,
  ),
  harness.Claim(
    'The better network has at least 5 points more IDF1 than the best '
    'classical tracker, tuned on the training sequences.',
    metric='idf1_lead/better/classical',
    at_least=5,
    **_SHARED,
  ),
  harness.Claim(
    'Pooled IDF1 of the better network on two sequences of another data set, '
    'with real detections.',
    metric='idf1/better/untrained/all',
    at_least=68,
    **_SHARED,
  ),
  harness.Claim(
    'IDF1 of teacher forcing with embeddings of noise 1.',
    run='curve',
    presets=('quick',),
    metric='idf1/teacher_forcing/standard/noise=1',
    at_least=72,
  ),
  *(
    harness.Claim(
      f'Hard detections, embeddings of noise {noise:g}: search in training has '
      'a higher IDF1 than teacher forcing.',
      run='curve',
      presets=('quick',),
      metric=f'idf1_lead/search/teacher_forcing/hard/noise={noise:g}',
      at_least=0,
      published='ablation of the paper',
    )
    for noise in (1.5, 2.0, 3.0)
  ),
  *(
    harness.Claim(
      f'{title}: an oracle on mixed histories raises IDF1 of teacher forcing '
      'by at least 3 points.',
      metric=f'idf1_lead/{condition}/teacher_forcing/person',
      at_least=3,
      **_EXPOSURE,
    )
    for condition, title in _CONDITIONS.items()
  ),
  *(
    claim
    for condition, title in _CONDITIONS.items()
    for way, words in _SEARCHES.items()
    for claim in (
      harness.Claim(
        f'{title}: {words} has a higher IDF1 than teacher forcing, for equal '
        'CPU time.',
        metric=f'idf1_lead/{condition}/{way}/teacher_forcing/tracklet',
        at_least=0,
        published='ablation of the paper',
        **_EXPOSURE,
      ),
      harness.Claim(
        f'{title}: {words} takes at most 15 % more CPU time than teacher '
        'forcing.',
        metric=f'cpu_seconds/{condition}/{way}',
        at_most=f'cpu_seconds/{condition}/teacher_forcing',
        factor=1.15,
        **_EXPOSURE,
      ),
    )
  ),
  *(
    harness.Claim(
      f'{title}, search on histories of the tracker: matching by whole '
      'tracklets has a higher IDF1 than by the score of a step.',
      metric=f'idf1_lead/{condition}/rollouts/tracklet/step',
      at_least=0,
      **_EXPOSURE,
    )
    for condition, title in _CONDITIONS.items()
  ),
  harness.Claim(
    'The best tracker of other packages, tuned on the training sequences, is 5 '
    'points below the bound of the networks, on the same detections.',
    run='peers',
    metric='idf1/best',
    at_most=60,
  ),
  harness.Claim(
    'Near-online is no worse than online after search in training: IDF1.',
    metric='idf1_lead/search_near_online/search',
    at_least=0,
    published='53.3 against 51.3',
    **_SHARED,
  ),
)
