"""How unevenly the energy of activations is spread over their channels."""

from typing import Any

from torch import Tensor

from lightning_fp8.metrics.merged import Merged, squares


class ActivationKurtosis(Merged):
    """mean_j r_j^4 / (mean_j r_j^2)^2, r_j being the RMS of channel j over all tokens.

    1 if all channels are alike, K if one is all there is; NaN of zeros. `update(x)` with x [..., K]. Reduction: the sum
    over tokens of the squares of each channel. (He et al., 2405.19279: below 10 without, above 600 with outlier
    features at 7 B parameters; FOG, 2505.20524: it grows long before an FP8 run diverges.)

    Args:
        channels: K.
    """

    higher_is_better = None

    def __init__(self, channels: int, **kwargs: Any) -> None:
        super().__init__(channels, **kwargs)

    @staticmethod
    def measure(x: Tensor) -> Tensor:
        """The statistics: fp64 [K]."""
        flat = x.reshape(-1, x.shape[-1])
        return squares(flat, dim=0)

    @staticmethod
    def figure(statistics: Tensor) -> Tensor:
        """In 1..K."""
        share = statistics / statistics.amax(-1, keepdim=True)  # or the square of a sum of squares could overflow
        return share.square().mean(-1) / share.mean(-1).square()

    def update(self, x: Tensor) -> None:
        """Adds activations [..., K]."""
        self.add(self.measure(x))
