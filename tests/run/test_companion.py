"""Plans of the runs before and beside a run."""

from pathlib import Path

from permlab.config.compose import resolve_train
from permlab.run.companion import companion_plan


def test_a_companion_is_checked_once_it_has_the_keys_that_it_takes_over(tmp_path: Path) -> None:
    """By itself `data=text` has no folder."""
    (tmp_path / "a.txt").write_text("A line of text.\n\n" * 400)
    plan, _ = resolve_train(["task=prune", "model=llama_nano", "data=text", f"data.root={tmp_path}"])
    (companion,) = plan.task.before(plan).values()
    dense = companion_plan(plan, companion)
    assert dense.config["data"]["root"] == str(tmp_path)
    assert dense.spec == plan.spec
