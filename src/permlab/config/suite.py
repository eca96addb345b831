"""Which tasks of lm-evaluation-harness an evaluation is asked for: names, files and suites of `conf/suite`."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from permlab.config.schema import CONF
from permlab.errors import nearest


@dataclass(frozen=True)
class HarnessTask:
    """A task by its name there, with the file that describes it where it is none of the library's own.

    Args:
        num_fewshot: examples in front of every question; None for what the task itself says.
    """

    name: str
    num_fewshot: int | None = None
    file: Path | None = None


def suite_names() -> list[str]:
    return sorted(path.stem for path in (CONF / "suite").glob("*.yaml"))


def harness_tasks(words: Any) -> list[HarnessTask]:
    """Tasks of `tasks=`, a word or a list of them.

    Raises:
        ValueError: if a word is none, a file is not there or names no task, or a task is named twice.
    """
    found = [task for word in ([words] if isinstance(words, str) else words) for task in _read(word)]
    names = [task.name for task in found]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{name} is there twice")
    if not found:
        raise ValueError(f"expected tasks, files of tasks or suites{nearest('', suite_names())}")
    return found


def _read(word: Any) -> list[HarnessTask]:
    if not isinstance(word, str) or not word:
        raise ValueError(f"{word}: expected the name of a task, a file of one, or a suite{nearest('', suite_names())}")
    if word.endswith((".yaml", ".yml")):
        return [HarnessTask(_name_in(Path(word)), file=Path(word))]
    if word in suite_names():
        tasks: Mapping[str, int] = yaml.safe_load((CONF / "suite" / f"{word}.yaml").read_text())["tasks"]
        return [HarnessTask(name, count) for name, count in tasks.items()]
    return [HarnessTask(word)]


def _name_in(file: Path) -> str:
    """The name that a file of a task gives it; its own tags, such as those of functions, are not looked at."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise ValueError(f"{file}: cannot be read ({type(error).__name__})") from error
    for line in lines:
        key, separator, value = line.partition(":")
        if separator and key == "task" and value.strip():
            return value.strip().strip("\"'")
    raise ValueError(f"{file}: has no line `task: <name>`")
