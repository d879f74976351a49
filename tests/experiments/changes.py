"""Settings with some fields changed, whatever group they are in."""

from typing import Any

from experiments.harness.app import settings as settings_lib


def change(settings: Any, **values: Any) -> Any:
  """Settings with other values.

  Args:
    settings: a dataclass instance, some of whose fields may be groups.
    **values: by the name of the field, or its last part if only one has it;
      `group__field` for `group.field`.
  """
  fields = list(settings_lib.fields_of(settings))

  def whole(name):
    if (name := name.replace('__', '.')) in fields:
      return name
    (found,) = [n for n in fields if n.endswith(f'.{name}')]
    return found

  texts = {whole(n): settings_lib.text_of(v) for n, v in values.items()}
  return settings_lib.override(settings, texts)
