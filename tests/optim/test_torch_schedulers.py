"""Every learning-rate scheduler of torch."""

import inspect

import pytest
import torch
from scenarios import OURS, parameters, set_grads
from torch import optim
from torch.optim import lr_scheduler

SCHEDULERS = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 0.9**step),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda step: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [1, 3]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.5, 3),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.1, total_iters=4),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.8),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 5, 2.0),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 5),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.001, 0.01, step_size_up=2),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.01, total_steps=8),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1), lr_scheduler.ExponentialLR(o, 0.5)], [3]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.1, 2), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "SWALR": lambda o: optim.swa_utils.SWALR(o, 0.05, 3),
}


BASES = {"FP8AdamW": optim.AdamW, "AdamW": optim.AdamW, "SGD": lambda p, lr: optim.SGD(p, lr, momentum=0.9)}


def test_every_scheduler_of_torch_is_here():
    public = {
        name
        for name, value in vars(lr_scheduler).items()
        if inspect.isclass(value) and issubclass(value, lr_scheduler.LRScheduler) and not name.startswith("_")
    }
    assert public - {"LRScheduler"} <= set(SCHEDULERS)


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("tensor_lr", [False, True])
def test_schedulers_set_what_they_set_in_torch(name, scheduler, tensor_lr):
    """Learning rates and cycled betas or momentum are those of torch's optimizer, and the weights follow them."""
    made = []
    for make in (BASES[name], OURS[name]):
        params = parameters()
        optimizer = make(params, lr=torch.tensor(0.01) if tensor_lr else 0.01)
        schedule = SCHEDULERS[scheduler](optimizer)
        seen = []
        for step in range(7):
            set_grads(params, step)
            optimizer.step()
            schedule.step(*([1.0] if scheduler == "ReduceLROnPlateau" else []))
            group = optimizer.param_groups[0]
            seen.append((float(group["lr"]), group.get("betas"), group.get("momentum")))
        made.append((params, seen, schedule.state_dict()))
    (plain, expected, _), (ours, seen, state) = made
    assert seen == expected
    for p, q, start in zip(plain, ours, parameters(), strict=True):
        assert (p - q).norm() <= 0.055 * (p - start).norm()
    other = OURS[name](parameters(), lr=0.01)
    SCHEDULERS[scheduler](other).load_state_dict(state)
