"""The weights that validation picks."""

from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import ModelCheckpoint


class KeepBest(ModelCheckpoint):
    """Keeps the best weights, and remembers their score wherever the run directory has been moved to."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        assert self.dirpath is not None
        best = Path(self.dirpath, Path(state_dict["best_model_path"]).name)
        if not best.is_file():
            return  # the state is another run's, and so is its best
        moved = {"dirpath": self.dirpath, "best_model_path": str(best), "kth_best_model_path": str(best)}
        super().load_state_dict({**state_dict, **moved, "best_k_models": {str(best): state_dict["best_model_score"]}})
