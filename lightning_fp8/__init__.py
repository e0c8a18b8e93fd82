"""End-to-end FP8 pre-training for PyTorch Lightning and Fabric."""

__version__ = "0.1.0.dev0"
