"""torchmetrics of language modelling, of casts to FP8, and of what goes wrong in training."""

from lightning_fp8.metrics.amax import Amax
from lightning_fp8.metrics.attention import AttentionEntropy, AttentionLogitMax
from lightning_fp8.metrics.block_sqnr import BlockSQNR
from lightning_fp8.metrics.cosine import CosineDistortion
from lightning_fp8.metrics.grad_norm import GradNormZ
from lightning_fp8.metrics.kurtosis import ActivationKurtosis
from lightning_fp8.metrics.log_z import OutputLogZ
from lightning_fp8.metrics.loss_gap import LossGapToReference
from lightning_fp8.metrics.loss_spike import LossSpike
from lightning_fp8.metrics.lr_sensitivity import LRSensitivity, lr_sensitivity
from lightning_fp8.metrics.max_median import MaxMedianRatio
from lightning_fp8.metrics.moment_zeros import MomentZeroFraction
from lightning_fp8.metrics.perplexity import BitsPerByte, Perplexity
from lightning_fp8.metrics.saturation import SaturationRate
from lightning_fp8.metrics.scale_drift import ScaleDrift
from lightning_fp8.metrics.scale_lag import ScaleLag
from lightning_fp8.metrics.sqnr import SQNR
from lightning_fp8.metrics.stalled import StalledUpdateFraction
from lightning_fp8.metrics.swiglu import SwiGLUAlignment
from lightning_fp8.metrics.underflow import UnderflowRate
from lightning_fp8.metrics.update_size import MaxUpdate, UpdateRMS

__all__ = [
    "SQNR",
    "ActivationKurtosis",
    "Amax",
    "AttentionEntropy",
    "AttentionLogitMax",
    "BitsPerByte",
    "BlockSQNR",
    "CosineDistortion",
    "GradNormZ",
    "LRSensitivity",
    "LossGapToReference",
    "LossSpike",
    "MaxMedianRatio",
    "MaxUpdate",
    "MomentZeroFraction",
    "OutputLogZ",
    "Perplexity",
    "SaturationRate",
    "ScaleDrift",
    "ScaleLag",
    "StalledUpdateFraction",
    "SwiGLUAlignment",
    "UnderflowRate",
    "UpdateRMS",
    "lr_sensitivity",
]
