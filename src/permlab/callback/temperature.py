"""Steps a method's phase and temperature with the optimiser."""

import lightning as L

from permlab.task.learner import Learner


class Temperature(L.Callback):
    """Tells the learner, before every batch, which optimiser step this is.

    Phase and temperature follow from the two alone, so accumulation and resuming need no care.
    """

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Learner, *_: object) -> None:  # type: ignore[override]
        pl_module.advance(trainer.global_step)
