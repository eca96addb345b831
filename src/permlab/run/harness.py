"""A language model measured by the tasks of lm-evaluation-harness, the extra `llm`."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from permlab.config.suite import HarnessTask
from permlab.errors import ConfigError, nearest
from permlab.sparsity.causal_lm import as_causal_lm
from permlab.task.learner import Summary


def measure(
    model: nn.Module, tokenizer: Any, tasks: Sequence[HarnessTask], *, limit: int | None, device: str
) -> Summary:
    """Results of every task, as `eval/<task>/<result>`.

    Args:
        model: a text model of ours, with the weights that are to be measured.
        tokenizer: transformers' own, of the text that the model reads.
        limit: samples of each task; None for all.
    Raises:
        ConfigError: if the library is not installed, the model is no language model, a task is unknown, or its
            data cannot be had.
    """
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ConfigError(
            f"tasks={tasks[0].name}: needs lm-evaluation-harness ({error}); uv pip install 'permlab[llm]'"
        ) from error
    folders = sorted({str(task.file.parent) for task in tasks if task.file})
    manager = TaskManager(include_path=folders or None)
    _check_names(tasks, manager.all_tasks)
    try:
        language_model = as_causal_lm(model)
    except ValueError as error:
        raise ConfigError(f"tasks={tasks[0].name}: {error}") from error
    wrapped = HFLM(pretrained=language_model, tokenizer=tokenizer, device=device, batch_size=1)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    summary: Summary = {}
    for task in tasks:
        try:
            found = lm_eval.simple_evaluate(
                wrapped, tasks=[task.name], num_fewshot=task.num_fewshot, limit=limit, task_manager=manager,
                bootstrap_iters=0, log_samples=False,
            )  # fmt: skip
        except Exception as error:  # of the network, of a data set, of the task's own functions
            reason = " ".join(str(error).split())[:200]
            raise ConfigError(f"tasks={task.name}: cannot be run ({type(error).__name__}: {reason})") from error
        summary |= _numbers(found["results"])
    return summary


def _check_names(tasks: Sequence[HarnessTask], known: Sequence[str]) -> None:
    for task in tasks:
        if task.name not in known:
            where = f" in {Path(task.file)}" if task.file else ""
            raise ConfigError(f"tasks={task.name}: no such task{where}{nearest(task.name, list(known))}")


def _numbers(results: Any) -> Summary:
    """Numbers by task and name; a filter other than none stays in the name."""
    return {
        f"eval/{task}/{key.removesuffix(',none')}": float(value)
        for task, values in results.items()
        for key, value in values.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool) and key != "sample_len"
    }
