"""Twenty losses of fixed-seed runs, so that no change alters training unnoticed.

After a change that is meant to alter them: `python tests/golden/test_losses.py`.
"""

import json
import sys
import tempfile
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
from runs import train

FILE = Path(__file__).with_name("losses.json")
CASES = [
    f"{model}-{method}"
    for model in ("vit_nano", "vim_nano", "llama_nano")
    for method in ("sort_ste", "sinkhorn", "reorder")
]
# Relative; other processors round differently, and twenty steps amplify that.
TOLERANCE = 2e-3


def losses(case: str, runs: Path) -> list[float]:
    model, method = case.split("-")
    options = (
        "trainer.log_every_n_steps=1",
        "task.control=false",
        "model.patch_size=2",
        "trainer.val_check_interval=20",
    )
    result = train(runs, f"model={model}", f"method={method}", *options, steps=20)
    assert result.code == 0, result.err
    return [line["train/loss"] for line in result.metrics]


@pytest.mark.parametrize("case", CASES)
def test_losses_are_what_they_were(case: str, tmp_path: Path) -> None:
    expected = json.loads(FILE.read_text())[case]
    assert len(expected) == 20
    assert losses(case, tmp_path) == pytest.approx(expected, rel=TOLERANCE)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        found = {case: [round(loss, 6) for loss in losses(case, Path(folder))] for case in CASES}
    FILE.write_text(json.dumps(found, indent=1) + "\n")
