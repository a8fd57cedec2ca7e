"""Amplitudes of images: against the equations, by hand and by plain loops, in two dimensions and three."""

from __future__ import annotations

import itertools
from copy import deepcopy

import numpy as np
import pytest
import torch
from torch import nn

from wardround.errors import StudyError
from wardround.models.spectrum import (
    Amplitude,
    AmplitudeBank,
    LowFrequencies,
    frequencies,
    images_of,
    spectrum_of,
    with_spectrum,
)
from wardround.study.methods import UNKNOWN_AMPLITUDE, Spectrum

SHAPES = [(8, 9), (8, 8), (5, 6, 7)]


def images(shape: tuple[int, ...], seed: int = 0, count: int = 3) -> torch.Tensor:
    return torch.randn(count, 2, *shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", SHAPES)
def test_an_image_with_the_mean_amplitude_keeps_its_phase(shape: tuple[int, ...]) -> None:
    """x^ = F^-1(A exp(i angle F(x))), by numpy's whole spectrum."""
    part, batch = Amplitude(2, shape), images(shape)
    other = images(shape, seed=1)
    part.take(Amplitude.running([other], 0.1))
    axes = tuple(range(1, len(shape) + 1))
    whole = np.abs(np.fft.fftn(other.double().numpy(), axes=[a + 1 for a in axes])).mean(0)
    expected = [
        np.fft.ifftn(whole * np.exp(1j * np.angle(np.fft.fftn(x, axes=axes))), axes=axes)
        for x in batch.double().numpy()
    ]
    assert np.allclose(np.imag(expected), 0.0, atol=1e-9)
    assert np.allclose(part(batch).numpy(), np.real(expected), atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_until_the_amplitude_is_known_images_stay_bit_for_bit(shape: tuple[int, ...]) -> None:
    batch = images(shape)
    assert torch.equal(Amplitude(2, shape)(batch), batch)


def test_the_amplitude_of_an_image_gives_the_image_back() -> None:
    batch = images((8, 8), count=1)
    part = Amplitude(2, (8, 8))
    part.take(spectrum_of(batch).abs()[0])
    assert torch.allclose(part(batch), batch, atol=1e-5)
    assert torch.allclose(images_of(spectrum_of(batch), (8, 8)), batch, atol=1e-6)


def test_the_running_mean_by_hand() -> None:
    """Constant images: amplitudes at frequency 0 alone. Of 1 and 3 the mean is 2; then 0.6 * 2 + 0.4 * 5 = 3.2."""
    found = Amplitude.running([torch.full((2, 1, 4, 4), value) for value in (1.0, 3.0, 5.0)], 0.4)
    assert found[0, 0, 0] == pytest.approx(3.2)
    assert float(found.sum()) == pytest.approx(3.2, abs=1e-6)
    # A batch counts by the mean of its amplitudes, not by the amplitude of its mean.
    opposite = torch.cat([torch.ones(1, 1, 4, 4), -torch.ones(1, 1, 4, 4)])
    assert float(Amplitude.running([opposite], 0.1)[0, 0, 0]) == pytest.approx(1.0)


def test_fine_detail_is_held_as_exactly_as_brightness() -> None:
    """The buffer is the amplitude times 1 + |k|: in the fixed point of round 1, a step is 32 / 2 ** 25 about."""
    part = Amplitude(1, (64, 64))
    smooth = torch.linspace(0, 1, 64)[None, None, None].expand(1, 1, 64, 64)
    part.take(spectrum_of(smooth).abs()[0])
    assert torch.allclose(part.amplitude, spectrum_of(smooth).abs()[0], rtol=1e-6, atol=1e-9)
    assert float(part.mean.max()) < -UNKNOWN_AMPLITUDE
    assert frequencies((8, 8))[3, 4] == pytest.approx(5.0)
    assert frequencies((8, 8))[5, 4] == pytest.approx(5.0)


@pytest.mark.parametrize("shape", [(8, 9), (8, 8), (5, 6, 7), (3, 4)])
@pytest.mark.parametrize("radius", [None, 1, 2, 9])
def test_the_low_frequencies_are_those_within_the_radius(shape: tuple[int, ...], radius: int | None) -> None:
    low = LowFrequencies(shape, radius)
    marked = low.put(torch.zeros(1, 1, *shape[:-1], shape[-1] // 2 + 1), torch.ones(1, 1, *low.kept))[0, 0]
    for place in itertools.product(*map(range, marked.shape)):
        turned = [min(k, n - k) for k, n in zip(place[:-1], shape[:-1], strict=True)] + [place[-1]]
        assert bool(marked[place]) == (radius is None or max(turned) <= radius)
    assert int(marked.sum()) == int(np.prod(low.kept))


# The bank -------------------------------------------------------------------------------------------------------------


def test_a_window_smaller_than_a_frequency_still_swaps_more_than_brightness() -> None:
    """The released code swapped the zero frequency alone."""
    bank = AmplitudeBank(2, (16, 16), 0.003, ["A", "B"], 1)
    assert bank.low.kept == (3, 2)
    batch, other = images((16, 16)), images((16, 16), seed=5)
    made = bank.swapped(batch, bank.amplitudes(other), torch.ones(3))
    changed = (spectrum_of(made) - spectrum_of(batch)).abs() > 1e-5
    assert changed[:, :, 0, 0].all()
    assert changed[:, :, 0, 1].all()
    assert changed[:, :, 1, :2].all()
    assert int(changed[0, 0].sum()) == 6


@pytest.mark.parametrize("shape", SHAPES)
def test_swapped_amplitudes_are_the_mixture_and_phases_stay(shape: tuple[int, ...]) -> None:
    """A' = (1 - lambda) A + lambda A_n, in a window; equation 2."""
    bank, batch, other = AmplitudeBank(2, shape, 0.4, ["A"], 1), images(shape), images(shape, seed=5)
    share = torch.tensor([0.0, 0.25, 1.0])
    before, after = spectrum_of(batch), spectrum_of(bank.swapped(batch, bank.amplitudes(other), share))
    low = bank.low
    for n, part in enumerate(share):
        mixed = (1 - part) * low.of(before[n]).abs() + part * low.of(spectrum_of(other)[n]).abs()
        assert torch.allclose(low.of(after[n]).abs(), mixed, atol=1e-6)
    turn = low.of(after) * low.of(before).conj()
    assert torch.allclose(turn.imag, torch.zeros_like(turn.imag), atol=1e-6)
    assert (turn.real > -1e-6).all()
    outside = low.put(before, torch.zeros(3, 2, *low.kept, dtype=torch.complex64))
    assert torch.allclose(low.put(after, torch.zeros_like(low.of(after))), outside, atol=1e-6)
    assert torch.allclose(bank.swapped(batch, bank.amplitudes(other), torch.zeros(3)), batch, atol=1e-5)


def test_what_others_gave_is_exact_whoever_took_part() -> None:
    """Two of three sites: the mean of their changes is each one's over two, in spectra and in marks alike."""
    bank = AmplitudeBank(1, (8, 8), 0.1, ["A", "B", "C"], 2)
    given = {site: bank.amplitudes(images((8, 8), seed=n)[:1, :1])[0] for n, site in enumerate("AC")}
    for site, spectra in given.items():
        first = bank.slots_of(site)[0]
        bank.spectra[first] += spectra / 2
        bank.filled[first] += 0.5
    assert torch.allclose(bank.given_by_others("A"), given["C"][None], atol=1e-6)
    assert torch.allclose(bank.given_by_others("B"), torch.stack([given["A"], given["C"]]), atol=1e-6)
    assert len(bank.given_by_others("unseen")) == 2


# In a network ---------------------------------------------------------------------------------------------------------


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(1, 1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


def test_a_network_sees_every_image_with_the_amplitude_and_keeps_its_names() -> None:
    network = with_spectrum(Network(), Spectrum(mean=True), 1, (8, 8), ["A"])
    assert set(network.state_dict()) == {"layer.weight", "layer.bias", "amplitude.mean"}
    batch = images((8, 8))[:, :1]
    plain = network.layer(batch)
    assert torch.equal(network(batch), plain)
    network.amplitude.take(Amplitude.running([images((8, 8), seed=2)[:, :1]], 0.1))
    assert torch.equal(network(batch), network.layer(network.amplitude(batch)))
    copied = deepcopy(network)
    copied.amplitude.mean.fill_(UNKNOWN_AMPLITUDE)
    assert torch.equal(copied(batch), plain)
    assert not torch.equal(network(batch), plain)


def test_a_network_without_a_method_that_asks_is_as_it_was() -> None:
    network = Network()
    assert with_spectrum(network, None, 1, (8, 8), ["A"]) is network
    assert set(network.state_dict()) == {"layer.weight", "layer.bias"}


def test_a_network_that_would_call_it_as_a_layer_is_refused() -> None:
    with pytest.raises(StudyError, match="cannot have a part 'amplitude'"):
        with_spectrum(nn.Sequential(Network()), Spectrum(mean=True), 1, (8, 8), ["A"])
