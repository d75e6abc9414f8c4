"Loss, learning rate, and the trainer."
from .optimisation import adam, label_smoothed_loss, paper_peak, warmup_inverse_sqrt
from .trainer import RunFolder, TrainConfig, Trainer, choose_precision, load_checkpoint, save_checkpoint, validation_loss
