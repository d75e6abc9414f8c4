"Loss, learning rate, and the trainer."
from .checkpoints import RunFolder, StopSignals, load_checkpoint, load_model, save_checkpoint, whole
from .dry_run import DryRun, dry_run
from .optimisation import (
    adam,
    batch_loss,
    label_smoothed_loss,
    paper_peak,
    projected_loss,
    warmup_cosine,
    warmup_inverse_sqrt,
)
from .precision import choose_precision, compile_blocks, matmul_ceiling, peak_memory, saved_bytes, training_flops
from .processes import (
    add_up,
    agree,
    all_alive,
    distribute,
    distribute_like,
    full_tensor,
    share,
    start_accelerator,
    synchronise,
)
from .trainer import Progress, TrainConfig, Trainer, is_packed, plan_for, validation_loss
