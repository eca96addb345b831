"""A validation after the very last step, wherever the interval falls."""

import lightning as L

from permlab.task.learner import Learner


class ValidateAtEnd(L.Callback):
    """Asks the trainer to stop after the last step, which makes it validate first.

    Otherwise the steps after the last multiple of `val_check_interval` could not be picked.
    """

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Learner, *_: object) -> None:  # type: ignore[override]
        if trainer.global_step >= pl_module.num_steps:
            trainer.should_stop = True
