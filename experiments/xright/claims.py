"""Claims of the paper on ALRIGHT and MAXRIGHT, and the runs that judge them."""

from experiments import harness

PAPER = harness.Paper(
  'Forgetting in fine-tuning and preference learning, 2024',
  solvers=('alright', 'maxright'),
  headlines={
    'gap_exponent/alright/mix': 'toy: gap falls by the power {}',
    'ideal_distance/alright/share=0.5': 'SmolLM2: ideal distance {}, '
    'below stages',
  },
)

# The preset `paper` needs --model.
_LANGUAGE = {
  'presets': ('quick',),
  'substituted': 'SmolLM2-135M, HH harmless test rows, Alpaca and Dolly rows',
}

RUNS = {
  'toy': harness.Run('toy'),
  'pareto': harness.Run(
    'pareto', data='llm', extra='llm', presets=('smoke', 'quick')
  ),
  'lr5e-3': harness.Run(
    'pareto',
    flags=('--methods=sequential,alright', '--learning_rate=5e-3'),
    data='llm',
    extra='llm',
    presets=('quick',),
  ),
  'conflict': harness.Run(
    'conflict', data='llm', extra='llm', presets=('smoke', 'quick')
  ),
  'conflict_length': harness.Run(
    'conflict',
    flags=('--conflict=length',),
    data='llm',
    extra='llm',
    presets=('quick',),
  ),
  'train': harness.Run('train', presets=('smoke',)),
}

_CONFLICT = {
  'presets': ('quick',),
  'substituted': 'a decoder of 0.15 million weights, trained from scratch',
}
_CONFLICTS = {
  'conflict': 'demonstrations and comparisons of two styles',
  'conflict_length': 'long demonstrations, comparisons that prefer short ones',
}
_JOINT = ('alright', 'maxright')

CLAIMS = (
  *(
    harness.Claim(
      'Toy: after stages of fine-tuning and preference learning, the gap '
      f'{title} does not fall with the length of the run.',
      run='toy',
      metric=f'gap_exponent/sequential/{gap}',
      at_least=-0.05,
      published='does not vanish',
    )
    for gap, title in (
      ('mix', 'to the best weighted sum'),
      ('max', 'to the least larger gap'),
    )
  ),
  harness.Claim(
    'Toy: the gap of ALRIGHT to the best weighted sum falls with the length.',
    run='toy',
    metric='gap_exponent/alright/mix',
    at_most=-0.4,
    published='a theorem',
  ),
  harness.Claim(
    'Toy: the gap of MAXRIGHT to the least larger gap falls with the length.',
    run='toy',
    metric='gap_exponent/maxright/max',
    at_most=-0.35,
    published='a theorem',
  ),
  *(
    harness.Claim(
      f'Toy: at the largest length, the gap of training in stages is at least '
      f'20 times that of {method.upper()}.',
      run='toy',
      metric=f'gap_ratio/{method}',
      at_least=20,
      presets=('quick', 'paper'),
    )
    for method in ('alright', 'maxright')
  ),
  *(
    claim
    for step, run in (('2e-3', 'pareto'), ('5e-3', 'lr5e-3'))
    for claim in (
      harness.Claim(
        f'SmolLM2-135M, Adam at {step}, equal updates, mixing ratio 1/2: the '
        'norm of both gaps to the best held-out losses is smaller after '
        'ALRIGHT than after stages.',
        metric='ideal_distance/alright/share=0.5',
        at_most='ideal_distance/sequential/share=0.5',
        published='0.265 against 0.83 (Pythia-1b)',
        run=run,
        **_LANGUAGE,
      ),
      harness.Claim(
        f'SmolLM2-135M, Adam at {step}: this norm is smaller in 4 of 5 seeds.',
        metric='wins/alright/share=0.5',
        at_least=4,
        run=run,
        **_LANGUAGE,
      ),
    )
  ),
  *(
    claim
    for run, data in _CONFLICTS.items()
    for method in _JOINT
    for claim in (
      harness.Claim(
        f'Small decoder, {data}, equal gradients, tuned steps and ratios: the '
        'norm of both gaps to the best held-out losses is smaller after '
        f'{method.upper()} than after stages, demonstrations first.',
        metric=f'ideal_distance/{method}',
        at_most='ideal_distance/sequential',
        published='0.265 against 0.83 (Pythia-1b)',
        run=run,
        **_CONFLICT,
      ),
      *(
        harness.Claim(
          f'Small decoder, {data}: this norm is larger after {single} alone '
          f'than after {method.upper()}.',
          metric=f'ideal_distance/{single}',
          at_least=f'ideal_distance/{method}',
          run=run,
          **_CONFLICT,
        )
        for single in ('demonstrations', 'comparisons')
      ),
      harness.Claim(
        f'Small decoder, {data}: with each gap divided by what training can '
        f'gain, this norm is smaller after {method.upper()} than after stages.',
        metric=f'scaled_distance/{method}',
        at_most='scaled_distance/sequential',
        run=run,
        **_CONFLICT,
      ),
    )
  ),
)
