"""MONAI's networks for segmentation, by name and size: images in, a logit for every voxel and structure out."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from wardround.errors import StudyError
from wardround.study.models import Layer, Preset, PresetSettings
from wardround.study.tasks import Modality


class NetworkSettings(PresetSettings):
    """The base of networks for images; they know no scanner."""

    modalities: ClassVar[frozenset[Modality] | None] = frozenset()
    norm: Literal["batch", "instance", "group"] = "batch"

    def build_network(self, dimensions: int, channels: int, outputs: int) -> Any:
        """The network, freshly initialised: (B, channels, *shape) -> (B, outputs, *shape)."""
        raise NotImplementedError

    def normalisation(self) -> Any:
        """What MONAI calls it."""
        if self.norm == "group":
            return ("group", {"num_groups": 4})
        return ("instance", {"affine": True}) if self.norm == "instance" else "batch"


_UNET: dict[Preset, tuple[tuple[int, ...], int]] = {
    "tiny": ((8, 16, 32), 1),
    "small": ((16, 32, 64, 128), 2),
    "paper": ((32, 64, 128, 256, 512), 2),
}


class MonaiUNetSettings(NetworkSettings):
    """MONAI's residual U-Net (Kerfoot et al., STACOM 2018)."""

    kind: Literal["monai_unet"]
    head_parts: ClassVar[tuple[str, ...]] = ("model.2.*",)

    def build_network(self, dimensions: int, channels: int, outputs: int) -> Any:
        """The network; each level halves the image."""
        from monai.networks.nets import UNet

        features, units = _UNET[self.preset]
        return UNet(
            dimensions, channels, outputs, features, (2,) * (len(features) - 1), num_res_units=units,
            norm=self.normalisation(),
        )  # fmt: skip

    @property
    def represents(self) -> Layer:
        """The deepest level."""
        return Layer("model" + ".1.submodule" * (len(_UNET[self.preset][0]) - 1))


_SEGRESNET: dict[Preset, tuple[int, tuple[int, ...], tuple[int, ...]]] = {
    "tiny": (8, (1, 1, 1), (1, 1)),
    "small": (16, (1, 2, 2, 2), (1, 1, 1)),
    "paper": (32, (1, 2, 2, 4), (1, 1, 1)),
}


class SegResNetSettings(NetworkSettings):
    """SegResNet (Myronenko, BrainLes 2018) without its autoencoder."""

    kind: Literal["segresnet"]
    head_parts: ClassVar[tuple[str, ...]] = ("conv_final.*",)
    norm: Literal["batch", "instance", "group"] = "group"

    def build_network(self, dimensions: int, channels: int, outputs: int) -> Any:
        """The network."""
        from monai.networks.nets import SegResNet

        first, down, up = _SEGRESNET[self.preset]
        return SegResNet(
            dimensions, first, channels, outputs, norm=self.normalisation(), blocks_down=down, blocks_up=up
        )

    @property
    def represents(self) -> Layer:
        """The deepest level."""
        return Layer(f"down_layers.{len(_SEGRESNET[self.preset][1]) - 1}")


_DYNUNET: dict[Preset, tuple[int, ...]] = {
    "tiny": (8, 16, 32),
    "small": (16, 32, 64, 128),
    "paper": (32, 64, 128, 256, 320, 320),
}


class DynUNetSettings(NetworkSettings):
    """A U-Net of nnU-Net's design (Isensee et al., Nature Methods 18, 2021), without deep supervision."""

    kind: Literal["dynunet"]
    head_parts: ClassVar[tuple[str, ...]] = ("output_block.*",)
    norm: Literal["batch", "instance", "group"] = "instance"

    def build_network(self, dimensions: int, channels: int, outputs: int) -> Any:
        """The network: 3 x 3 kernels, strides of 2."""
        from monai.networks.nets import DynUNet

        features = _DYNUNET[self.preset]
        strides = [1] + [2] * (len(features) - 1)
        return DynUNet(
            dimensions, channels, outputs, [3] * len(features), strides, strides[1:], filters=features,
            norm_name=self.normalisation(),
        )  # fmt: skip

    @property
    def represents(self) -> Layer:
        """The deepest level."""
        return Layer("bottleneck")


_SWIN: dict[Preset, int] = {"tiny": 12, "small": 24, "paper": 48}


class SwinUNETRSettings(NetworkSettings):
    """Swin UNETR (Hatamizadeh et al., BrainLes 2021); sides of a patch are multiples of 32."""

    kind: Literal["swin_unetr"]
    head_parts: ClassVar[tuple[str, ...]] = ("out.*",)
    norm: Literal["batch", "instance", "group"] = "instance"

    def build_network(self, dimensions: int, channels: int, outputs: int) -> Any:
        """The network."""
        from monai.networks.nets import SwinUNETR

        try:
            return SwinUNETR(
                in_channels=channels, out_channels=outputs, feature_size=_SWIN[self.preset], spatial_dims=dimensions,
                norm_name=self.normalisation(),
            )  # fmt: skip
        except (ImportError, ModuleNotFoundError) as error:
            raise StudyError(
                "model.kind: swin_unetr needs the package einops: pip install 'wardround[swin]'"
            ) from error

    @property
    def represents(self) -> Layer:
        """The deepest level."""
        return Layer("encoder10")
