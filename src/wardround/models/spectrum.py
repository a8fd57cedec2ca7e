"""Amplitudes of images: a network sees every image with one amplitude, or keeps a bank of those of other sites.

An image x has the spectrum F(x) = A exp(i phi). Scanners differ in A, in its low frequencies above all (brightness,
contrast, shading), while phi holds where things are. Spectra are those of `torch.fft.rfftn` over the axes of an image
(2-D or 3-D): a real image's other half is the mirror of it. They are divided by the number of voxels, so that no value
is larger than the mean of |x| whatever the size of the image.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import floor
from typing import Any

import torch
from torch import Tensor, nn

from wardround.errors import StudyError
from wardround.study.methods import AMPLITUDE, AMPLITUDE_BANK, Spectrum
from wardround.study.methods import UNKNOWN_AMPLITUDE as UNKNOWN


def spectrum_of(images: Tensor) -> Tensor:
    """The half spectrum of real images (..., C, *shape), by `shape` of two axes or three: (B, C, *half), complex."""
    axes = tuple(range(2, images.ndim))
    found: Tensor = torch.fft.rfftn(images.float(), dim=axes, norm="forward")
    return found


def images_of(spectrum: Tensor, shape: Sequence[int]) -> Tensor:
    """The real images of half spectra: the inverse of `spectrum_of`."""
    axes = tuple(range(2, spectrum.ndim))
    found: Tensor = torch.fft.irfftn(spectrum, s=tuple(shape), dim=axes, norm="forward")
    return found


def with_amplitude(spectrum: Tensor, amplitude: Tensor) -> Tensor:
    """A exp(i angle F): a spectrum with other amplitudes and its own phases; where it is 0 its phase counts as 0."""
    return torch.polar(amplitude.expand(spectrum.shape).contiguous(), torch.angle(spectrum))


def half_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """The shape of a half spectrum."""
    return (*shape[:-1], shape[-1] // 2 + 1)


def frequencies(shape: Sequence[int]) -> Tensor:
    """|k| of every place of a half spectrum, in cycles an image: (*half)."""
    axes = [torch.fft.fftfreq(size, 1.0 / size) for size in shape[:-1]]
    axes.append(torch.fft.rfftfreq(shape[-1], 1.0 / shape[-1]))
    squares = [
        axis.square().reshape([-1 if n == place else 1 for n in range(len(axes))]) for place, axis in enumerate(axes)
    ]
    return sum(squares, start=torch.zeros(())).sqrt()


class LowFrequencies(nn.Module):
    """The frequencies at most `radius` from 0 along every axis, of half spectra of images of `shape`.

    `radius` None is all of them. A window of a share L of the smallest side has the radius floor(L side), and 1 at
    least: the zero frequency alone is the mean of an image, which normalisation takes out anyway.
    """

    def __init__(self, shape: Sequence[int], radius: int | None) -> None:
        super().__init__()
        self.shape = tuple(shape)
        places = []
        for axis, size in enumerate(self.shape):
            last = axis == len(self.shape) - 1
            reach = size // 2 if radius is None else min(radius, size // 2)
            lower = range(reach + 1)
            upper = range(0) if last else range(max(size - reach, reach + 1), size)
            places.append(torch.tensor([*lower, *upper]))
        self.kept = tuple(len(place) for place in places)
        for axis, place in enumerate(places):
            around = [1] * len(places)
            around[axis] = -1
            self.register_buffer(f"axis{axis}", place.reshape(around), persistent=False)

    @classmethod
    def window(cls, shape: Sequence[int], share: float) -> LowFrequencies:
        """Those of a window of a share of the smallest side."""
        return cls(shape, max(1, floor(share * min(shape))))

    def of(self, spectrum: Tensor) -> Tensor:
        """(..., *half) -> (..., *kept)."""
        return spectrum[self._places()]

    def put(self, spectrum: Tensor, values: Tensor) -> Tensor:
        """The spectrum with other values at these frequencies."""
        made = spectrum.clone()
        made[self._places()] = values
        return made

    def _places(self) -> Any:
        return (..., *(getattr(self, f"axis{axis}") for axis in range(len(self.shape))))


class Amplitude(nn.Module):
    """Images (B, C, *shape) -> F^-1(A exp(i angle F(x))), with one amplitude A for all images (HarmoFL, part one).

    Jiang et al., AAAI 2022, section 3.1. `mean` (C, *half) is the amplitude times 1 + |k|; until it is known
    (`UNKNOWN`) images stay as they are, bit for bit. It is a buffer of the network: averaged as all others are,
    released with the model, and so the same at every hospital that uses it. Amplitudes of images fall about as 1 / |k|,
    |k| being the length of a frequency in cycles an image: times 1 + |k| all are of one size, and the fixed point says
    fine detail as exactly as brightness.
    """

    mean: Tensor
    steep: Tensor

    def __init__(self, channels: int, shape: Sequence[int]) -> None:
        super().__init__()
        self.shape = tuple(shape)
        self.register_buffer("mean", torch.full((channels, *half_shape(shape)), UNKNOWN))
        self.register_buffer("steep", 1.0 + frequencies(shape), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Of images of the shape that the network was made for."""
        made = images_of(with_amplitude(spectrum_of(images), self.amplitude), self.shape)
        return torch.where(is_known(self.mean), made, images)

    @property
    def amplitude(self) -> Tensor:
        """A itself (C, *half)."""
        return self.mean.clamp_min(0.0) / self.steep

    @torch.no_grad()
    def take(self, amplitude: Tensor) -> None:
        """Let A (C, *half) be this one."""
        self.mean.copy_(amplitude.to(self.mean) * self.steep)

    @staticmethod
    @torch.no_grad()
    def running(batches: Iterable[Tensor], momentum: float) -> Tensor:
        """The running mean of the amplitudes of batches (B, C, *shape): A <- (1 - m) A + m A_batch.

        A_batch is the mean over a batch, and m of batch n, from 1, is 1 / n as long as that is more than `momentum`: it
        begins as the plain mean, of which no batch has a larger share than another.
        """
        found: Tensor | None = None
        for number, images in enumerate(batches, 1):
            own, share = spectrum_of(images).abs().mean(0), max(momentum, 1.0 / number)
            found = own if found is None else (1.0 - share) * found + share * own
        if found is None:
            raise ValueError("no batch")
        return found


def is_known(mean: Tensor) -> Tensor:
    """Whether an amplitude was measured: a truth value as a tensor. Rounding moves a value by far less than half."""
    return (mean > 0.5 * UNKNOWN).all()


class AmplitudeBank(nn.Module):
    """Low-frequency amplitudes of all training sites' images, means over several patients each (FedDG).

    `spectra` (S, C, *kept) + 8 over `filled` (S,) are those of a slot where `filled` is above 0. The slots of a site
    lie together, in the order of `sites`, `each` a site. What a site does not fill stays 0 in its change, so the mean
    of the sites' changes is each one's spectra over the number of sites, and `filled` the same of ones: their ratio is
    exact, whichever sites took part. The network does not use it: sites do, in training.
    """

    spectra: Tensor
    filled: Tensor

    def __init__(self, channels: int, shape: Sequence[int], share: float, sites: Sequence[str], each: int) -> None:
        super().__init__()
        self.sites, self.each, self.shape = tuple(sites), each, tuple(shape)
        self.low = LowFrequencies.window(shape, share)
        slots = each * len(self.sites)
        self.register_buffer("spectra", torch.full((slots, channels, *self.low.kept), UNKNOWN))
        self.register_buffer("filled", torch.zeros(slots))

    def slots_of(self, site: str) -> range:
        """Where a site's amplitudes lie."""
        first = self.sites.index(site) * self.each
        return range(first, first + self.each)

    def given_by_others(self, site: str) -> Tensor:
        """The amplitudes that other sites gave: (n, C, *kept)."""
        there = self.filled > 0.0
        if site in self.sites:
            there[self.slots_of(site)] = False
        spectra, filled = self.spectra[there], self.filled[there]
        return ((spectra - UNKNOWN) / filled.reshape(-1, *[1] * (spectra.ndim - 1))).clamp_min(0.0)

    def amplitudes(self, images: Tensor) -> Tensor:
        """The low-frequency amplitudes of images (B, C, *shape): (B, C, *kept)."""
        return self.low.of(spectrum_of(images).abs())

    def swapped(self, images: Tensor, others: Tensor, share: Tensor) -> Tensor:
        """Images whose low-frequency amplitudes are (1 - share) A + share A_other, and whose phases stay.

        others: (B, C, *kept), share: (B,) from 0 to 1. Liu et al., CVPR 2021, equation 2.
        """
        spectrum = spectrum_of(images)
        own = self.low.of(spectrum)
        part = share.reshape(-1, *[1] * (own.ndim - 1))
        mixed = (1.0 - part) * own.abs() + part * others
        return images_of(self.low.put(spectrum, with_amplitude(own, mixed)), self.shape)


def with_spectrum(
    network: nn.Module, asked: Spectrum | None, channels: int, shape: Sequence[int], sites: Sequence[str]
) -> nn.Module:
    """The network of images (B, channels, *shape) with what the method of a study of these sites asks for."""
    if asked is not None and asked.mean:
        attach(network, AMPLITUDE, Amplitude(channels, shape))
    if asked is not None and asked.bank:
        attach(network, AMPLITUDE_BANK, AmplitudeBank(channels, shape, asked.window, sites, asked.bank))
    return network


def attach(network: nn.Module, name: str, part: nn.Module) -> nn.Module:
    """The network with a part of its own under a name that no other has; the names of all others stay.

    Raises `StudyError` for a network that would call the part as one of its layers, or has one of that name.
    """
    if isinstance(network, nn.Sequential | nn.ModuleList | nn.ModuleDict) or hasattr(network, name):
        raise StudyError(f"model.kind: this network cannot have a part {name!r} in front of it; choose another model")
    network.add_module(name, part)
    if isinstance(part, Amplitude):
        network.register_forward_pre_hook(_normalised)
    return network


def _normalised(network: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    images, *others = given
    return (getattr(network, AMPLITUDE)(images), *others)
