"""Optimizers that neither PyTorch nor MONAI has, as their papers give them."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from torch.optim import Optimizer


class _Grouped(Optimizer, ABC):
    """Steps all weights of a group together; one step count for each group."""

    NUM_BETAS: ClassVar[int]

    def __init__(self, params: Iterable[Any], **settings: Any) -> None:
        for name in ("lr", "eps", "weight_decay", "alpha"):
            if settings.get(name, 0) < 0:
                raise ValueError(f"{name} {settings[name]}: must not be negative")
        wanted = type(self).NUM_BETAS
        betas = tuple(settings["betas"])
        if len(betas) != wanted or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas {list(betas)}: {wanted} numbers from 0 to below 1 are needed")
        super().__init__(params, {**settings, "betas": betas, "step": 0})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Move every weight that has a gradient; returns the loss of `closure`, if given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            weights = [weight for weight in group["params"] if weight.grad is not None]
            if weights:
                group["step"] += 1
                self._move(group, weights, [weight.grad for weight in weights])
        return loss

    @abstractmethod
    def _move(
        self, group: dict[str, Any], weights: list[torch.Tensor], gradients: list[torch.Tensor]
    ) -> None:
        """One step for the weights of a group."""

    def _kept(self, weights: list[torch.Tensor], name: str) -> list[torch.Tensor]:
        """A tensor of the size of each weight, zero at first, kept from step to step."""
        for weight in weights:
            if name not in self.state[weight]:
                self.state[weight][name] = torch.zeros_like(weight)
        return [self.state[weight][name] for weight in weights]


class Lion(_Grouped):
    """Chen et al., "Symbolic Discovery of Optimization Algorithms" (NeurIPS 2023), algorithm 2.

    Every weight moves by `lr`, so `lr` is a third to a tenth of AdamW's. Decay is decoupled.
    """

    NUM_BETAS = 2

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, lr=lr, betas=betas, weight_decay=weight_decay)

    def _move(
        self, group: dict[str, Any], weights: list[torch.Tensor], gradients: list[torch.Tensor]
    ) -> None:
        beta_1, beta_2 = group["betas"]
        mean = self._kept(weights, "mean")
        direction = torch._foreach_lerp(mean, gradients, 1 - beta_1)
        torch._foreach_sign_(direction)
        torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(weights, direction, alpha=-group["lr"])
        torch._foreach_lerp_(mean, gradients, 1 - beta_2)


class AdEMAMix(_Grouped):
    """Pagliardini et al., "The AdEMAMix Optimizer: Better, Faster, Older" (ICLR 2025).

    AdamW with a second, slow mean of the gradients that counts `alpha` times; `betas` are those
    of the fast mean, the squares and the slow mean. `num_warmup_steps` brings in the slow mean
    gradually (T_alpha = T_beta3 of the paper, which takes the whole training); 0: at once.
    """

    NUM_BETAS = 3

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        alpha: float = 5.0,
        num_warmup_steps: int = 0,
    ) -> None:
        super().__init__(
            params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, alpha=alpha,
            num_warmup_steps=num_warmup_steps,
        )  # fmt: skip

    def _move(
        self, group: dict[str, Any], weights: list[torch.Tensor], gradients: list[torch.Tensor]
    ) -> None:
        beta_1, beta_2, _ = group["betas"]
        alpha, beta_3 = self._slow(group)
        fast, slow, square = (self._kept(weights, name) for name in ("fast", "slow", "square"))
        torch._foreach_lerp_(fast, gradients, 1 - beta_1)
        torch._foreach_lerp_(slow, gradients, 1 - beta_3)
        torch._foreach_mul_(square, beta_2)
        torch._foreach_addcmul_(square, gradients, gradients, 1 - beta_2)
        scale = torch._foreach_sqrt(square)
        torch._foreach_div_(scale, math.sqrt(1 - beta_2 ** group["step"]))
        torch._foreach_add_(scale, group["eps"])
        change = torch._foreach_div(fast, 1 - beta_1 ** group["step"])
        torch._foreach_add_(change, slow, alpha=alpha)
        torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_addcdiv_(weights, change, scale, -group["lr"])

    @staticmethod
    def _slow(group: dict[str, Any]) -> tuple[float, float]:
        """alpha and beta_3 of this step: linear, and linear in the mean's half-life."""
        beta_1, _, beta_3 = group["betas"]
        alpha, length = group["alpha"], group["num_warmup_steps"]
        if group["step"] >= length or min(beta_1, beta_3) == 0:
            return alpha, beta_3
        share = group["step"] / length
        start, end = math.log(beta_1), math.log(beta_3)
        return share * alpha, min(
            math.exp(start * end / ((1 - share) * end + share * start)), beta_3
        )


class ADOPT(_Grouped):
    """Taniguchi et al., "ADOPT: Modified Adam Can Converge with Any beta_2" (NeurIPS 2024).

    The first step only measures the gradients. A later one divides its gradient by the scale of
    the steps before it, and clips the quotient at the fourth root of their number, as the paper's
    final version does. Decay is added to the gradient, or decoupled as in AdamW.
    """

    NUM_BETAS = 2

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.9999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        decouple: bool = False,
    ) -> None:
        super().__init__(
            params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, decouple=decouple
        )

    def _move(
        self, group: dict[str, Any], weights: list[torch.Tensor], gradients: list[torch.Tensor]
    ) -> None:
        beta_1, beta_2 = group["betas"]
        decay = group["weight_decay"]
        if decay and not group["decouple"]:
            gradients = list(torch._foreach_add(gradients, weights, alpha=decay))
        mean, square = (self._kept(weights, name) for name in ("mean", "square"))
        number = group["step"] - 1
        if number > 0:
            if group["decouple"]:
                torch._foreach_mul_(weights, 1 - group["lr"] * decay)
            scale = torch._foreach_sqrt(square)
            torch._foreach_clamp_min_(scale, group["eps"])
            change = torch._foreach_div(gradients, scale)
            torch._foreach_clamp_min_(change, -(number**0.25))
            torch._foreach_clamp_max_(change, number**0.25)
            torch._foreach_lerp_(mean, change, 1 - beta_1)
            torch._foreach_add_(weights, mean, alpha=-group["lr"])
            torch._foreach_mul_(square, beta_2)
        torch._foreach_addcmul_(square, gradients, gradients, 1 - beta_2 if number else 1)
