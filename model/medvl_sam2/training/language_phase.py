"""Language phase: projector, scene tokens and language model on packed exchanges; the volume encoder is frozen.

Run ``python -m medvl_sam2.training.language_phase --out DIR --scene SCENE`` to train the shipped preset from generated
cases on top of a finished scene phase.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from medvl_sam2.config import ModelConfig
from medvl_sam2.errors import DataError
from medvl_sam2.modeling.lesion_judge import LesionJudge
from medvl_sam2.modeling.scene_facts import SceneFacts, lesion_parts
from medvl_sam2.modeling.tokenizer import Tokenizer
from medvl_sam2.modeling.vision_language import VisionLanguage
from medvl_sam2.partial_weights import load_part, read_weights
from medvl_sam2.training.corpus import SegTarget, build_tokenizer, draw_samples
from medvl_sam2.training.language_batches import pack, stack_views
from medvl_sam2.training.language_data import CaseStore, JoinedCases, LanguageCase, seeds_of
from medvl_sam2.training.language_heads import FactHead, FactVocabulary
from medvl_sam2.training.language_metrics import language_scores
from medvl_sam2.training.language_weights import load_language, load_scene, model_state
from medvl_sam2.training.pointing import pointing_loss, slot_lies_on, wanted_elements
from medvl_sam2.training.ranks import Ranks
from medvl_sam2.training.run_settings import digest, frozen_digest, plain_settings
from medvl_sam2.training.stage import Draw, ParameterGroup, Stage
from medvl_sam2.training.trainer import ReportProgress, Trainer, TrainerConfig
from medvl_sam2.training.trainer_state import write_tensors
from medvl_sam2.training.volume_sources import HELD_OUT_SEED, LESION_RICH, LESION_RICH_SEED, UNSEEN_SEED
from medvl_sam2.vocabulary import spoken

_WORDINGS = 6
_SURVEYED = 400
"""So many cases, from the first seed on, are read through for the tokenizer's corpus and the list of facts."""
_JUDGED = 1000
"""At most so many cases, spread over all, give the lesions that the scene's judge is fitted to."""
_SECONDS_PER_STEP = 0.95


@dataclass(frozen=True)
class LanguagePhaseConfig:
    """Numbers of the language phase.

    Each step's randomness depends only on ``seed`` and the step, so a resumed run continues as if never stopped
    (exactly in float32, to rounding in bfloat16).
    """

    seed: int = 0
    steps: int = 2400
    batch: int = 4
    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    warmup: int = 40
    pack_length: int = 576
    questions: int = 14
    segments: int = 2
    blind_chance: float = 0.5
    """Chance that a case is read from its scene tokens alone: from the projector's tokens the language model learned to
    recognise single cases instead (demo-2: training loss 0.14, held-out closed questions 0.735)."""
    refresh_steps: int = 2500
    """The frozen encoder's answers are kept for so many steps; then every case is encoded anew, with other noise."""
    fact_weight: float = 1.0
    pointer_weight: float = 2.0
    bfloat16: bool = True
    """Autocast where the device has bfloat16 units: measured 2.4 times faster on CPUs with them, slower elsewhere."""
    accumulate: int = 1
    checkpointing: bool = False
    """Compute the language model's activations again in the backward pass: less memory, more time."""
    device: str = "cpu"
    save_every: int = 50

    def within(self, minutes: float) -> LanguagePhaseConfig:
        """Step count for about ``minutes`` on one CPU thread with bfloat16 units."""
        return replace(self, steps=max(1, round(60.0 * minutes / _SECONDS_PER_STEP)))


@dataclass(frozen=True)
class LanguageResult:
    """The trained model (eval mode) and ``history``: (step, loss, language, fact, pointed) means between saves."""

    model: VisionLanguage
    history: list[dict[str, float]]


class EncodedCase(NamedTuple):
    """What the frozen encoder says of a case.

    Its two tapped maps (1, n, C) float16, the extent (1, 3) in mm, the measured scene, and which lesion slot lies on
    which finding: bool (slots, findings).
    """

    low: Tensor
    high: Tensor
    extent: Tensor
    facts: SceneFacts | None
    found: Tensor


class LanguageTrainer(nn.Module, Stage):
    """The model with its training-only heads. The encoder and the scene's map are frozen."""

    name, key, outdated = "language phase", "language", ("resume.pt",)

    def __init__(
        self,
        model: VisionLanguage,
        config: LanguagePhaseConfig,
        cases: Sequence[LanguageCase],
        surveyed: Sequence[LanguageCase] | None = None,
    ):
        super().__init__()
        self.model = model
        self.config = config
        self.cases = cases
        self.vocabulary = FactVocabulary.collect(surveyed or cases[:_SURVEYED])
        self._encoded: dict[tuple[int, int], EncodedCase] = {}
        self.facts = FactHead(model.config.language.hidden_size, len(self.vocabulary.facts))
        frozen = list(model.vision.parameters())
        if model.scene is not None:
            frozen += model.scene.map_parameters()
        for parameter in frozen:
            parameter.requires_grad_(False)
        self.eval()  # running statistics of the frozen parts, as at inference; the rest has no dropout
        self.model.lm.train()  # it has none either; only in this mode it can be checkpointed

    @property
    def module(self) -> LanguageTrainer:
        """Everything."""
        return self

    def groups(self) -> list[ParameterGroup]:
        """Everything that is not frozen."""
        trained = [p for p in self.parameters() if p.requires_grad]
        return [ParameterGroup(trained, self.config.learning_rate, self.config.weight_decay)]

    def settings(self) -> dict[str, Any]:
        """The phase's numbers, the seeds of its cases, and the tokenizer with the list of facts."""
        free = ("steps", "accumulate", "checkpointing", "device", "save_every")  # the loop keeps accumulate x processes
        words = digest(self.model.tokenizer.to_json(), self.vocabulary.facts)
        return {**plain_settings(self.config, free), "cases": digest(seeds_of(self.cases)), "tokenizer": words}

    def shards(self) -> Sequence[nn.Module]:
        """The layers of the language model."""
        return list(self.model.lm.model.layers)

    def _pick(self, rng: np.random.Generator, count: int) -> list[int]:
        return [int(n) for n in rng.choice(len(self.cases), size=count, replace=len(self.cases) < count)]

    def loss(self, draw: Draw) -> tuple[Tensor, dict[str, float]]:
        """Language loss of packed exchanges, of facts read off the tokens, and of pointing."""
        config, rng = self.config, draw.rng()
        numbers = self._pick(rng, config.batch)
        window = draw.step // config.refresh_steps
        encoded = [self._encode(number, window) for number in numbers]
        tokens = self._image_tokens(encoded)
        cases = [self.cases[number] for number in numbers]
        rows = [draw_samples(case, rng, config.questions, config.segments) for case in cases]
        batch = pack(self.model, rows, config.pack_length).to(tokens.device)
        hidden = self.model.hidden_states(tokens, batch.ids, batch.attention, batch.positions)
        losses = self.model.token_losses(hidden, batch.labels)
        language = (losses * batch.weights).sum() / batch.weights.sum()
        fact = self._fact_loss(tokens, cases)
        loss = language + config.fact_weight * fact
        parts = {"language": language.item(), "fact": fact.item()}
        if batch.segs and self.model.pointer is not None:
            scene = tokens[[row for row, _ in batch.segs], -self.model.config.scene_tokens :]
            scores = self.model.pointer(hidden[batch.ids == self.model.tokenizer.seg_id], scene)
            wanted = torch.stack([self._wanted(target, encoded[row].found) for row, target in batch.segs])
            pointed, parts["pointed"] = pointing_loss(scores, wanted.to(scores.device))
            loss = loss + config.pointer_weight * pointed
        return loss, parts

    def _wanted(self, target: SegTarget, found: Tensor) -> Tensor:
        """Elements (E,) in {0, 1} that a target is, given which slot lies on which finding (slots, findings)."""
        slots = found[:, list(target.findings)].any(dim=1)
        return wanted_elements([target.name], self.model.config.scene_organs, slots)

    @torch.no_grad()
    def fit_judge(self, run: Path | None) -> None:
        """Fit the scene's judge of lesions to what the frozen map finds in the cases.

        An earlier start in the folder ``run``, with the same map, cases and seed, may have fitted it already; of
        several processes the first does it for all. A model that has no words for lesions yet begins with those of
        its language model.

        Raises :class:`DataError` when no lesion of a known kind is found there.
        """
        scene = self.model.scene
        if scene is None or scene.judge is None or scene.words is None:
            return
        organs = [spoken(name) for name in self.model.config.scene_organs]
        scene.words.learn(self.model.word_embedding, scene.scene.kinds, organs)
        if run is None:
            self._fit_to_cases(scene.judge, scene.scene.kinds)
            return
        ranks = Ranks.join(self.config.device)
        kept = run / f"judge_{digest(frozen_digest(self), seeds_of(self.cases), self.config.seed)}.safetensors"
        if ranks.first and not kept.exists():
            self._fit_to_cases(scene.judge, scene.scene.kinds)
            write_tensors(kept, model_state(scene.judge))
        ranks.wait()
        load_part(scene.judge, read_weights(kept), kept)

    def _fit_to_cases(self, judge: LesionJudge, named: Sequence[str]) -> None:
        rows, kinds = [], []
        numbers = np.unique(np.linspace(0, len(self.cases) - 1, _JUDGED).astype(int)).tolist()
        for number in tqdm(numbers, desc="lesions of known kind", mininterval=10):
            encoded = self._encode(number, 0)
            assert encoded.facts is not None
            known = [1 + named.index(finding.kind) for finding in self.cases[number].findings]
            for slot in torch.nonzero(encoded.facts.lesions[0, :, 0] > 0)[:, 0].tolist():
                rows.append(encoded.facts.lesions[0, slot])
                kinds.append(max((k for k, on in zip(known, encoded.found[slot], strict=True) if on), default=0))
        if not any(kinds):
            raise DataError(f"no lesion was found in {len(numbers)} cases; train the scene for longer")
        judge.fit(torch.stack(rows), torch.tensor(kinds, device=rows[0].device))

    @torch.no_grad()
    def _encode(self, number: int, window: int) -> EncodedCase:
        """What the frozen encoder says of a case; encoded anew, with other noise, in every window of steps."""
        key = (number, window)
        if key not in self._encoded:
            low, high = self.model.config.vision.taps
            views, extent = stack_views([self.cases[number]], np.random.default_rng((self.config.seed, *key)))
            views, extent = views.to(self.config.device), extent.to(self.config.device)
            maps = self.model.vision(views)
            facts, found = None, torch.zeros(0, 0, dtype=torch.bool)
            if self.model.scene is not None:
                logits = self.model.scene(views, maps)
                facts = self.model.scene.measure(views, logits, extent)
                found = self._found(logits[0], torch.from_numpy(self.cases[number].lesion_cells))
            self._encoded = {k: v for k, v in self._encoded.items() if k[1] == window}
            self._encoded[key] = EncodedCase(maps[low].half(), maps[high].half(), extent, facts, found)
        return self._encoded[key]

    def _found(self, logits: Tensor, findings: Tensor) -> Tensor:
        """Which slot (slots,) covers which finding (findings, d, h, w on the stem's grid)."""
        config = self.model.config
        share = torch.sigmoid(logits[len(config.scene_organs)].float()).cpu().numpy()
        found = torch.zeros(config.scene.lesions, len(findings), dtype=torch.bool)
        for slot, part in enumerate(lesion_parts(share, config.scene.threshold, config.scene.lesions)):
            cells = functional.adaptive_max_pool3d(torch.from_numpy(part)[None].float(), findings.shape[1:])[0] > 0
            for index, finding in enumerate(findings):
                found[slot, index] = slot_lies_on(cells, finding)
        return found

    def _image_tokens(self, encoded: Sequence[EncodedCase]) -> Tensor:
        low, high = self.model.config.vision.taps
        maps = [torch.empty(0)] * 5
        maps[low] = torch.cat([item.low.float() for item in encoded])  # autocast refuses to join halves
        maps[high] = torch.cat([item.high.float() for item in encoded])
        facts = [item.facts for item in encoded if item.facts is not None]
        scene = (
            SceneFacts(torch.cat([f.organs for f in facts]), torch.cat([f.lesions for f in facts])) if facts else None
        )
        tokens = self.model.project(maps, torch.cat([item.extent for item in encoded]), scene)
        if scene is None:
            return tokens
        seen = torch.ones(tokens.shape[:2], device=tokens.device)
        seen[torch.rand(len(encoded)) < self.config.blind_chance, : -self.model.config.scene_tokens] = 0
        return tokens * seen[..., None]

    def _fact_loss(self, tokens: Tensor, cases: Sequence[LanguageCase]) -> Tensor:
        targets = self.vocabulary.fact_targets(cases).to(tokens.device)
        loss = functional.binary_cross_entropy_with_logits(self.facts(tokens).float(), targets, reduction="none")
        return (loss * torch.where(targets > 0, 3.0, 1.0)).mean()


def train_language(
    config: LanguagePhaseConfig,
    model: VisionLanguage,
    cases: Sequence[LanguageCase],
    run: Path | None = None,
    report_progress: ReportProgress | None = None,
    surveyed: Sequence[LanguageCase] | None = None,
) -> LanguageResult:
    """Train ``model`` in place on top of its frozen encoder, or continue the run saved in the folder ``run``.

    ``report_progress`` receives the share done and a line of text; it may raise to stop (the state is saved first).
    ``surveyed`` cases give the list of facts (default: the first of ``cases``).
    Raises :class:`DataError` without cases.
    """
    if not cases:
        raise DataError("the language phase got no case; generate or load at least one")
    torch.manual_seed(config.seed)
    stage = LanguageTrainer(model, config, cases, surveyed).to(config.device)
    stage.fit_judge(run)
    trainer = TrainerConfig(
        steps=config.steps, warmup=config.warmup, seed=config.seed, device=config.device,
        precision="auto" if config.bfloat16 else "float32", accumulate=config.accumulate,
        checkpointing=config.checkpointing, save_steps=config.save_every, log_steps=config.save_every,
    )  # fmt: skip
    run_of = Trainer(stage, trainer, run, report_progress)
    run_of.run()
    return LanguageResult(model.eval(), run_of.history)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line: train on generated cases and write weights, tokenizer and metrics."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the result and the resumable state")
    parser.add_argument("--scene", type=Path, help="scene.safetensors of a finished scene phase")
    parser.add_argument("--cache", type=Path, help="folder of prepared cases (default: OUT/cache)")
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--lesion-rich", type=int, default=0, help="further cases with many lesions")
    parser.add_argument("--held-out", type=int, default=40)
    parser.add_argument("--start", type=Path, metavar="CHECKPOINT", help="checkpoint folder to go on from")
    parser.add_argument("--learning-rate", type=float, default=LanguagePhaseConfig.learning_rate)
    parser.add_argument("--blind", type=float, default=LanguagePhaseConfig.blind_chance, help="share without projector")
    parser.add_argument("--steps", type=int, default=0, help="instead of what --minutes allow")
    parser.add_argument("--minutes", type=float, default=40.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(arguments)
    if options.scene is None and options.start is None:
        parser.error("nothing to read volumes with; give --scene, --start or both")
    torch.set_num_threads(options.threads)
    ranks = Ranks.join(options.device)
    started = time.perf_counter()
    model_config = ModelConfig.tiny()
    cache = options.cache or options.out / "cache"
    seeds = range(options.seed + UNSEEN_SEED, options.seed + UNSEEN_SEED + options.cases)
    usual = CaseStore(seeds, model_config.vision, cache, wordings=_WORDINGS)
    cases: Sequence[LanguageCase] = usual
    if options.lesion_rich:
        first = options.seed + LESION_RICH_SEED + UNSEEN_SEED
        rich_seeds = range(first, first + options.lesion_rich)
        cases = JoinedCases(usual, CaseStore(rich_seeds, model_config.vision, cache, _WORDINGS, LESION_RICH))
    surveyed = CaseStore(range(min(_SURVEYED, options.cases)), model_config.vision, cache, wordings=_WORDINGS)[:]
    held_out = CaseStore(range(HELD_OUT_SEED, HELD_OUT_SEED + options.held_out), model_config.vision, cache)
    options.out.mkdir(parents=True, exist_ok=True)
    if options.start is None:
        tokenizer = build_tokenizer(surveyed, model_config.language.vocab_size)
    else:
        tokenizer = Tokenizer.load(options.start / "tokenizer.json")
    tokenizer.save(options.out / "tokenizer.json")
    config = LanguagePhaseConfig(
        seed=options.seed, device=options.device, learning_rate=options.learning_rate, blind_chance=options.blind
    ).within(options.minutes)
    if options.steps:
        config = replace(config, steps=options.steps)
    (options.out / "config.json").write_text(model_config.to_json(), encoding="utf-8")
    torch.manual_seed(options.seed)
    model = VisionLanguage(model_config, tokenizer)
    if options.start is not None:
        load_language(model, options.start)
    if options.scene is not None:
        load_scene(model, options.scene)
    training = time.perf_counter()
    result = train_language(config, model, cases, options.out, surveyed=surveyed)
    trained = time.perf_counter()
    if not ranks.first:
        return
    write_tensors(options.out / "vision_language.safetensors", model_state(result.model))
    scores = language_scores(result.model.cpu(), held_out)
    metrics = {
        "held_out": asdict(scores),
        "history": result.history,
        "config": asdict(config),
        "cases": len(cases),
        "held_out_cases": len(held_out),
        "seconds": {"data": training - started, "training": trained - training},
    }
    (options.out / "metrics.json").write_text(json.dumps(metrics, indent=2), encoding="utf-8")
    print(json.dumps(metrics["held_out"], indent=2))


if __name__ == "__main__":
    main()
