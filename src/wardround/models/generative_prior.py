"""A generative prior of images: it learns what images look like and no scanner, which is known when it reconstructs.

After FedGIMP (Elmas et al., IEEE TMI 2023, arXiv 2202.04175): a mapper and a synthesiser G that know of which site an
image is, against a discriminator D (Karras et al., CVPR 2019). Compact: real images of one size, no growing, few
features.

Training lowers, with z ~ N(0, 1), s the one-hot code of the site and images x of it,

    softplus(-D(G(z, s)))  over G,   and   softplus(D(G(z, s))) + softplus(-D(x)) + gamma / 2 |grad_x D(x)|^2  over D

(non-saturating logistic loss with the penalty R1; Goodfellow et al., 2014; Mescheder et al., ICML 2018). Both steps are
taken at once, from the same values.

Reconstruction, for each scan by itself: of data y and operator A, with Adam over intermediate latent w, noise n and the
weights of the synthesiser,

    sqrt(mean |A G(w, n) - y|^2) + tv TV(G(w, n)).

It starts at the mean of w over the site's images; at a site that did not train, at the mean of the sites' means.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.functional import interpolate, leaky_relu, one_hot, softplus

from wardround.errors import StudyError
from wardround.imaging.acquisition.operator import LinearOperator
from wardround.imaging.acquisition.wrapped import RealImage
from wardround.models.blocks import convolution
from wardround.study.models import PresetSettings
from wardround.study.tasks import Modality

#: The parts that stay at a site with the method `fedgimp`.
DISCRIMINATOR, CODE = "discriminator.", "code"
_SMALLEST, _LEAST = 4, 1e-8
# Latents that the mean of a site is taken over, and where the numbers of a reconstruction begin: the same everywhere.
_DRAWN, _SEED = 256, 20230701


@dataclass(frozen=True)
class PriorShape:
    """Everything that decides a prior's parameters and cost; see `PRESETS`."""

    latent: int
    features: int
    iterations: int
    rate: float = 0.01
    tv: float = 1e-4
    penalty: float = 10.0


PRESETS = {
    "tiny": PriorShape(16, 8, 150),
    "small": PriorShape(64, 32, 400),
    "paper": PriorShape(512, 128, 1200),
}


class Mapper(nn.Module):
    """Latent and site code (B, L + S) -> the intermediate latent w (B, L)."""

    def __init__(self, latent: int, codes: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(latent + codes, latent), nn.LeakyReLU(0.2), nn.Linear(latent, latent), nn.LeakyReLU(0.2)
        )

    def forward(self, z: Tensor, code: Tensor) -> Tensor:
        """z is scaled to mean square 1 first."""
        z = z / (z.square().mean(1, keepdim=True) + _LEAST).sqrt()
        found: Tensor = self.layers(torch.cat([z, code], 1))
        return found


class Level(nn.Module):
    """A convolution, noise, and features whose scale and shift the latent says (adaptive instance normalisation)."""

    def __init__(self, inputs: int, features: int, latent: int) -> None:
        super().__init__()
        self.convolution = convolution(inputs, features)
        self.strength = nn.Parameter(torch.zeros(features, 1, 1))
        self.style = nn.Linear(latent, 2 * features)

    def forward(self, h: Tensor, w: Tensor, noise: Tensor) -> Tensor:
        """h: (B, C, H, W), w: (B, L), noise: (B, 1, H, W)."""
        h = leaky_relu(self.convolution(h) + self.strength * noise, 0.2)
        centred = h - h.mean((2, 3), keepdim=True)
        scaled = centred / (centred.square().mean((2, 3), keepdim=True) + _LEAST).sqrt()
        scale, shift = self.style(w)[:, :, None, None].chunk(2, 1)
        found: Tensor = scaled * (1.0 + scale) + shift
        return found


class Synthesiser(nn.Module):
    """w (B, L) and noise of each level -> images (B, H, W)."""

    def __init__(self, size: int, latent: int, features: int) -> None:
        super().__init__()
        self.sizes = tuple(_SMALLEST * 2**level for level in range((size // _SMALLEST).bit_length()))
        self.constant = nn.Parameter(torch.randn(1, features, _SMALLEST, _SMALLEST))
        self.levels = nn.ModuleList(Level(features, features, latent) for _ in self.sizes)
        self.image = nn.Conv2d(features, 1, 1)

    def forward(self, w: Tensor, noise: tuple[Tensor, ...]) -> Tensor:
        """See the class."""
        h = self.constant.expand(len(w), -1, -1, -1)
        for level, size, drawn in zip(self.levels, self.sizes, noise, strict=True):
            h = level(h if size == _SMALLEST else interpolate(h, scale_factor=2.0, mode="nearest"), w, drawn)
        found: Tensor = self.image(h)
        return found.squeeze(1)

    def noise(self, count: int, like: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, ...]:
        """Noise of every level; of a `generator` on the CPU where one is given, else of torch's own numbers."""
        if generator is None:
            return tuple(torch.randn(count, 1, n, n, device=like.device) for n in self.sizes)
        return tuple(
            torch.randn(1, 1, n, n, generator=generator).to(like.device).repeat(count, 1, 1, 1) for n in self.sizes
        )


class Discriminator(nn.Module):
    """Images (B, H, W) -> (B,), larger for those that look real."""

    def __init__(self, size: int, features: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [convolution(1, features), nn.LeakyReLU(0.2)]
        for _ in range((size // _SMALLEST).bit_length() - 1):
            layers += [convolution(features, features, stride=2), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers, nn.Flatten(), nn.Linear(features * _SMALLEST**2, 1))

    def forward(self, images: Tensor) -> Tensor:
        """See the class."""
        found: Tensor = self.layers(images.unsqueeze(1))
        return found.squeeze(1)


class GenerativePrior(nn.Module):
    """G and D of images of `size` x `size` pixels; `code` (S,) says which sites' images it is to make, as shares.

    Evenly at first: what a site that did not train has.
    """

    code: Tensor

    def __init__(self, shape: PriorShape, size: int, codes: int) -> None:
        super().__init__()
        self.shape, self.size = shape, size
        self.mapper = Mapper(shape.latent, codes)
        self.synthesiser = Synthesiser(size, shape.latent, shape.features)
        self.discriminator = Discriminator(size, shape.features)
        self.register_buffer(CODE, torch.full((codes,), 1.0 / codes))

    def made(self, count: int) -> Tensor:
        """Images (count, H, W) of latents, noise and sites drawn from torch's random numbers."""
        device = self.code.device
        z = torch.randn(count, self.shape.latent, device=device)
        # The largest of log share + Gumbel noise is a draw by the shares.
        gumbel = -(-torch.rand(count, len(self.code), device=device).clamp(_LEAST, 1.0 - 1e-6).log()).log()
        drawn = one_hot((self.code.clamp_min(0.0).log() + gumbel).argmax(1), len(self.code)).to(z)
        found: Tensor = self.synthesiser(self.mapper(z, drawn), self.synthesiser.noise(count, z))
        return found

    def learned(self, images: Tensor) -> Tensor:
        """The sum of what G lowers, with D as it is, and what D lowers, with G's images as they are; scalar.

        Without gradients there is no penalty in it. Raises `StudyError` for images of another size.
        """
        self._check(tuple(images.shape[-2:]))
        made = self.made(len(images))
        still = {name: p.detach() for name, p in self.discriminator.named_parameters()}
        generator = softplus(-functional_call(self.discriminator, still, (made,))).mean()
        return generator + self.told_apart(made.detach(), images)

    def told_apart(self, made: Tensor, images: Tensor) -> Tensor:
        """softplus(D(made)) + softplus(-D(images)) + gamma / 2 |grad D(images)|^2, each the mean over a batch."""
        loss = softplus(self.discriminator(made)).mean()
        penalised = torch.is_grad_enabled() and self.shape.penalty > 0.0
        true = images.detach().requires_grad_(penalised)
        said = self.discriminator(true)
        loss = loss + softplus(-said).mean()
        if penalised:
            (gradient,) = torch.autograd.grad(said.sum(), true, create_graph=True)
            loss = loss + 0.5 * self.shape.penalty * gradient.square().sum((1, 2)).mean()
        return loss

    def mean_latent(self) -> Tensor:
        """The mean of w over the images of each site, and over sites by their shares: (L,)."""
        codes = len(self.code)
        generator = torch.Generator().manual_seed(_SEED)
        z = torch.randn(_DRAWN, self.shape.latent, generator=generator).to(self.code.device)
        each = [self.mapper(z, row.expand(_DRAWN, -1)).mean(0) for row in torch.eye(codes, device=z.device)]
        share = self.code.clamp_min(0.0) / self.code.clamp_min(0.0).sum().clamp_min(_LEAST)
        return (share[:, None] * torch.stack(each)).sum(0)

    def forward(self, operator: LinearOperator, data: Tensor) -> Tensor:
        """Measured data (B, *data_shape) -> images (B, H, W), each fitted by itself from the same start.

        Raises `StudyError` for images of another size, and in a training loss: gradients do not reach through it.
        """
        if self.training and torch.is_grad_enabled():
            raise StudyError(
                "model.kind: a generative prior learns from true images, and not from measured samples; choose another "
                "network for sites without true images (supervision)"
            )
        self._check(tuple(operator.image_shape[-2:]))
        if data.is_complex():
            operator = RealImage(operator)
        with torch.enable_grad():
            return self._fitted(operator, data.detach())

    def _fitted(self, operator: LinearOperator, data: Tensor) -> Tensor:
        count = len(data)
        learned = {n: p.detach() for n, p in self.synthesiser.named_parameters()}
        weights = {n: p.expand(count, *p.shape).clone().requires_grad_(True) for n, p in learned.items()}
        w = self.mean_latent().detach().expand(count, -1).clone().requires_grad_(True)
        noise = self.synthesiser.noise(count, w, torch.Generator().manual_seed(_SEED))
        for drawn in noise:
            drawn.requires_grad_(True)
        optimizer = torch.optim.Adam([w, *noise, *weights.values()], lr=self.shape.rate)
        for _ in range(self.shape.iterations):
            optimizer.zero_grad(set_to_none=True)
            # A sum of terms of single scans, so that no scan's step depends on another's.
            misfit(operator, data, self._images(weights, w, noise), self.shape.tv).sum().backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        return self._images(weights, w, noise).detach()

    def _images(self, weights: Mapping[str, Tensor], w: Tensor, noise: tuple[Tensor, ...]) -> Tensor:
        """Each scan's image by its own weights: (B, H, W)."""

        def one(own: dict[str, Tensor], w: Tensor, noise: tuple[Tensor, ...]) -> Tensor:
            given = (w[None], tuple(drawn[None] for drawn in noise))
            found: Tensor = functional_call(self.synthesiser, own, given)
            return found[0]

        found: Tensor = vmap(one)(dict(weights), w, noise)
        return found

    def _check(self, shape: tuple[int, ...]) -> None:
        if shape != (self.size, self.size):
            raise StudyError(
                f"model.size: the generative prior makes images of {self.size} x {self.size} pixels, and these have "
                f"{' x '.join(map(str, shape))}; set model.size and task.size to the same"
            )


def misfit(operator: LinearOperator, data: Tensor, images: Tensor, tv: float) -> Tensor:
    """sqrt(mean |A x - y|^2) + tv TV(x) of each scan: (B,). TV is the sum of the absolute differences of neighbours."""
    residual = operator.A(images) - data
    squares = (torch.view_as_real(residual) if residual.is_complex() else residual[..., None]).square().sum(-1)
    root = (squares.flatten(1).mean(1) + _LEAST**2).sqrt()
    down, right = images[:, 1:] - images[:, :-1], images[:, :, 1:] - images[:, :, :-1]
    return root + tv * (down.abs().sum((1, 2)) + right.abs().sum((1, 2)))


class GenerativePriorSettings(PresetSettings):
    """A generative prior that learns images and no scanner (after FedGIMP, Elmas et al., 2023); MRI.

    A reconstruction is an optimisation of `iterations` steps for each slice: no mask, number of coils or acceleration
    was trained for. For the method `fedgimp`.
    """

    modalities: ClassVar[frozenset[Modality] | None] = frozenset({"mri"})

    kind: Literal["generative_prior"]
    size: Literal[16, 32, 64, 128] = Field(64, description="pixels of an image's side: as `task.size`")
    codes: int = Field(1, ge=1, le=256, description="the study's training sites, each of which has a code: how many")
    latent: int | None = Field(None, ge=1, le=1024)
    features: int | None = Field(None, ge=1, le=512)
    iterations: int | None = Field(None, ge=1, le=100_000, description="steps of a reconstruction; 1200 in the paper")
    rate: float | None = Field(None, gt=0.0, description="rate of Adam in a reconstruction")
    tv: float | None = Field(None, ge=0.0, description="weight of the total variation in a reconstruction")
    penalty: float | None = Field(None, ge=0.0, description="gamma of R1; 10 in the paper")

    def build(self, modality: Modality) -> GenerativePrior:
        """The network."""
        chosen = self.model_dump(exclude={"kind", "preset", "size", "codes"}, exclude_none=True)
        return GenerativePrior(replace(PRESETS[self.preset], **chosen), self.size, self.codes)

    @property
    def real_images(self) -> bool:
        """Always: it learns magnitudes, and the coil maps carry the phase."""
        return True

    def describe(self) -> str:
        """Kind, size and sites."""
        return f"{super().describe()}, {self.size} x {self.size} pixels, {self.codes} sites"
