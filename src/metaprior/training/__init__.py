"""Meta-training: the outer loop, its settings, and checkpoints."""

from metaprior.training.loop import (
    Fitted,
    NonFiniteLoss,
    Recorder,
    Restored,
    Training,
    TrainState,
    fit,
    init_state,
    mean_gradient,
    meta_gradient,
    meta_step,
    outer_optimizer,
    outer_update,
    run_chunk,
)

__all__ = [
    "Fitted", "NonFiniteLoss", "Recorder", "Restored", "TrainState", "Training", "fit", "init_state", "mean_gradient",
    "meta_gradient", "meta_step", "outer_optimizer", "outer_update", "run_chunk",
]  # fmt: skip
