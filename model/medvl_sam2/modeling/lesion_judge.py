"""Second opinion on the lesions of a scene: nothing, or which kind, from all that was measured of a lesion.

The dense map's own shares of the kinds mistake cysts for solid lesions where a lesion is a few cells wide; its
attenuation tells them apart. One linear layer, fitted to the measured lesions of the training cases,
joins the two, and also weighs what speaks against a lesion at all. :class:`LesionWords` then says kind and organ in the
language model's own words, which it only has to copy: from numbers alone it named the organ of one lesion in five wrong
that the map had right.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from medvl_sam2.modeling.scene_facts import LESION_FEATURES, LESION_KINDS_AT

_LEAST_CHANCE = 1e-4
_DECAY = 3e-4
_ITERATIONS = 300
_WORD_SCALE = 0.25
"""Root mean square of a word, about that of the slots it is added to."""


class LesionJudge(nn.Module):
    """Measured lesions (B, slots, G) in, the same with the shares of the kinds replaced by chances out.

    Before it is fitted it leaves the shares as the map says.
    """

    def __init__(self, organs: int, kinds: int) -> None:
        super().__init__()
        self.kinds = slice(LESION_KINDS_AT, LESION_KINDS_AT + kinds)
        features = LESION_FEATURES + organs
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("scale", torch.zeros(features))  # zero: not fitted
        self.linear = nn.Linear(features, 1 + kinds)

    def chances(self, lesions: Tensor) -> Tensor:
        """Chances (..., 1 + kinds) that a measured lesion (..., G) is nothing, or of each kind."""
        return torch.softmax(self.linear(self._standardised(lesions)), dim=-1)

    def forward(self, lesions: Tensor) -> Tensor:
        """Facts with the judged kinds; their chances sum to that of a lesion being there. Empty slots stay empty."""
        if not bool(cast(Tensor, self.scale).any()):
            return lesions
        judged = lesions.clone()
        judged[..., self.kinds] = self.chances(lesions)[..., 1:].to(lesions.dtype)
        return torch.where(lesions[..., :1] > 0, judged, lesions)

    def fit(self, lesions: Tensor, kinds: Tensor) -> None:
        """Fit to measured lesions (N, G) of known ``kinds`` (N,): 0 for nothing, then the kinds; deterministic."""
        inputs = self._inputs(lesions)
        with torch.no_grad():
            cast(Tensor, self.mean).copy_(inputs.mean(dim=0))
            cast(Tensor, self.scale).copy_(inputs.std(dim=0).clamp_min(1e-3))
        standardised = self._standardised(lesions)
        weight = torch.zeros_like(self.linear.weight, requires_grad=True)
        bias = torch.zeros_like(self.linear.bias, requires_grad=True)
        optimiser = torch.optim.LBFGS([weight, bias], max_iter=_ITERATIONS, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            optimiser.zero_grad()
            error = functional.cross_entropy(functional.linear(standardised, weight, bias), kinds)
            total = error + _DECAY * weight.square().sum()
            total.backward()
            return total

        with torch.enable_grad():
            optimiser.step(loss)
        with torch.no_grad():
            self.linear.weight.copy_(weight)
            self.linear.bias.copy_(bias)

    def _inputs(self, lesions: Tensor) -> Tensor:
        """Shares of the kinds as log-odds, everything else as measured."""
        shares = lesions[..., self.kinds].clamp(_LEAST_CHANCE, 1 - _LEAST_CHANCE)
        inputs = lesions.clone()
        inputs[..., self.kinds] = torch.logit(shares)
        return inputs

    def _standardised(self, lesions: Tensor) -> Tensor:
        return (self._inputs(lesions) - cast(Tensor, self.mean)) / cast(Tensor, self.scale)


class LesionWords(nn.Module):
    """What is added to the tokens of judged lesions: the words of their kind and organ, weighted by their chances."""

    def __init__(self, organs: int, kinds: int, hidden: int) -> None:
        super().__init__()
        self.first_kind = LESION_KINDS_AT
        self.kinds = nn.Parameter(torch.zeros(kinds, hidden))
        self.organs = nn.Parameter(torch.zeros(organs, hidden))

    def forward(self, lesions: Tensor) -> Tensor:
        """Judged facts (B, slots, G) to (B, slots, hidden); nothing for an empty slot."""
        kinds = lesions[..., self.first_kind : self.first_kind + len(self.kinds)]
        hosts = lesions[..., LESION_FEATURES:].square()  # the organ with most of the lesion stands out
        hosts = hosts / hosts.sum(dim=-1, keepdim=True).clamp_min(1e-3)
        return kinds @ self.kinds + hosts @ self.organs

    @torch.no_grad()
    def learn(self, embedding: Callable[[str], Tensor], kinds: Sequence[str], organs: Sequence[str]) -> None:
        """Begin with the language model's ``embedding`` (hidden,) of every name, unless words are learned already."""
        if bool(self.kinds.any()) or bool(self.organs.any()):
            return
        for rows, names in ((self.kinds, kinds), (self.organs, organs)):
            words = torch.stack([embedding(name) for name in names])
            rows.copy_(words * _WORD_SCALE / words.square().mean(dim=1, keepdim=True).sqrt().clamp_min(1e-6))
