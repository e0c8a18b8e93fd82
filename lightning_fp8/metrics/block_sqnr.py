"""Signal to quantisation noise of the worst blocks, which the figure of the whole tensor hides."""

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_fp8.metrics.merged import OfCasts, squares
from lightning_fp8.metrics.rounded import Rounded

BLOCK = 128
BINS = 64  # of 1 dB, from 0 on; the last takes all above, exact casts too
_SHARE = 0.05


class BlockSQNR(OfCasts):
    """The SQNR in dB that 5 % of the blocks do not reach: blocks of 128 consecutive elements of the last dimension.

    The 5th percentile is taken from a histogram of 1 dB bins, linear within a bin, so it is within 1 dB of that of
    the values; blocks that are zero throughout do not count; NaN before the first other. A cast to the nearest value
    has at least 0 dB in every block, and exactly that where everything underflows; a non-finite block counts as 0 dB.
    `update(x, cast)`. Reduction: the sum of the histograms.
    """

    size = BINS
    higher_is_better = True

    @staticmethod
    def measure(x: Rounded) -> Tensor:
        """The statistics: how many blocks are in each bin."""
        if x.exact.numel() == 0:
            return torch.zeros(BINS, dtype=torch.float64, device=x.exact.device)
        signal, noise = _energy(x.exact), _energy(x.exact - x.value)
        db = torch.where(noise == 0, torch.inf, 10 * (signal / noise).log10()).nan_to_num(0.0, posinf=BINS - 0.5)
        # Blocks without a signal go last, beyond the last bin. Sorting needs no atomic additions, unlike histc.
        order = torch.where(signal == 0, torch.inf, db.clamp(0, BINS - 0.5)).sort().values
        edges = torch.arange(1, BINS + 1, dtype=order.dtype, device=order.device)
        below = torch.searchsorted(order, edges).double()
        return below.diff(prepend=below.new_zeros(1))

    @staticmethod
    def figure(statistics: Tensor) -> Tensor:
        """In dB."""
        below = statistics.cumsum(-1)
        wanted = below[..., -1:] * _SHARE
        bin_ = (below < wanted).sum(-1, keepdim=True).clamp_max(BINS - 1)
        inside = statistics.gather(-1, bin_)
        before = below.gather(-1, bin_) - inside
        return (bin_ + (wanted - before) / inside).squeeze(-1)


def _energy(x: Tensor) -> Tensor:
    """The sum of squares, fp64, of each block."""
    padded = F.pad(x, (0, -x.shape[-1] % BLOCK)) if x.shape[-1] % BLOCK else x
    return squares(padded.reshape(-1, BLOCK), dim=1)
