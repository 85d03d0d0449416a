#!/usr/bin/env python
"""Write MODEL_CARD.md beside a checkpoint from its training record and the JSON of scripts/evaluate.py.

    scripts/model_card.py --checkpoint DIR --training training.json --figures generated.json real.json

Nothing in the card is typed by hand but the text below; every number comes from the files.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from medvl_sam2.checkpoint import ALIGNMENT_FOLDER, load_checkpoint, read_meta
from medvl_sam2.errors import CheckpointError, MedVLError
from medvl_sam2.evaluation.overview import overview
from medvl_sam2.vocabulary import CLASSES

INTRODUCTION = """# Model card: {name} ({version})

**Demo weights. Not for clinical use.** {notice}

{parameters:.1f} million parameters, stored as fp16 ({megabytes:.1f} MB), preset `tiny`. SHA-256 of the weights:
`{sha256}`.

## Data

- Generated CT-like studies with labels, reports, questions and referring sentences (`medvl_sam2.synthesis`): training
  seeds from 0, evaluation seeds from 2,000,000.
- {real}

## Training

Made with `scripts/train_demo.py` (seed {seed}; see the notes below) on {machine}.
Budgets are wall time, so steps differ between machines and
a second run gives similar, not equal, weights.

{phases}

## Vocabulary

{classes}. Text prompts were measured on the classes listed under *Semantic* below, and on no others.

## Measured

Each table comes from `scripts/evaluate.py`; interactive rows stand beside the same click loop without a network. Masks
marked as model output in the data's own documentation are not manual labels.
"""

IMAGE_TEXT = """
### Image-text model

The folder `alignment` ({parameters:.2f} million parameters, {megabytes:.1f} MB) is a SigLIP head over the scene of
these weights with a text tower of its own. {notice}
SHA-256 of its weights: `{sha256}`.

The rows of retrieval below count a hit for a volume's own report. Many generated reports say the same in other words,
and nothing in an image tells the words, so even knowing every fact would not reach 1. A model that sees nothing
scores the chance beside each row.
"""

REAL = (
    "Real volumes with masks (TotalSegmentator's test scans: one abdomen, one thorax, one MR slab, whose masks are the "
    "output of another model; a lumbar CT patch; one brain MR; three DeepLesion slabs), also deformed, and their label "
    "maps dressed in random intensities. Never trained on: the cases named in the real-data tables below."
)


def main() -> int:
    """Write the card; 2 with a message when a file is missing or of another kind."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--training", type=Path, required=True, help="training.json of scripts/train_demo.py")
    parser.add_argument("--figures", type=Path, nargs="+", required=True, help="JSON files of scripts/evaluate.py")
    options = parser.parse_args()
    try:
        card = compose(options.checkpoint, json.loads(options.training.read_text()), options.figures)
    except (OSError, json.JSONDecodeError, KeyError, MedVLError) as error:
        print(f"model_card: {error!r}", file=sys.stderr)
        return 2
    (options.checkpoint / "MODEL_CARD.md").write_text(card)
    print(f"wrote {options.checkpoint / 'MODEL_CARD.md'}")
    return 0


def compose(directory: Path, training: dict[str, Any], figures: list[Path]) -> str:
    """The card's text."""
    checkpoint = load_checkpoint(directory)
    head = INTRODUCTION.format(
        name=checkpoint.meta.name,
        version=checkpoint.meta.version,
        notice=checkpoint.meta.notice,
        parameters=_parameters(checkpoint.state) / 1e6,
        megabytes=(directory / "model.safetensors").stat().st_size / 1e6,
        sha256=checkpoint.meta.sha256,
        real=REAL if training["real_volumes"] else "No real volume.",
        seed=training["seed"],
        machine=training["machine"],
        phases="\n".join(_phases(training)),
        classes=", ".join(f"`{name}`" for name in CLASSES),
    )
    return head + _image_text(directory / ALIGNMENT_FOLDER) + "\n".join(_tables(path, directory) for path in figures)


def _image_text(folder: Path) -> str:
    """What the card says of the image-text model in ``folder``; nothing where there is none."""
    if not folder.is_dir():
        return ""
    beside = load_checkpoint(folder)
    megabytes = sum(path.stat().st_size for path in folder.iterdir()) / 1e6
    return IMAGE_TEXT.format(
        parameters=_parameters(beside.state) / 1e6, megabytes=megabytes, notice=beside.meta.notice,
        sha256=beside.meta.sha256,
    )  # fmt: skip


def _parameters(state: dict[str, Any]) -> int:
    tied = "language.lm.lm_head.weight"
    return sum(tensor.numel() for name, tensor in state.items() if name != tied and tensor.is_floating_point())


def _phases(training: dict[str, Any]) -> list[str]:
    segmentation, scene, joint = training["segmentation"], training["scene"], training["joint"]
    seconds = training["language"]["seconds"]
    if training.get("start"):
        begun = [f"- started from {training['start']}, whose segmenter only the joint phase moved"]
    else:
        begun = [
            f"- {part} phase: {segmentation[f'{part}_steps']:.0f} steps in "
            f"{segmentation[f'{part}_seconds'] / 60:.0f} min"
            for part in ("image", "memory")
        ]
    return [
        *begun,
        f"- scene phase: {scene['steps']:.0f} steps in {scene['seconds'] / 60:.0f} min; {_held_out(scene['held_out'])}",
        f"- language phase: {training['language']['cases']} cases, {seconds['training'] / 60:.0f} min",
        f"- joint phase: {joint['steps']:.0f} steps in {joint['seconds'] / 60:.0f} min",
        *[f"- {note}" for note in training.get("notes", [])],
    ]


def _held_out(scores: dict[str, float]) -> str:
    found, missed, extra = (int(scores[f"lesions_{kind}"]) for kind in ("found", "missed", "invented"))
    return (
        f"on held-out generated cases mean organ Dice {scores['mean']:.3f} on the map's own cells, lesions {found} "
        f"found, {missed} missed, {extra} invented"
    )


def _tables(path: Path, directory: Path) -> str:
    figures = json.loads(path.read_text())
    measured = {"weights_sha256": directory}
    if "retrieval" in figures:
        measured["image_text_sha256"] = directory / ALIGNMENT_FOLDER
    elif (directory / ALIGNMENT_FOLDER).is_dir():
        figures.get("skipped", {}).pop("retrieval", None)  # measured in a run of its own, after this one
    if any(figures.get(name) != read_meta(folder).sha256 for name, folder in measured.items()):
        raise CheckpointError(f"{path} was measured on other weights; run scripts/evaluate.py on this checkpoint")
    options = figures["options"]
    what = [f"{options['generated']} generated cases"] if options["generated"] != "0" else []
    what += [f"{options['text_cases']} further ones for the text tasks"] if options["text_cases"] != "0" else []
    what += ["the unseen real cases"] if options["real"] != "None" else []
    pool = int(options.get("retrieval_pool", "0"))
    what += [f"{pool} generated cases for retrieval"] if pool and "retrieval" in figures else []
    return f"\n### {', '.join(what)}\n\n```\n{overview(figures)}\n```\n"


if __name__ == "__main__":
    sys.exit(main())
