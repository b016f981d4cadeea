"""Fourier transforms, as speech models use them. Complex numbers are a last axis of length 2."""

from __future__ import annotations

import torch
from torch import Tensor

from onnxlr.torch_graph.registry import operator


def _transformed(x: Tensor, length: Tensor | None, axis: int, inverse: int, onesided: int) -> Tensor:
    complex_input = x.shape[-1] == 2
    axis = axis % x.ndim
    z = torch.view_as_complex(x.contiguous()) if complex_input else x.squeeze(-1)
    n = None if length is None else int(length)
    if inverse and onesided:
        return torch.fft.irfft(z, n, axis).unsqueeze(-1)
    if inverse:
        y = torch.fft.ifft(z, n, axis)
    else:
        y = torch.fft.fft(z, n, axis)
        if onesided:
            y = y.narrow(axis, 0, y.shape[axis] // 2 + 1)
    return torch.view_as_real(y.resolve_conj())


@operator("DFT", since=17, host=(1,))
def dft_17(x: Tensor, length: Tensor | None = None, *, axis: int = 1, inverse: int = 0, onesided: int = 0) -> Tensor:
    """Discrete Fourier transform along an axis."""
    return _transformed(x, length, axis, inverse, onesided)


@operator("DFT", since=20, host=(1, 2))
def dft(
    x: Tensor, length: Tensor | None = None, axis: Tensor | None = None, *, inverse: int = 0, onesided: int = 0
) -> Tensor:
    """Discrete Fourier transform along an axis."""
    return _transformed(x, length, -2 if axis is None else int(axis), inverse, onesided)


@operator("STFT", since=17, host=(1, 3))
def stft(
    x: Tensor, step: Tensor, window: Tensor | None = None, length: Tensor | None = None, *, onesided: int = 1
) -> Tensor:
    """Short-time Fourier transform: [n, samples, 1 or 2] to [n, frames, bins, 2]."""
    size = int(length) if length is not None else window.shape[0] if window is not None else x.shape[1]
    frames = x.unfold(1, size, int(step)).transpose(2, 3)
    if window is not None:
        frames = frames * window[:, None]
    return _transformed(frames, None, 2, 0, onesided)
