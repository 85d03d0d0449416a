#!/usr/bin/env python
"""Make the demo weights: segmentation, scene, language and joint phase, checkpoint. Resumable; fixed seed.

    python scripts/train_demo.py --out runs/demo [--real ../shared/data] [--image-minutes 60 ...]

``--start CHECKPOINT`` goes on from finished weights instead: scene and language model are trained further, the
segmenter is taken as it is and meets them in the joint phase.

Everything is generated on the spot unless ``--real`` adds the trainable real volumes. Phases whose result lies in
``--out`` already are not run again. Budgets are wall minutes on this machine's threads
(the language phase turns them into steps); steps done are recorded.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from tqdm import tqdm

from medvl_sam2.checkpoint import CheckpointMeta, load_checkpoint, load_into, read_meta, save_checkpoint
from medvl_sam2.config import ModelConfig
from medvl_sam2.modeling.tokenizer import Tokenizer
from medvl_sam2.modeling.unified import UnifiedModel
from medvl_sam2.partial_weights import load_part
from medvl_sam2.training import language_phase, scene_phase, segmentation_phase
from medvl_sam2.training.finetune_stage import LanguageTokens
from medvl_sam2.training.joint_phase import JointConfig, JointPhase, SpokenVolume, spoken_case
from medvl_sam2.training.scene_looks import SceneLooks
from medvl_sam2.training.volume_sources import UNSEEN_SEED, SourceConfig, training_volumes

_STAND_IN_CASES = 6
NOTICE = (
    "Demo weights: about nine CPU hours on generated phantoms and a few public scans. Text answers are often wrong "
    "and were measured on phantoms only; the model card gives their accuracy. Not for clinical use."
)


def main() -> None:
    """Run what is missing and write the checkpoint."""
    options = _options()
    torch.set_num_threads(options.threads)
    out: Path = options.out
    segmentation, scene, language = out / "segmentation", out / "scene", out / "language"
    common = ["--cache", str(out / "cache"), "--seed", str(options.seed), "--threads", str(options.threads),
              "--device", options.device]  # fmt: skip
    if options.start:
        common += ["--start", str(options.start)]
    real = ["--real", str(options.real)] if options.real else []
    if not (segmentation / "done").exists() and not options.start:
        segmentation_phase.main(
            ["--out", str(segmentation), "--image-minutes", str(options.image_minutes), "--memory-minutes",
             str(options.memory_minutes), "--generated", str(options.generated), *common, *real]
        )  # fmt: skip
        (segmentation / "done").touch()
    if not (scene / "metrics.json").exists():
        scene_phase.main(["--out", str(scene), "--minutes", str(options.scene_minutes), *common, *real])
    if not (language / "vision_language.safetensors").exists():
        language_phase.main(
            ["--out", str(language), "--scene", str(scene / "scene.safetensors"), "--cases",
             str(options.language_cases), "--minutes", str(options.language_minutes), *common]
        )  # fmt: skip
    joint(options, segmentation, scene, language, out / "checkpoint")


def segmenter_of(model: UnifiedModel, segmentation: Path) -> torch.Tensor:
    """Load the segmenter of a finished segmentation phase; return its stand-in tokens (concepts, d_model)."""
    state = load_file(segmentation / "segmenter.safetensors")
    prefix = "segmenter."
    model.segmenter.load_state_dict({k[len(prefix) :]: v for k, v in state.items() if k.startswith(prefix)})
    return state["concept_tokens.weight"]


def segmenter_of_checkpoint(model: UnifiedModel, start: Path, cases: Sequence[SpokenVolume]) -> torch.Tensor:
    """Load the segmenter of a checkpoint; return what its own language side says of every concept, as stand-ins."""
    checkpoint = load_checkpoint(start)
    former = UnifiedModel(checkpoint.config, Tokenizer.load(checkpoint.tokenizer_path)).eval()
    load_into(former, checkpoint.state)
    model.segmenter.load_state_dict(former.segmenter.state_dict())
    tokens = LanguageTokens(former, np.random.default_rng(0))
    looks = SceneLooks(former, lambda number: cases[number].volume)
    tokens.fill_table([looks.of(number).tokens for number in range(min(_STAND_IN_CASES, len(cases)))])
    return tokens.table


def joint(options: argparse.Namespace, segmentation: Path, scene: Path, language: Path, checkpoint: Path) -> None:
    """Join the halves, train the seam and save the checkpoint."""
    config = ModelConfig.tiny()
    model = UnifiedModel(config, Tokenizer.load(language / "tokenizer.json"))
    trained = language / "vision_language.safetensors"
    load_part(model.language, load_file(trained), trained)
    first = options.seed + UNSEEN_SEED
    seeds = range(first, first + options.joint_cases)
    cases = [spoken_case(seed) for seed in tqdm(seeds, desc="spoken cases")]
    if options.start:
        stand_ins = segmenter_of_checkpoint(model, options.start, cases)
    else:
        stand_ins = segmenter_of(model, segmentation)
    volumes, weights = [*cases], [0.6 / len(cases)] * len(cases)
    if options.real:
        source = SourceConfig(generated=0, real=options.real, real_copies=16, label_copies=16, seed=options.seed)
        real, chances = training_volumes(source)
        named = [
            (v, w) for v, w in zip(real, chances, strict=True) if sum(t.concept is not None for t in v.targets) > 4
        ]
        total = sum(w for _, w in named)
        volumes += [SpokenVolume(v) for v, _ in named]
        weights += [0.4 * w / total for _, w in named]
    model.to(options.device)
    phase = JointPhase(
        JointConfig(minutes=options.joint_minutes, seed=options.seed), model, stand_ins, volumes, weights
    )  # fmt: skip
    figures = phase.run(checkpoint.parent / "joint")
    facts = {
        "start": None if options.start is None else read_meta(options.start).version,
        "segmentation": None if options.start else json.loads((segmentation / "progress.json").read_text()),
        "scene": json.loads((scene / "metrics.json").read_text()),
        "language": {k: v for k, v in json.loads((language / "metrics.json").read_text()).items() if k != "history"},
        "joint": figures,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} torch threads, torch {torch.__version__}, "
        + options.device,
        "real_volumes": bool(options.real),
        "seed": options.seed,
    }
    meta = CheckpointMeta(name="medvl-sam2-tiny-demo", version="demo-4", notice=NOTICE)
    save_checkpoint(checkpoint, model.cpu().state_dict(), config, language / "tokenizer.json", meta, overwrite=True)
    (checkpoint.parent / "training.json").write_text(json.dumps(facts, indent=2))
    (checkpoint.parent / "joint" / "joint_resume.safetensors").unlink(missing_ok=True)  # done: the next run begins anew
    print(f"checkpoint written to {checkpoint}; measure it with scripts/evaluate.py --checkpoint {checkpoint}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--start", type=Path, metavar="CHECKPOINT", help="checkpoint folder to go on from")
    parser.add_argument("--real", type=Path, help="folder with the trainable real cases; generated data only without")
    parser.add_argument("--image-minutes", type=float, default=110.0)
    parser.add_argument("--memory-minutes", type=float, default=34.0)
    parser.add_argument("--scene-minutes", type=float, default=165.0)
    parser.add_argument("--language-minutes", type=float, default=75.0)
    parser.add_argument("--joint-minutes", type=float, default=40.0)
    parser.add_argument("--generated", type=int, default=300)
    parser.add_argument("--language-cases", type=int, default=2000)
    parser.add_argument("--joint-cases", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    return parser.parse_args()


if __name__ == "__main__":
    main()
