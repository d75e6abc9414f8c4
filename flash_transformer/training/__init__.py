"Loss, learning rate, and the trainer."
from .optimisation import adam, label_smoothed_loss, paper_peak, warmup_inverse_sqrt
from .precision import choose_precision, compile_blocks, matmul_ceiling, peak_memory, training_flops
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
from .trainer import RunFolder, TrainConfig, Trainer, load_checkpoint, save_checkpoint, validation_loss
