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
  fields = list(settings_lib.flatten(settings))

  def full_name(name):
    if (name := name.replace('__', '.')) in fields:
      return name
    (name,) = [n for n in fields if n.endswith(f'.{name}')]
    return name

  texts = {full_name(n): settings_lib.as_text(v) for n, v in values.items()}
  return settings_lib.override(settings, texts)
