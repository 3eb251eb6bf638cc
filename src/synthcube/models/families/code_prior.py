"""Autoregressive transformer over the codes of a trained vector-quantised autoencoder.

Van den Oord et al., "Neural Discrete Representation Learning" (NeurIPS 2017), with the decoder of
Radford et al. (GPT, 2018) for the prior, as in Esser et al., "Taming Transformers" (CVPR 2021).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
from monai.networks.nets import DecoderOnlyTransformer
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional
from typing_extensions import Self

from synthcube.models.family import Quantizes
from synthcube.models.first_stage import TwoStageConfig, TwoStageFamily
from synthcube.models.losses import at_least_float32
from synthcube.models.nets.conditioning import ConditionEmbedding, GuidanceFields, dropped, guided
from synthcube.schema import Batch, Condition, ConditionSpec, Depth, ImageSpec, Width

_SPREAD = 0.02


class CodePriorConfig(GuidanceFields, TwoStageConfig):
    """Transformer that predicts each code from those before it, in the order of rows."""

    summary: ClassVar[str] = "a transformer that writes the codes of a trained vqvae"
    needs: ClassVar[str] = "vqvae"
    protocol: ClassVar[type] = Quantizes
    not_averaged: ClassVar[str] = (
        "it learns the codes of a vqvae, which cannot be trained by several sites; use "
        "latent_diffusion or rectified_flow"
    )

    name: Literal["code_prior"] = Field(default="code_prior", description="Family of the model.")
    dim: Width = Field(default=128, description="Length of a token's vector.")
    num_layers: Depth = Field(default=6, description="Transformer blocks.")
    num_heads: Width = Field(default=4, description="Attention heads; they divide `dim`.")
    dropout: float = Field(
        default=0.0, ge=0, lt=1, description="Share of the embedded codes' entries that is dropped."
    )
    temperature: Annotated[float, Field(gt=0, le=1000)] = Field(
        default=1.0, description="Below 1 likely codes are drawn more often, above 1 less."
    )
    top_k: Width | None = Field(
        default=None, description="Draw among so many of the likeliest codes; null: all."
    )

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.dim % self.num_heads:
            raise ValueError(f"dim {self.dim} must be a multiple of num_heads {self.num_heads}")
        return self

    def build(self, image: ImageSpec) -> CodePrior:
        return CodePrior(self, image)

    @classmethod
    def tiny(cls) -> Self:
        # Cold, so that small changes of untrained logits change codes.
        first = cls.tiny_first_stage()
        return cls(dim=8, num_layers=1, num_heads=2, temperature=0.1, first_stage_config=first)


class CodeTransformer(DecoderOnlyTransformer):
    """MONAI's transformer with a start token, and with the conditions added to every token."""

    def __init__(self, conditions: Sequence[ConditionSpec], **settings: Any) -> None:
        super().__init__(**settings, use_flash_attention=True)
        self.start = torch.nn.Parameter(torch.randn(settings["attn_layers_dim"]) * _SPREAD)
        for table in (self.token_embeddings, self.position_embeddings.embedding):
            # As in GPT. With torch's spread of 1 the conditions are lost: with it, and with
            # conditions on the first token alone, unseen shapes cost 1.77, not 1.47 nats a code.
            torch.nn.init.normal_(table.weight, std=_SPREAD)
        dim = settings["attn_layers_dim"]
        self.conditions = ConditionEmbedding(conditions, dim) if conditions else None
        blocks: Any = self.blocks
        for block in blocks:
            # Not used here: a norm that no gradient reaches, and a mask of length^2 entries.
            block.norm_cross_attn = torch.nn.Identity()
            del block.attn.causal_mask
            block.attn.causal_mask = torch.empty(0)

    def forward(  # type: ignore[override]  # MONAI's takes a context instead
        self, codes: Tensor, values: Tensor
    ) -> Tensor:
        """Logits (B, n + 1, codes) of each code given those before it.

        `codes` are the first of images, (B, n) with n < length; `values` the conditions (B, K).
        """
        start = self.start.expand(codes.shape[0], 1, -1)
        tokens = torch.cat([start, self.token_embeddings(codes)], dim=1)
        if self.conditions is not None:
            tokens = tokens + self.conditions(values)[:, None]
        positions = torch.arange(tokens.shape[1], device=codes.device)
        x = self.embedding_dropout(tokens + self.position_embeddings.embedding(positions))
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.to_logits(x)
        return logits


class CodePrior(TwoStageFamily):
    """Cross-entropy of each code given those before it; its exponential is the perplexity."""

    config: CodePriorConfig

    def __init__(self, config: CodePriorConfig, image: ImageSpec) -> None:
        super().__init__(config, image)
        self.length = math.prod(self.first_stage.family.code_shape())
        self.network = CodeTransformer(
            image.conditions,
            num_tokens=self.first_stage.family.num_codes(),
            max_seq_len=self.length,
            attn_layers_dim=config.dim,
            attn_layers_depth=config.num_layers,
            attn_layers_heads=config.num_heads,
            embedding_dropout_rate=config.dropout,
        )

    def compress(self, image: Tensor) -> Tensor:
        codes: Tensor = self.first_stage.family.encode_codes(image)
        return codes.flatten(1).int()  # half the memory of int64

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        codes = self.compressed(batch).long()
        condition = dropped(batch["condition"], self.config.condition_dropout)
        logits = self.network(codes[:, :-1], condition["values"])
        error = functional.cross_entropy(at_least_float32(logits).flatten(0, 1), codes.flatten())
        return {"loss": error, "perplexity": error.detach().exp()}

    def sample(self, generators: Sequence[torch.Generator], condition: Condition) -> Tensor:
        # One number for each code of an image, drawn before anything is computed.
        uniform = torch.stack([
            torch.rand(self.length, generator=generator, dtype=torch.float64)
            for generator in generators
        ]).to(self.device)  # fmt: skip
        predict = guided(
            lambda codes, _, condition: self.network(codes, condition["values"])[:, -1].float(),
            condition,
            self.config.guidance,
        )
        codes = torch.zeros(len(uniform), 0, dtype=torch.int64, device=self.device)
        # In bfloat16 the size of the batch would move a logit enough to change a code.
        with torch.autocast(self.device.type, enabled=False):
            for column in uniform.unbind(dim=1):
                logits = predict(codes, column)
                code = draw_codes(logits, column, self.config.temperature, self.config.top_k)
                codes = torch.cat([codes, code[:, None]], dim=1)
        shape = self.first_stage.family.code_shape()
        image: Tensor = self.first_stage.family.decode_codes(codes.view(-1, *shape))
        return image.float().clamp(-1, 1)


def draw_codes(logits: Tensor, uniform: Tensor, temperature: float, top_k: int | None) -> Tensor:
    """Codes (B,) by inverting the cumulative distribution of logits (B, K) at `uniform` (B,).

    `uniform` is float64 in [0, 1); `top_k` is how many of the likeliest codes are possible.
    """
    logits = logits.double() / temperature
    if top_k is not None and top_k < logits.shape[1]:
        least = logits.topk(top_k, dim=1).values[:, -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    # A GPU has no deterministic cumsum: with compute.deterministic it would end the training.
    place = torch.device("cpu") if torch.are_deterministic_algorithms_enabled() else logits.device
    cumulative = logits.softmax(dim=1).to(place).cumsum(dim=1)
    # Rounding may leave the last sum below 1: scaled by it, every draw meets a possible code.
    level = uniform[:, None].to(place) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, level, right=True)[:, 0].to(logits.device)
