"""SCAN-PhysFed's anatomy prompt: the embedding of a patient's report becomes a map that weighs feature maps."""

from __future__ import annotations

from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.functional import avg_pool1d, interpolate, scaled_dot_product_attention

from wardround.errors import StudyError
from wardround.imaging.acquisition.operator import LinearOperator
from wardround.study.base import Config


class AnatomySettings(Config):
    """A patient's anatomy as a prompt: each site provides the embeddings of its reports (SCAN-PhysFed, 2025).

    Where they lie, the sites file says (`sites.NAME.embeddings`). Defaults are the authors' sizes: 40 million values.
    """

    dimension: int = Field(32_000, ge=1, le=1_000_000, description="values of an embedding")
    pool: int = Field(4, ge=1, description="the number of neighbouring values that are averaged first")
    width: int = Field(2048, ge=1, le=16_384)
    heads: int = Field(4, ge=1, description="of the attention; they divide the width")
    map: int = Field(59, ge=1, le=1024, description="rows and columns of the map")
    weight: float = Field(0.1, ge=0.0, le=1.0, description="w in out = (1 - w) c + w c A")

    @model_validator(mode="after")
    def _sizes_fit(self) -> AnatomySettings:
        if self.width % self.heads:
            raise ValueError(f"heads={self.heads} do not divide width={self.width}; choose others")
        if self.pool > self.dimension:
            raise ValueError(f"pool={self.pool} is more than dimension={self.dimension}; lower it")
        return self


class AnatomyNet(nn.Module):
    """out = (1 - w) c + w c A, with a map A made of an embedding (Yang et al., CVPR 2025, the anatomy hypernetwork).

    Average pooling, a linear layer, multi-head attention over the tokens, and a linear layer to a square map that is
    interpolated (bilinear) to the size of c; of several tokens the mean map. Two departures from the authors' code:
    A is 1 plus what the last layer gives, and that layer starts at zero, so an untrained branch changes nothing; a
    patient without an embedding has A = 1. With a single token, the attention's queries and keys have no effect:
    softmax over one is 1.
    """

    def __init__(self, config: AnatomySettings) -> None:
        super().__init__()
        self.config = config
        self.projection = nn.Linear(config.dimension // config.pool, config.width)
        self.queries, self.keys, self.values, self.merged = (nn.Linear(config.width, config.width) for _ in range(4))
        self.map = nn.Linear(config.width, config.map**2)
        nn.init.zeros_(self.map.weight)
        nn.init.zeros_(self.map.bias)

    def forward(self, prompt: Tensor, size: tuple[int, int]) -> Tensor:
        """Embeddings (B, tokens, dimension) -> maps A (B, 1, *size)."""
        tokens = self.projection(avg_pool1d(prompt, self.config.pool))
        heads = (
            layer(tokens).unflatten(-1, (self.config.heads, -1)).transpose(1, 2)
            for layer in (self.queries, self.keys, self.values)
        )
        attended = scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
        maps = self.map(self.merged(attended)).mean(1).unflatten(-1, (1, self.config.map, self.config.map))
        resized: Tensor = interpolate(maps, size, mode="bilinear", align_corners=False)
        return 1 + resized

    def weighed(self, c: Tensor, operator: LinearOperator) -> Tensor:
        """Feature maps c (B, C, H, W) weighed by the map of the operator's prompt; as they are where it has none.

        Raises StudyError where the prompt has another dimension.
        """
        prompt, w = operator.prompt, self.config.weight
        if prompt is None:
            return c
        if prompt.shape[-1] != self.config.dimension:
            raise StudyError(
                f"the embedding has {prompt.shape[-1]} values and the model takes {self.config.dimension}; set "
                "model.anatomy.dimension"
            )
        height, width = c.shape[-2:]
        a: Tensor = self(prompt.to(c), (height, width))
        return (1 - w) * c + w * c * a
