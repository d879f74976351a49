"""Broken tokenisers and chat templates of a model's folder."""

import json

from tests.faults.corpus.models import (
  MISSING,
  Case,
  edit,
  fields,
  put,
)

TOKENS, SETTINGS = 'tokenizer.json', 'tokenizer_config.json'
TEMPLATE = 'chat_template.jinja'


def model(**changes):
  """Changes the fields of the model of tokens."""

  def change(raw):
    content = json.loads(raw)
    content['model'] |= changes
    return json.dumps(content).encode()

  return edit(TOKENS, change)


def vocabulary(change):
  """Changes the numbers of tokens."""

  def apply(raw):
    content = json.loads(raw)
    content['model']['vocab'] = change(content['model']['vocab'])
    return json.dumps(content).encode()

  return edit(TOKENS, apply)


def added(**changes):
  """Changes the last added token."""

  def apply(raw):
    content = json.loads(raw)
    content['added_tokens'][-1] |= changes
    return json.dumps(content).encode()

  return edit(TOKENS, apply)


_TOKENS = {
  'has no model': ('', fields(TOKENS, {'model': MISSING})),
  'has a null model': ('', fields(TOKENS, {'model': None})),
  'has an unknown model': ('', model(type='Bytes')),
  'has no vocabulary': ('', model(vocab=None)),
  'has an empty vocabulary': ('', vocabulary(lambda v: {})),
  'has added tokens only': ('letters', model(vocab={}, merges=[])),
  'has a list for its vocabulary': ('', vocabulary(list)),
  'has a token of number 2**31': (
    'number|embeddings',
    vocabulary(lambda v: {**v, 'much': 2**31}),
  ),
  'has a token of number 2**40': ('', vocabulary(lambda v: {**v, 'm': 2**40})),
  'has a token of number -1': ('', vocabulary(lambda v: {**v, 'm': -1})),
  'has a token of number 1.5': ('', vocabulary(lambda v: {**v, 'm': 1.5})),
  'has a token beyond the embedding': (
    'embeddings',
    vocabulary(lambda v: {**v, 'more': 300}),
  ),
  'has two tokens of one number': (
    'number',
    vocabulary(lambda v: {**v, 'more': 5}),
  ),
  'has merges that are numbers': ('', model(merges=[1, 2])),
  'has merges of unknown tokens': ('', model(merges=[['zz', 'yy']])),
  'drops merges at random': ('dropout', model(dropout=0.5)),
  'has a dropout of NaN': ('', model(dropout=float('nan'))),
  'has an unknown splitter': (
    '',
    fields(TOKENS, {'pre_tokenizer': {'type': 'Unknown'}}),
  ),
  'has a pattern that is none': (
    '',
    fields(
      TOKENS,
      {
        'pre_tokenizer': {
          'type': 'Split',
          'pattern': {'Regex': '(['},
          'behavior': 'Isolated',
          'invert': False,
        }
      },
    ),
  ),
  'makes long texts of short ones': (
    'times as long',
    fields(
      TOKENS,
      {
        'normalizer': {
          'type': 'Sequence',
          'normalizers': 9
          * [{'type': 'Replace', 'pattern': {'String': 'a'}, 'content': 'aaa'}],
        }
      },
    ),
  ),
  'has an unknown normaliser': ('', fields(TOKENS, {'normalizer': [1]})),
  'has an unknown decoder': ('', fields(TOKENS, {'decoder': 'a'})),
  'has an added token without text': ('', added(content=None)),
  'has an added token of number -1': ('', added(id=-1)),
  'has added tokens that are texts': (
    '',
    fields(TOKENS, {'added_tokens': ['<s>']}),
  ),
  'is of version 9': ('', fields(TOKENS, {'version': '9.0'})),
}
_SETTINGS = {
  'has no eos_token': ('eos_token', fields(SETTINGS, {'eos_token': MISSING})),
  'has an unknown eos_token': (
    'eos_token',
    fields(SETTINGS, {'eos_token': 'q!'}),
  ),
  'has a number for eos_token': (
    'eos_token',
    fields(SETTINGS, {'eos_token': 1}),
  ),
  'has a list for eos_token': (
    'eos_token',
    fields(SETTINGS, {'eos_token': ['a']}),
  ),
  'has an eos_token without content': (
    'eos_token',
    fields(SETTINGS, {'eos_token': {'id': 1}}),
  ),
  'has a list for bos_token': (
    'bos_token',
    fields(SETTINGS, {'bos_token': ['<s>']}),
  ),
  'has a number for the template': (
    'chat_template',
    fields(SETTINGS, {'chat_template': 1}),
  ),
  'has templates without names': (
    'chat_template',
    fields(SETTINGS, {'chat_template': [{'template': 'a'}]}),
  ),
  'has templates that are texts': (
    'chat_template',
    fields(SETTINGS, {'chat_template': ['a']}),
  ),
  'has a template that is an object': (
    'chat_template',
    fields(SETTINGS, {'chat_template': {'a': 'b'}}),
  ),
}
CASES = {
  f'{file} {name}': Case('model', file, cause, damage)
  for file, table in ((TOKENS, _TOKENS), (SETTINGS, _SETTINGS))
  for name, (cause, damage) in table.items()
}
CASES['tokenizer.json is missing'] = Case(
  'model', TOKENS, 'no tokenizer', lambda folder: (folder / TOKENS).unlink()
)

_LOOP = '{% for a in range(99999) %}'
_DOUBLE = (
  "{% set n = namespace(x='ab') %}{% for i in range(60) %}"
  '{% set n.x = n.x ~ n.x %}{% endfor %}'
)
_NEST = '{% set n = namespace(x=[1]) %}{% for i in range(60) %}'
# Templates that end in an error of Jinja: name -> (cause, template).
_WRONG = {
  'is cut short': ('line 1', '{% for m in messages %}'),
  'has an unknown tag': ('line 2', 'a\n{% fro m in messages %}'),
  'has an unknown filter': ('line 1', '{{ messages | sortt }}'),
  'has an unknown test': ('line 1', '{{ 1 is good }}'),
  'has a missing value': ('no attribute', '{{ messages[0].name.first }}'),
  'refuses the messages': ('no users', "{{ raise_exception('no users') }}"),
  'refuses in two lines': ('a b', "{{ raise_exception('a\\nb') }}"),
  'makes filler text': ('undefined', '{{ lipsum(n=10**9) }}'),
  'sums lists': ('filter', '{{ ([[1]] * 99999)|sum(start=[]) }}'),
  'divides by zero': ('zero', '{{ 1 / 0 }}'),
  'adds a number to a text': ('', "{{ 'a' + 1 }}"),
  'reads the globals of Python': (
    '',
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
  ),
  'reads the code of a function': (
    '',
    '{{ raise_exception.__globals__["json"].x }}',
  ),
  'changes a message': ('', '{{ messages.append(1) }}'),
  'includes a file': ('', "{% include '/etc/passwd' %}"),
  'imports a file': ('', "{% import '/etc/passwd' as a %}"),
  'extends a file': ('', "{% extends '/etc/passwd' %}"),
  'has a formatted attribute': ('', "{{ '{0.__class__.x}'.format(1) }}"),
  'has 10,000 parentheses': ('', '{{ ' + '(' * 10_000 + ')' * 10_000 + ' }}'),
  'has 10,000 nested conditions': (
    '',
    '{% if a %}' * 10_000 + '{% endif %}' * 10_000,
  ),
  'has 30 nested loops': (
    '',
    '{% for a in [1] %}' * 30 + '{% endfor %}' * 30,
  ),
  'has a long chain of attributes': ('', '{{ a' + '.b' * 20_000 + ' }}'),
  'calls itself for ever': (
    '',
    '{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}',
  ),
}
# Templates that run for ever or fill the memory.
_LARGE = {
  'loops for ever': _LOOP + _LOOP + _LOOP + 3 * '{% endfor %}',
  'loops silently': _LOOP
  + _LOOP
  + '{% if a == 1 %}{% endif %}'
  + 2 * '{% endfor %}',
  'loops over a long range': '{% for a in range(10**12) %}{% endfor %}',
  'calls itself twice': (
    '{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}'
    '{% endmacro %}{{ f(60) }}'
  ),
  'loops recursively': (
    '{% set x = namespace(c=[1, 1]) %}{% for a in [1, 1] recursive %}'
    '{{ loop([1, 1]) if loop.depth < 60 }}{% endfor %}'
  ),
  'doubles a text': _DOUBLE,
  'doubles a text by plus': _DOUBLE.replace('n.x ~ n.x', 'n.x + n.x'),
  'doubles a text by join': _DOUBLE.replace('n.x ~ n.x', '[n.x, n.x]|join'),
  'doubles a text by replace': _DOUBLE.replace(
    'n.x ~ n.x', "n.x.replace('a', 'aa').replace('b', 'bb')"
  ),
  'doubles a text by a filter': _DOUBLE.replace(
    'n.x ~ n.x', "n.x|replace('a', 'aa')|replace('b', 'bb')"
  ),
  'doubles a text by a format': _DOUBLE.replace(
    'n.x ~ n.x', "'{0}{0}'.format(n.x)"
  ),
  'doubles a text by a percentage': _DOUBLE.replace(
    'n.x ~ n.x', "'%s%s' % (n.x, n.x)"
  ),
  'doubles a text by a block': _DOUBLE.replace(
    '{% set n.x = n.x ~ n.x %}', '{% set n.x %}{{ n.x }}{{ n.x }}{% endset %}'
  ),
  'doubles a text by a macro': (
    '{% macro f(x) %}{{ x }}{{ x }}{% endmacro %}'
    + _DOUBLE.replace('n.x ~ n.x', 'f(n.x)')
  ),
  'doubles a list': _NEST + '{% set n.x = n.x + n.x %}{% endfor %}',
  'multiplies a list': _NEST + '{% set n.x = n.x * 9 %}{% endfor %}',
  'nests a list': _NEST + '{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x }}',
  'nests a list that JSON writes': _NEST
  + '{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x|tojson }}',
  'compares nested lists': _NEST
  + '{% set n.x = [n.x, n.x] %}{% endfor %}{% set m = namespace(x=[1]) %}'
  '{% for i in range(60) %}{% set m.x = [m.x, m.x] %}{% endfor %}'
  '{{ n.x == m.x }}',
  'nests an object': _NEST
  + "{% set n.x = {'a': n.x, 'b': n.x} %}{% endfor %}{{ n.x }}",
  'repeats a text': "{{ 'a' * 10**10 }}",
  'repeats a text in a condition': "{% if 'a' * 10**10 %}{% endif %}",
  'repeats a list': '{% set x = [1] * 10**10 %}',
  'has a large power': '{{ 10 ** (10 ** 9) }}',
  'has a large product': (
    '{% set n = namespace(x=9) %}{% for i in range(60) %}'
    '{% set n.x = n.x * n.x %}{% endfor %}'
  ),
  'centres a text': "{{ 'a'.center(10**10) }}",
  'centres a text by a filter': "{{ 'a'|center(10000000000) }}",
  'indents a text': "{{ 'a\nb'|indent(10000000000) }}",
  'fills a text': "{{ 'a'.zfill(10**10) }}",
  'expands tabs': "{{ '\t\t'.expandtabs(10**10) }}",
  'fills a batch': "{{ [1]|batch(10**10, 'a')|list }}",
  'slices a list': '{{ [1]|slice(10**10)|list }}',
  'pads a number by a percentage': "{{ '%10000000000d' % 1 }}",
  'pads by a width in the values': "{{ '%*d' % (10**10, 1) }}",
  'pads a number by a filter': "{{ '%10000000000d'|format(1) }}",
  'pads a number by a format': "{{ '{:10000000000}'.format(1) }}",
  'pads by a nested format': "{{ '{:{}}'.format(1, 10**10) }}",
  'writes JSON with a large indent': '{{ messages|tojson(indent=10**10) }}',
  'maps a range': "{{ range(99999)|map('center', 99999)|list }}",
  'writes static text often': (_LOOP + 'a' * 50_000 + '{% endfor %}'),
  'searches a long text often': (
    "{% set x = 'a' * 1000000 %}" + _LOOP + "{{ 'b' in x }}{% endfor %}"
  ),
  'copies a long text often': (
    "{% set x = 'a' * 1000000 %}" + _LOOP + '{% set y = x[1:] %}{% endfor %}'
  ),
}
CASES |= {
  f'{TEMPLATE} {name}': Case('template', TEMPLATE, cause, put(TEMPLATE, text))
  for name, (cause, text) in _WRONG.items()
}
CASES |= {
  f'{TEMPLATE} {name}': Case(
    'template',
    TEMPLATE,
    'too (much|large)|large',
    put(TEMPLATE, text),
    heavy=True,
  )
  for name, text in _LARGE.items()
}
_BYTES = {
  'is not UTF-8': ('UTF-8', b'\xff{{ messages }}'),
  'is UTF-16': ('UTF-8', '{{ messages }}'.encode('utf-16')),
  'has 8 MiB': ('bytes', b'a' * 2**23),
}
CASES |= {
  f'{TEMPLATE} {name}': Case('template', TEMPLATE, cause, put(TEMPLATE, text))
  for name, (cause, text) in _BYTES.items()
}
