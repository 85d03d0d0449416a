"""Language phase: volume encoder with dense supervision, then projector and language model on packed exchanges.

Run ``python -m medvl_sam2.training.language_phase --out DIR`` to train the shipped preset from generated cases.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from medvl_sam2.config import ModelConfig
from medvl_sam2.errors import CheckpointError, DataError
from medvl_sam2.modeling.scene import SceneFacts
from medvl_sam2.modeling.tokenizer import Tokenizer
from medvl_sam2.modeling.vision_language import VisionLanguage
from medvl_sam2.synthesis.case import GeneratorConfig
from medvl_sam2.training.corpus import build_tokenizer, draw_samples
from medvl_sam2.training.language_batches import pack, stack_views
from medvl_sam2.training.language_data import CaseStore, LanguageCase
from medvl_sam2.training.language_heads import DenseHeads, FactHead, FactVocabulary, SegPlace, dense_loss
from medvl_sam2.training.language_metrics import language_scores

logger = logging.getLogger(__name__)

HELD_OUT_SEED = 1_000_000
"""First seed of the held-out generated cases; training seeds count from 0."""

DENSE_SEED = 2_000_000
"""First seed of the lesion-rich cases."""

_LESION_RICH = GeneratorConfig(lesion_counts=(0.0, 0.0, 0.0, 0.0, 0.25, 0.25, 0.25, 0.25))
_WORDINGS = 6
_SURVEYED = 400
"""So many cases are read through for the tokenizer's corpus and the list of facts."""
_VISION_SHARE = 0.5
"""Lesions only begin to show after some 400 steps of the encoder, later than organs."""
_SECONDS_PER_VISION_STEP = 0.95
_SECONDS_PER_LANGUAGE_STEP = 0.9


@dataclass(frozen=True)
class LanguagePhaseConfig:
    """Numbers of the language phase.

    Each step's randomness depends only on ``seed`` and the step, so a resumed run continues as if never stopped
    (exactly in float32, to rounding in bfloat16).
    """

    seed: int = 0
    vision_steps: int = 500
    language_steps: int = 900
    vision_batch: int = 4
    language_batch: int = 4
    vision_rate: float = 3e-3
    language_rate: float = 1e-3
    weight_decay: float = 0.05
    warmup: int = 40
    pack_length: int = 576
    questions: int = 14
    segments: int = 2
    refresh_steps: int = 750
    """The frozen encoder's answers are kept for so many steps of the second part."""
    fact_weight: float = 1.0
    seg_weight: float = 0.5
    bfloat16: bool = True
    """Autocast on the CPU: measured 2.4 times faster where the processor has bfloat16 units, slower elsewhere."""
    save_every: int = 50

    @property
    def steps(self) -> int:
        """Steps of both parts."""
        return self.vision_steps + self.language_steps

    def within(self, minutes: float) -> LanguagePhaseConfig:
        """Step counts for about ``minutes`` on one CPU thread with bfloat16 units."""
        seconds = 60.0 * minutes
        return replace(
            self,
            vision_steps=max(1, round(_VISION_SHARE * seconds / _SECONDS_PER_VISION_STEP)),
            language_steps=max(1, round((1 - _VISION_SHARE) * seconds / _SECONDS_PER_LANGUAGE_STEP)),
        )


@dataclass(frozen=True)
class LanguageResult:
    """The trained model (eval mode) and ``history``: (step, dense, language, fact, seg) means between saves."""

    model: VisionLanguage
    history: list[dict[str, float]]


class EncodedCase(NamedTuple):
    """The frozen encoder's two tapped maps (1, n, C) float16, extent (1, 3) in mm and measured scene."""

    low: Tensor
    high: Tensor
    extent: Tensor
    facts: SceneFacts | None


class LanguageTrainer(nn.Module):
    """The model with its training-only heads; one optimiser step per call of :meth:`step_loss`."""

    def __init__(
        self,
        model: VisionLanguage,
        config: LanguagePhaseConfig,
        cases: Sequence[LanguageCase],
        dense_cases: Sequence[LanguageCase] = (),
    ):
        super().__init__()
        self.model = model
        self.config = config
        self.cases = cases
        self.dense_cases = dense_cases
        self.vocabulary = FactVocabulary.collect(cases[:_SURVEYED], model.config.scene.kinds)
        self._encoded: dict[tuple[int, int], EncodedCase] = {}
        self.dense = DenseHeads(model.config.vision, self.vocabulary)
        self.facts = FactHead(model.config.language.hidden_size, len(self.vocabulary.facts))
        self.place = SegPlace(model.config)

    def step_loss(self, step: int) -> tuple[Tensor, dict[str, float]]:
        """Loss of one step and its parts."""
        rng = np.random.default_rng((self.config.seed, step))
        torch.manual_seed(int(rng.integers(2**31)))
        with torch.autocast("cpu", torch.bfloat16, enabled=self.config.bfloat16):
            return self._vision_loss(rng) if step < self.config.vision_steps else self._language_loss(step, rng)

    def _pick(self, rng: np.random.Generator, count: int) -> list[int]:
        return [int(n) for n in rng.choice(len(self.cases), size=count, replace=len(self.cases) < count)]

    def _vision_loss(self, rng: np.random.Generator) -> tuple[Tensor, dict[str, float]]:
        self.model.train()
        numbers = self._pick(rng, self.config.vision_batch)
        cases = [self.cases[number] for number in numbers]
        if self.dense_cases:
            for place in range(0, len(cases), 2):
                cases[place] = self.dense_cases[int(rng.integers(len(self.dense_cases)))]
        views, _ = stack_views(cases, rng)
        maps = self.model.vision(views)
        cells = self.vocabulary.cell_targets(cases)
        loss = self.dense(maps, cells)
        parts = {"coarse": loss.item()}
        if self.model.scene is not None:
            scene = dense_loss(self.model.scene(views, maps).flatten(2), cells.flatten(2))
            parts["scene"] = scene.item()
            loss = loss + scene
        return loss, parts

    def _language_loss(self, step: int, rng: np.random.Generator) -> tuple[Tensor, dict[str, float]]:
        config = self.config
        self.model.train()
        numbers = self._pick(rng, config.language_batch)
        window = (step - config.vision_steps) // config.refresh_steps
        tokens = self._image_tokens([self._encode(number, window) for number in numbers])
        cases = [self.cases[number] for number in numbers]
        rows = [draw_samples(case, rng, config.questions, config.segments) for case in cases]
        batch = pack(self.model, rows, config.pack_length)
        hidden = self.model.hidden_states(tokens, batch.ids, batch.attention, batch.positions)
        losses = self.model.token_losses(hidden, batch.labels)
        language = (losses * batch.weights).sum() / batch.weights.sum()
        fact = self._fact_loss(tokens, cases)
        loss = language + config.fact_weight * fact
        parts = {"language": language.item(), "fact": fact.item()}
        if len(batch.seg_classes):
            place = self.place(self.model.seg_embeddings(hidden, batch.ids), batch.seg_cells, batch.seg_classes)
            loss = loss + config.seg_weight * place
            parts["seg"] = place.item()
        return loss, parts

    @torch.no_grad()
    def _encode(self, number: int, window: int) -> EncodedCase:
        """What the frozen encoder says of a case; encoded anew, with other noise, in every window of steps."""
        key = (number, window)
        if key not in self._encoded:
            self.model.vision.eval()  # running statistics, as at inference
            low, high = self.model.config.vision.taps
            views, extent = stack_views([self.cases[number]], np.random.default_rng((self.config.seed, *key)))
            maps = self.model.vision(views)
            facts = None
            if self.model.scene is not None:
                self.model.scene.eval()
                facts = self.model.scene.measure(views, self.model.scene(views, maps), extent)
            self._encoded = {k: v for k, v in self._encoded.items() if k[1] == window}
            self._encoded[key] = EncodedCase(maps[low].half(), maps[high].half(), extent, facts)
        return self._encoded[key]

    def _image_tokens(self, encoded: Sequence[EncodedCase]) -> Tensor:
        low, high = self.model.config.vision.taps
        maps = [torch.empty(0)] * 5
        maps[low] = torch.cat([item.low.float() for item in encoded])  # autocast refuses to join halves
        maps[high] = torch.cat([item.high.float() for item in encoded])
        facts = [item.facts for item in encoded if item.facts is not None]
        scene = (
            SceneFacts(torch.cat([f.organs for f in facts]), torch.cat([f.lesions for f in facts])) if facts else None
        )
        return self.model.project(maps, torch.cat([item.extent for item in encoded]), scene)

    def _fact_loss(self, tokens: Tensor, cases: Sequence[LanguageCase]) -> Tensor:
        targets = self.vocabulary.fact_targets(cases)
        loss = functional.binary_cross_entropy_with_logits(self.facts(tokens).float(), targets, reduction="none")
        return (loss * torch.where(targets > 0, 3.0, 1.0)).mean()

    def optimizer(self, step: int) -> torch.optim.Optimizer:
        """AdamW of the part ``step`` belongs to; a new one starts where the part changes."""
        config = self.config
        vision = [*self.model.vision.parameters(), *self.dense.parameters()]
        if self.model.scene is not None:
            vision += self.model.scene.map_parameters()
        skip = {id(p) for p in vision}
        if step < config.vision_steps:
            groups = [{"params": vision, "peak": config.vision_rate}]
        else:
            rest = [p for p in self.parameters() if id(p) not in skip]
            groups = [{"params": rest, "peak": config.language_rate}]
        return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), weight_decay=config.weight_decay)

    def set_rate(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Warm-up, then cosine to 2 % of the peak, in each part."""
        early = step < self.config.vision_steps
        count = self.config.vision_steps if early else self.config.language_steps
        done = step if early else step - self.config.vision_steps
        factor = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done / max(1, count)))
        factor *= min(1.0, (done + 1) / max(1, min(self.config.warmup, count // 4)))
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * factor


def train_language(
    config: LanguagePhaseConfig,
    model_config: ModelConfig,
    tokenizer: Tokenizer,
    cases: Sequence[LanguageCase],
    run: Path | None = None,
    report_progress: Callable[[float, str], None] | None = None,
    dense_cases: Sequence[LanguageCase] = (),
) -> LanguageResult:
    """Train from scratch, or continue the run saved in the folder ``run``.

    ``dense_cases`` fill half of the encoder's batches: many lesions a volume, whose texts are not used.
    ``report_progress`` receives the share done and a line of text; it may raise to stop (the state is saved first).
    Raises :class:`DataError` without cases.
    """
    if not cases:
        raise DataError("the language phase got no case; generate or load at least one")
    torch.manual_seed(config.seed)
    trainer = LanguageTrainer(VisionLanguage(model_config, tokenizer), config, cases, dense_cases)
    step, history, moments = (0, [], None) if run is None else _resume(run, trainer)
    optimizer = trainer.optimizer(step)
    if moments is not None:
        optimizer.load_state_dict(moments)
    sums: dict[str, list[float]] = {}
    with tqdm(total=config.steps, initial=step, desc="language phase", mininterval=10) as bar:
        while step < config.steps:
            if step == config.vision_steps:
                optimizer = trainer.optimizer(step)
            trainer.set_rate(optimizer, step)
            loss, parts = trainer.step_loss(step)
            trainer.zero_grad(set_to_none=True)  # also what the optimiser of the other part left
            loss.backward()
            nn.utils.clip_grad_norm_(trainer.parameters(), 1.0)
            optimizer.step()
            step += 1
            bar.update()
            for name, value in parts.items():
                sums.setdefault(name, []).append(value)
            if step % config.save_every and step != config.steps:
                continue
            history.append({"step": float(step), **{name: float(np.mean(v)) for name, v in sums.items()}})
            bar.set_postfix({name: f"{np.mean(v):.3f}" for name, v in sums.items()})
            sums = {}
            if run is not None:
                _save(run, trainer, optimizer, step, history)
            if report_progress is not None:
                report_progress(step / config.steps, f"language phase, step {step} of {config.steps}")
    trainer.model.eval()
    return LanguageResult(trainer.model, history)


def model_state(model: nn.Module) -> dict[str, Tensor]:
    """State dict without the tied output embedding, contiguous, as safetensors stores it."""
    return {name: t.detach().contiguous() for name, t in model.state_dict().items() if name != "lm.lm_head.weight"}


def load_model_state(model: VisionLanguage, state: dict[str, Tensor]) -> None:
    """Load :func:`model_state` output; raises :class:`CheckpointError` when a tensor is missing or unknown."""
    missing, unknown = model.load_state_dict(state, strict=False)
    odd = [name for name in missing if name != "lm.lm_head.weight"] + list(unknown)
    if odd:
        raise CheckpointError(f"weights do not fit the model: {odd[0]!r} is in only one of them; use its own config")


def _save(
    run: Path, trainer: LanguageTrainer, optimizer: torch.optim.Optimizer, step: int, history: list[dict[str, float]]
) -> None:
    run.mkdir(parents=True, exist_ok=True)
    state = {name: t.detach().contiguous() for name, t in trainer.state_dict().items() if "lm_head" not in name}
    partial = run / "resume.partial"
    torch.save({"weights": state, "optimizer": optimizer.state_dict(), "step": step, "history": history}, partial)
    partial.replace(run / "resume.pt")


def _resume(run: Path, trainer: LanguageTrainer) -> tuple[int, list[dict[str, float]], dict[str, object] | None]:
    path = run / "resume.pt"
    if not path.exists():
        return 0, [], None
    saved = torch.load(path, weights_only=True)
    missing, unknown = trainer.load_state_dict(saved["weights"], strict=False)
    if unknown or any("lm_head" not in name for name in missing):
        raise CheckpointError(f"{path} belongs to another configuration; remove it or restore that configuration")
    step = int(saved["step"])
    return step, list(saved["history"]), None if step == trainer.config.vision_steps else saved["optimizer"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line: train on generated cases and write weights, tokenizer and metrics."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the result and the resumable state")
    parser.add_argument("--cache", type=Path, help="folder of prepared cases (default: OUT/cache)")
    parser.add_argument("--cases", type=int, default=400)
    parser.add_argument("--dense-cases", type=int, default=400, help="lesion-rich cases for the encoder")
    parser.add_argument("--held-out", type=int, default=40)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    started = time.perf_counter()
    model_config = ModelConfig.tiny()
    cache = options.cache or options.out / "cache"
    cases = CaseStore(range(options.cases), model_config.vision, cache, wordings=_WORDINGS)
    rich = CaseStore(
        range(DENSE_SEED, DENSE_SEED + options.dense_cases), model_config.vision, cache, generator=_LESION_RICH
    )
    held_out = CaseStore(range(HELD_OUT_SEED, HELD_OUT_SEED + options.held_out), model_config.vision, cache)
    options.out.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer(cases[:_SURVEYED], model_config.language.vocab_size)
    tokenizer.save(options.out / "tokenizer.json")
    config = LanguagePhaseConfig(seed=options.seed).within(options.minutes)
    (options.out / "config.json").write_text(model_config.to_json(), encoding="utf-8")
    training = time.perf_counter()
    result = train_language(config, model_config, tokenizer, cases, run=options.out, dense_cases=rich)
    trained = time.perf_counter()
    save_file(model_state(result.model), options.out / "vision_language.safetensors")
    scores = language_scores(result.model, held_out)
    metrics = {
        "held_out": asdict(scores),
        "history": result.history,
        "config": asdict(config),
        "cases": len(cases),
        "dense_cases": len(rich),
        "held_out_cases": len(held_out),
        "seconds": {"data": training - started, "training": trained - training},
    }
    (options.out / "metrics.json").write_text(json.dumps(metrics, indent=2), encoding="utf-8")
    print(json.dumps(metrics["held_out"], indent=2))


if __name__ == "__main__":
    main()
