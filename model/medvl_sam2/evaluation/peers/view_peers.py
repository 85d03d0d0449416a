"""Two peers on MONAI's DynUNet: named segmentation alone, and DeepEdit.

DeepEdit (Diaz-Pinto et al., arXiv 2305.10655; MONAI's guidance transform) adds two click channels and spends half of
its iterations without clicks. Ours differs in one thing: the clicks of the protocol do not say which class they mean,
and real objects may have no class, so clicks fill one object channel instead of a channel a class. Clicks are simulated
by the rule of the protocol, which is the rule it is scored by.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from monai.losses import DiceCELoss
from monai.networks.nets import DynUNet
from monai.transforms import Compose, RandScaleIntensity, RandShiftIntensity
from torch import Tensor, nn

from medvl_sam2.errors import ConfigError, PromptError
from medvl_sam2.evaluation.peers.view import Grid, Opened, guidance, image_view, mask_view
from medvl_sam2.training.clicks import next_click
from medvl_sam2.training.run_settings import plain_settings, weights_digest
from medvl_sam2.training.samples import LabelledVolume, Target, volumes_digest
from medvl_sam2.training.stage import Draw, ParameterGroup, Stage
from medvl_sam2.types import Answer, Prompt, Segmentation, Volume
from medvl_sam2.vocabulary import CLASSES


@dataclass(frozen=True)
class ViewConfig:
    """Sizes of both peers; the default suits one CPU thread, whose minutes buy few steps of anything larger.

    ``grid`` (D, H, W) is what every volume is resized to; ``sigma`` the clicks' width in cells.
    """

    grid: Grid = (64, 80, 80)
    filters: tuple[int, ...] = (8, 16, 32, 64, 128)
    sigma: int = 2
    most_clicks: int = 4
    learning_rate: float = 2e-3

    def __post_init__(self) -> None:
        step = 2 ** (len(self.filters) - 1)
        if len(self.filters) < 3 or any(edge % step or edge <= step for edge in self.grid):
            raise ConfigError(f"grid {self.grid} must be multiples of {step}, and larger, for filters {self.filters}")


def network(config: ViewConfig, clicks: bool) -> nn.Module:
    """DynUNet from the image (and two click channels) to a logit a class (and one for the clicked object)."""
    levels = len(config.filters)
    return DynUNet(
        spatial_dims=3,
        in_channels=3 if clicks else 1,
        out_channels=len(CLASSES) + clicks,
        kernel_size=[3] * levels,
        strides=[1] + [2] * (levels - 1),
        upsample_kernel_size=[2] * (levels - 1),
        filters=list(config.filters),
        norm_name="instance",
    )


class ViewStage(Stage):
    """Trains a peer on whole volumes; with ``clicks`` every second iteration is an interactive one."""

    def __init__(
        self,
        config: ViewConfig,
        volumes: Sequence[LabelledVolume],
        weights: Sequence[float],
        clicks: bool,
        device: str = "cpu",
        seed: int = 0,
    ) -> None:
        self.name = "DeepEdit" if clicks else "DynUNet"
        self.key = self.name.lower()
        self.config, self.clicks, self._device = config, clicks, device
        self._volumes = list(volumes)
        # Both on the grid, far smaller than the volumes: made once, not in every step.
        self._images: dict[int, Tensor] = {}
        self._masks: dict[tuple[int, str], Tensor] = {}
        self._chance = np.asarray(weights, dtype=np.float64)
        self._named_chance = self._chance * [any(name in v.known for name in CLASSES) for v in self._volumes]
        if not self._named_chance.any():
            raise ConfigError("no training volume decides a class of the vocabulary; add generated cases")
        torch.manual_seed(seed)
        self._network = network(config, clicks).to(device)
        self._loss = DiceCELoss(sigmoid=True)
        self._begun = {
            **plain_settings(config),
            "volumes": volumes_digest(volumes, weights),
            "start": weights_digest(self._network.state_dict()),
        }

    @property
    def module(self) -> nn.Module:
        """The network."""
        return self._network

    def groups(self) -> list[ParameterGroup]:
        """All of it."""
        return [ParameterGroup(list(self._network.parameters()), self.config.learning_rate, 1e-4)]

    def settings(self) -> dict[str, Any]:
        """The sizes, the volumes and the weights it started from."""
        return self._begun

    def loss(self, draw: Draw) -> tuple[Tensor, dict[str, float]]:
        """Classes by name, or one object from its clicks."""
        rng = draw.rng()
        if self.clicks and rng.random() < 0.5:
            loss = self._clicked(rng)
            if loss is not None:
                return loss, {"clicked": float(loss.detach())}
        loss = self._named(rng)
        return loss, {"named": float(loss.detach())}

    def _named(self, rng: np.random.Generator) -> Tensor:
        """Loss of the classes that the drawn volume decides; the click channels stay empty."""
        drawn = self._drawn(self._named_chance, rng)
        volume = self._volumes[drawn]
        asked = [number for number, name in enumerate(CLASSES) if name in volume.known]
        truth = torch.stack([self._truth(drawn, volume.find(CLASSES[number])) for number in asked])
        logits = self._forward(self._image(drawn, rng), no_clicks(self.config, self.clicks))[asked]
        return self._loss(logits[:, None], truth[:, None].to(self._device))

    def _clicked(self, rng: np.random.Generator) -> Tensor | None:
        """Loss of one object after one to ``most_clicks`` clicks; None for an object too small for the grid.

        Half of the volumes are turned, as our own segmenter's windows are: no name is read here.
        """
        drawn = self._drawn(self._chance, rng)
        targets = self._volumes[drawn].targets
        turn = int(rng.integers(8)) if rng.random() < 0.5 else 0
        soft = turned(self._truth(drawn, targets[int(rng.integers(len(targets)))]), turn)
        truth = soft.numpy() > 0.5
        if not truth.any():
            return None
        image, grid = turned(self._image(drawn, rng), turn), self.config.grid
        points, labels = list[tuple[int, ...]](), list[int]()
        guess, channels = None, no_clicks(self.config, self.clicks)
        for placed in range(1 + int(rng.integers(self.config.most_clicks))):
            if placed:
                with torch.no_grad():
                    guess = (self._forward(image, channels)[-1] > 0).cpu().numpy()
            click = next_click(truth, guess, rng, core=0.5)
            if click is None:
                break
            points.append(click.position)
            labels.append(click.label)
            channels = guidance(np.array(points), np.array(labels), grid, self.config.sigma)
        return self._loss(self._forward(image, channels)[-1][None, None], soft[None, None].to(self._device))

    def _forward(self, image: Tensor, channels: Tensor) -> Tensor:
        return logits_of(self._network, image.to(self._device), channels)

    def _drawn(self, chance: np.ndarray, rng: np.random.Generator) -> int:
        return int(rng.choice(len(self._volumes), p=chance / chance.sum()))

    def _truth(self, drawn: int, target: Target | None) -> Tensor:
        """Share of every cell (D, H, W); zeros for a class that is known to be absent."""
        if target is None:
            return torch.zeros(self.config.grid)
        if (drawn, target.name) not in self._masks:
            share = mask_view(self._volumes[drawn].mask(target, slice(None)), self.config.grid)[0]
            self._masks[drawn, target.name] = share.flatten().to_sparse()  # most organs fill a hundredth of the grid
        return self._masks[drawn, target.name].to_dense().reshape(self.config.grid)

    def _image(self, drawn: int, rng: np.random.Generator) -> Tensor:
        """View with random contrast. Left and right are not exchanged here: some classes differ in nothing else."""
        if drawn not in self._images:
            volume = self._volumes[drawn]
            self._images[drawn] = image_view(volume.image, volume.modality, self.config.grid)
        change = Compose([RandScaleIntensity(0.2, prob=1.0), RandShiftIntensity(0.1, prob=1.0)])
        change.set_random_state(seed=int(rng.integers(2**31)))
        return torch.as_tensor(np.asarray(change(self._images[drawn])))


def turned(cells: Tensor, turn: int) -> Tensor:
    """Flip ``turn`` (0 to 7) of (..., H, W) in the plane: bit 0 x, bit 1 y, bit 2 both axes exchanged, if equally long.

    Never where a name is read: left and right do not hold afterwards.
    """
    axes = [axis for bit, axis in ((1, -1), (2, -2)) if turn & bit]
    cells = cells.flip(axes)
    return cells.transpose(-1, -2).contiguous() if turn & 4 and cells.shape[-1] == cells.shape[-2] else cells


def no_clicks(config: ViewConfig, clicks: bool) -> Tensor:
    """Empty click channels (2, D, H, W), or none of them for a network without."""
    return torch.zeros(2 if clicks else 0, *config.grid)


def logits_of(net: nn.Module, image: Tensor, channels: Tensor) -> Tensor:
    """Logits (classes and perhaps the object, D, H, W) of image (1, D, H, W) and click channels."""
    return net(torch.cat([image, channels.to(image)])[None])[0].float()


class ViewPeer:
    """A trained peer with the interface of the predictor; what it cannot do raises :class:`PromptError`."""

    def __init__(self, name: str, net: nn.Module, config: ViewConfig, clicks: bool) -> None:
        self.name, self.network, self.config, self.clicks = name, net.cpu().eval(), config, clicks

    def open(self, volume: Volume) -> Opened:
        """The volume on the peer's grid."""
        return Opened.of(volume, self.config.grid)

    @torch.inference_mode()
    def segment_prompt(self, session: Opened, prompt: Prompt, name: str = "object") -> Segmentation:
        """Mask for cumulative clicks. A box is only its centre, as a foreground click: DeepEdit has no box."""
        if not self.clicks:
            raise PromptError(f"{self.name} takes no clicks; ask it for classes")
        prompt = prompt.validated(session.transform.geometry.shape)
        points, labels = prompt.points, prompt.labels
        if prompt.box is not None:
            points, labels = np.vstack([prompt.box.mean(axis=0), points]), np.append(1, labels)
        channels = guidance(session.cells(points), labels, self.config.grid, self.config.sigma)
        found = session.canonical(logits_of(self.network, session.image, channels)[-1]).numpy() > 0
        return self._segmentation(session, found, (name,))

    @torch.inference_mode()
    def segment_classes(self, session: Opened, classes: Sequence[str] = (), progress: object = None) -> Segmentation:
        """Label map of vocabulary classes; where several are found the surer one stays."""
        names = tuple(classes) or CLASSES
        logits = logits_of(self.network, session.image, no_clicks(self.config, self.clicks))
        labels = np.zeros(session.transform.shape, dtype=np.uint8)
        best = torch.zeros(session.transform.shape)
        for value, name in enumerate(names, 1):
            found = session.canonical(logits[CLASSES.index(name)])
            labels[(found > best).numpy()] = value
            best = torch.maximum(best, found)
        return self._segmentation(session, labels, names)

    def segment_text(self, session: Opened, text: str) -> Segmentation:
        """Refused."""
        raise PromptError(f"{self.name} has no language; {text!r} cannot be asked")

    def answer(self, session: Opened, question: str) -> Answer:
        """Refused."""
        raise PromptError(f"{self.name} has no language; {question!r} cannot be asked")

    def report(self, session: Opened) -> Answer:
        """Refused."""
        raise PromptError(f"{self.name} has no language; it writes no report")

    @staticmethod
    def _segmentation(session: Opened, canonical: np.ndarray, names: tuple[str, ...]) -> Segmentation:
        stored = np.ascontiguousarray(session.transform.inverse_array(canonical.astype(np.uint8)))
        return Segmentation(stored, session.transform.geometry, names)
