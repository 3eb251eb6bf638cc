"""Distance of two images in the amplitudes of their frequencies: Dhariwal et al., "Jukebox" (2020),
section 3.3.
"""

from __future__ import annotations

import torch
from monai.losses import JukeboxLoss

from synthcube.losses import wide


class SpectralLoss(JukeboxLoss):
    """Mean squared difference of the amplitudes of two (B, C, *spatial); blind to phases.

    The transform runs over the channels and `spatial_dims` axes after them, orthonormally, so that
    the loss is at most the mean squared difference of the images.
    """

    def _get_fft_amplitude(self, images: torch.Tensor) -> torch.Tensor:
        # MONAI's square root has no gradient where an amplitude is 0, as in an empty image: NaN.
        transformed: torch.Tensor = torch.fft.fftn(
            wide(images), s=self.fft_signal_size, dim=self.fft_dim, norm=self.fft_norm
        )
        return transformed.abs()
