"""What a training step of the decoder will take: memory, bytes between devices, time. Before a machine is rented."""

from lightning_fp8.estimate.memory import Activations, DeviceMemory, activations, device_memory
from lightning_fp8.estimate.roofline import Prediction, predict_step
from lightning_fp8.estimate.setup import COMMUNICATIONS, Communication, Setup
from lightning_fp8.estimate.traffic import bytes_per_step

__all__ = [
    "COMMUNICATIONS",
    "Activations",
    "Communication",
    "DeviceMemory",
    "Prediction",
    "Setup",
    "activations",
    "bytes_per_step",
    "device_memory",
    "predict_step",
]
