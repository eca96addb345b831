"""The README's sample is of the configuration as it is."""

import re
from pathlib import Path

from permlab.config.compose import resolve_train

README = Path(__file__).resolve().parents[2] / "README.md"


def test_the_run_of_the_sample_is_the_default_one() -> None:
    plan, _ = resolve_train([])
    named = set(re.findall(r"runs/classify/\S+?/seed=0-[0-9a-f]{8}", README.read_text()))
    assert named == {str(plan.directory)}
