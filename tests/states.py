"""Compares what two runs have come to, bit for bit."""

import torch


def differences(a, b, name="checkpoint"):
    """Names of what is not the same in two nested states, tensors by their bits."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        same = a.dtype is b.dtype and a.shape == b.shape
        return [] if same and torch.equal(a.nan_to_num(), b.nan_to_num()) else [name]
    if isinstance(a, dict) and isinstance(b, dict):
        missing = [f"{name}.{key}" for key in a.keys() ^ b.keys() if key != "differentiable"]  # added by torch's load
        pairs = [(a[key], b[key], f"{name}.{key}") for key in a.keys() & b.keys()]
        return missing + [found for pair in pairs for found in differences(*pair)]
    if isinstance(a, list | tuple) and len(a) == len(b):
        return [found for i, pair in enumerate(zip(a, b, strict=True)) for found in differences(*pair, f"{name}[{i}]")]
    return [] if a == b or (a != a and b != b) else [name]
