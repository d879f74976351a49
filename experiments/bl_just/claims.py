"""Runs and claims of the papers on BL-JUST."""

from experiments import harness

PAPER = harness.Paper(
  'Joint unsupervised and supervised speech training, 2024',
  solvers=('multi_objective', 'scale_by_penalty'),
  headlines={
    'difference/bl_just/supervised': 'word error minus supervised {}',
    'difference/bl_just/pretrain': 'minus pre-training {}',
  },
)

_SHARED = {
  'run': 'strings',
  # The preset smoke is too short to test these claims.
  'presets': ('quick',),
}

_SPEECH = {'binary': 'train', 'data': 'speech', 'extra': 'asr'}
RUNS = {
  'strings': harness.Run(**_SPEECH),
  'twentieth': harness.Run(
    **_SPEECH,
    flags=(
      '--labelled=0.05',
      '--methods=supervised,pretrain,bl_just',
      '--seeds=5',
    ),
    presets=('quick',),
  ),
  'few': harness.Run(**_SPEECH, preset='few', presets=()),
  'digits': harness.Run(**_SPEECH, preset='digits', presets=()),
  'an4_grid': harness.Run(**_SPEECH, preset='an4_grid', presets=()),
  'an4_full': harness.Run(**_SPEECH, preset='an4_full', presets=()),
}

CLAIMS = (
  harness.Claim(
    'The program trains from audio to text, on tones in noise.',
    run='strings',
    metric='training_error/supervised',
    at_most=1.5,
    presets=('smoke',),
  ),
  harness.Claim(
    'Strings of digits, a quarter with texts: the supervised network fits its '
    'training utterances, for the worst seed.',
    metric='worst_training_error/supervised',
    at_most=0.02,
    **_SHARED,
  ),
  harness.Claim(
    'Word error of BL-JUST below supervised training at equal updates.',
    metric='difference/bl_just/supervised',
    at_most=0,
    published='LibriSpeech, clean and other: 7.0 and 17.1 against 8.7 and 23.0',
    **_SHARED,
  ),
  harness.Claim(
    'The same at equal gradients.',
    metric='difference/bl_just/supervised_longer',
    at_most=0,
    **_SHARED,
  ),
  harness.Claim(
    'Word error of BL-JUST below pre-training and fine-tuning at equal '
    'updates.',
    metric='difference/bl_just/pretrain',
    at_most=0,
    published='LibriSpeech, clean and other: 7.0 and 17.1 against 7.4 and 19.5',
    **_SHARED,
  ),
  harness.Claim(
    'LibriSpeech, 100 hours with transcripts: test word error of BL-JUST below '
    'supervised training.',
    run='strings',
    metric='wer/bl_just',
    at_most='wer/supervised',
    published='7.0 against 8.7 (clean)',
    presets=('paper',),
  ),
)
