"""A callback for jobs on the command line: prints the mean loss of all processes, step by step."""

import torch.distributed as dist
from lightning.pytorch import Callback


class MeanLosses(Callback):
    """Prints them as `examples/fsdp2_pretrain.py` does."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        loss = outputs["loss"].detach().clone()
        dist.all_reduce(loss)
        if trainer.is_global_zero:
            print(f"step {trainer.global_step:5}  loss {loss.item() / trainer.world_size:.6f}")
