"""What a run was told to do, and when it was told something else."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ar_jax.files.models import write_json
from ar_jax.files.words import shown


def note(file: Path, facts: dict[str, Any], done: dict[str, int], more: bool) -> list[str]:
    """Writes a run's `run.json`: the settings it is trained with now, and what they were before, with the updates done by then.

    Args:
      file: of the run.
      facts: config, overrides, versions, and the experiment as `codec.encode` gives it.
      done: finished updates of every stage.
      more: whether this command trains; otherwise the file stays as it is.
    Returns:
      What changed, in words.
    """
    if not file.exists():
        if more:
            write_json(file, facts)
        return []
    old = json.loads(file.read_text())
    changed = {where: both for where, *both in differences(old["experiment"], facts["experiment"])}
    since = ", ".join(f"{stage} {step}" for stage, step in done.items())
    said = [f"{where} is {shown(now)}, was {shown(was)} until update {since}" for where, (was, now) in changed.items()]
    if not more:
        return [f"everything is trained; not used: {line}" for line in said]
    changes = old.get("changes", [])
    if changed:
        was, now = ({where: both[i] for where, both in changed.items()} for i in (0, 1))
        changes = [*changes, {"updates_done": done, "was": was, "now": now}]
    write_json(file, facts | ({"changes": changes} if changes else {}))
    return said


def differences(a: Any, b: Any, where: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Where two trees of JSON differ, with both values; what one of them lacks is None."""
    if isinstance(a, dict) and isinstance(b, dict):
        for name in [*a, *(name for name in b if name not in a)]:
            yield from differences(a.get(name), b.get(name), f"{where}.{name}".lstrip("."))
    elif a != b:
        yield where, a, b
