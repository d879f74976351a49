"""Templates with limits give the texts of a plain sandbox."""

import json

import pytest

_WHY = 'needs the extra llm: pip install -e ".[experiments,llm]"'
sandbox = pytest.importorskip('jinja2.sandbox', reason=_WHY)
chat_templates = pytest.importorskip('experiments.lm.chat_templates')

MESSAGES = [
  {'role': 'system', 'content': 'Be  brief.\n'},
  {'role': 'user', 'content': '<b>What</b> is 1 + 1?\n\n"Two"?'},
  {'role': 'assistant', 'content': '<think>Easy</think>\nTwo \u00e9\U0001f600'},
  {'role': 'user', 'content': ''},
]
TEMPLATES = {
  'turns': (
    "{% for m in messages %}{{ '<|' ~ m.role ~ '|>\n' + m['content'] | trim }}"
    "{{ eos_token if not loop.last else '' }}\n{% endfor %}"
    '{%- if add_generation_prompt %}<|assistant|>\n{% endif %}'
  ),
  'first system message': (
    "{% if messages[0]['role'] == 'system' %}"
    "{% set system = messages[0]['content'] | trim %}"
    "{% set rest = messages[1:] %}{% else %}{% set system = '' %}"
    '{% set rest = messages %}{% endif %}{{ system }}|{{ rest | length }}|'
    '{{ tools }}{{ tools is defined }}{{ none }}{{ bos_token }}'
  ),
  'last query': (
    '{%- set ns = namespace(last=-1, found=false) %}'
    '{%- for m in messages[::-1] %}'
    '{%- set index = (messages | length - 1) - loop.index0 %}'
    "{%- if not ns.found and m.role == 'user' and m.content is string %}"
    '{%- set ns.found = true %}{%- set ns.last = index %}{%- endif %}'
    '{%- endfor %}{{ ns.last }}'
  ),
  'thoughts': (
    "{% for m in messages %}{% if '</think>' in m.content %}"
    "{{ m.content.split('</think>')[-1].lstrip('\\n') }}"
    "{{ m.content.split('</think>')[0].rstrip('\\n').split('<think>')[-1] }}"
    "{% elif m.content.startswith('<b>') %}{{ m.content | upper }}"
    '{% else %}{% continue %}{% endif %}{{ loop.index }}{% endfor %}'
  ),
  'macros': (
    "{% macro turn(m, mark='#') -%}{{ mark * 3 }} {{ m.role | title }}:"
    '{{ caller() if caller else m.content }}{%- endmacro %}'
    '{% for m in messages %}{{ turn(m) }}'
    "{% call turn(m, mark='-') %} [{{ m.content | length }}] {% endcall %}"
    '{% endfor %}'
  ),
  'blocks': (
    '{% set text %}{% for m in messages %}{{ m.content }};{% endfor %}'
    "{% endset %}{{ text | replace('\n', ' ') }}"
    '{% filter upper %}{{ messages[0].role }}-a{% endfilter %}'
    '{% with x = (1, 2) %}{{ x[0] + x[1] }}{% endwith %}'
  ),
  'JSON': (
    '{{ messages | tojson }}{{ messages[1] | tojson(indent=2) }}'
    "{{ {'a': [1, 2.5, none, true], 'b': {'c': 'd'}} | tojson }}"
  ),
  'filters': (
    "{{ messages | map(attribute='role') | unique | join(', ') }}|"
    "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}|"
    "{{ messages | rejectattr('content') | first }}|"
    "{{ ['b', 'a'] | sort | join }}|{{ {'b': 1, 'a': 2} | dictsort }}|"
    "{{ 'a,b'.split(',') | last | default('c') }}|{{ x | default('y') }}|"
    "{{ 'a\nb' | indent(4) }}|{{ '%s is %d' % ('a', 3) }}|"
    "{{ '{}-{}'.format(1, 'b') }}|{{ '5' | int + 2 ** 3 // 3 % 4 }}|"
    '{{ range(5) | batch(2) | list }}|{{ [1, 2, 3] | reverse | list }}|'
    "{{ 'abc'[::-1] }}|{{ 'a' if 1 < 2 <= 2 else 'b' }}|{{ [1] == [1] }}"
  ),
  'loops': (
    '{% for k, v in messages[0].items() %}{{ k }}={{ v }}'
    "{{ loop.first }}{{ loop.cycle('a', 'b') }}{% else %}none{% endfor %}"
    '{% for i in range(9) %}{% if i == 3 %}{% break %}{% endif %}{{ i }}'
    '{{ loop.changed(i // 2) }}{% endfor %}{% for i in [] %}{% else %}empty'
    '{% endfor %}{% for a in [[1, [2]], [3]] recursive %}'
    '{{ loop(a) if a is iterable else a }}{% endfor %}'
    '{% for m in messages %}{{ loop.length }}'
    '{{ loop.previtem.role if not loop.first }}{% endfor %}'
  ),
}


def plain(template, variables):
  environment = sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True,
    lstrip_blocks=True,
    extensions=['jinja2.ext.loopcontrols'],
  )
  environment.filters['tojson'] = lambda value, indent=None: json.dumps(
    value, ensure_ascii=False, indent=indent
  )
  return environment.from_string(template).render(**variables)


@pytest.mark.parametrize('name', TEMPLATES)
def test_texts_are_those_of_a_plain_sandbox(name):
  variables = {'messages': MESSAGES, 'eos_token': '</s>'}
  variables['add_generation_prompt'] = True
  text = chat_templates.render(TEMPLATES[name], variables)
  assert text == plain(TEMPLATES[name], variables)
  assert text.strip()


def test_a_long_dialogue_is_within_the_limits():
  messages = [
    {'role': role, 'content': 'abcdefghi\n' * 500}
    for _ in range(100)
    for role in ('user', 'assistant')
  ]
  variables = {'messages': messages, 'eos_token': '</s>'}
  for name in ('turns', 'first system message', 'last query', 'thoughts'):
    text = chat_templates.render(TEMPLATES[name], variables)
    assert text == plain(TEMPLATES[name], variables)
