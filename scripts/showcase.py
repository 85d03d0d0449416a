#!/usr/bin/env python
"""One picture a task on one volume, and the text answers: what a person sees of the model, without a server.

    scripts/showcase.py ../shared/data/ts_ct_wholeabdomen_3mm/ct.nii.gz --out pictures --box 60,20,50,90,60,80

Writes interactive.png, semantic.png, referring.png and answers.json. ``--truth MASK --structure NAME`` draws the true
outline of a structure beside the interactive mask, prompts with its box and five simulated clicks, and gives the Dice.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
from computing import add_model_options, computing, load_predictor, use_threads

from medvl_sam2.errors import MedVLError, PromptError
from medvl_sam2.evaluation.metrics import dice
from medvl_sam2.evaluation.pictures import draw
from medvl_sam2.files import write_json_atomically
from medvl_sam2.geometry import CanonicalTransform
from medvl_sam2.predictor import Predictor, Session
from medvl_sam2.training.clicks import box_prompt, next_click
from medvl_sam2.types import Prompt, Volume
from medvl_sam2.volume_io import read_mask, read_volume

QUESTIONS = ("Is there a lesion in the liver?", "Is the spleen visible?", "Which contrast phase is this?")


def main() -> int:
    """Draw and answer; 0 on success, 2 with a message on a bad input."""
    options = _options()
    use_threads(options)
    try:
        predictor = load_predictor(options)
        volume = read_volume(options.image)
        session = predictor.open(volume)
        options.out.mkdir(parents=True, exist_ok=True)
        score = _interactive(options, predictor, session, volume)
        classes = [name for name in options.classes.split(",") if name]
        semantic = predictor.segment_classes(session, classes)
        draw(options.out / "semantic.png", volume, semantic.mask, "medvl_semantic", semantic.names)
        referred = predictor.segment_text(session, options.prompt)
        title = f"medvl_referring: {options.prompt}"
        draw(options.out / "referring.png", volume, referred.mask, title, referred.names, text=referred.text or "")
        answers = {question: predictor.answer(session, question).text for question in QUESTIONS}
        report = predictor.report(session)
    except MedVLError as error:
        print(f"showcase: {error}", file=sys.stderr)
        return 2
    record = {
        "image": options.image.name,
        "weights": predictor.meta.name,
        "computing": computing(predictor),
        "notice": report.notice,
        "interactive_dice": score,
        "semantic_voxels": {n: int((semantic.mask == v).sum()) for v, n in enumerate(semantic.names, 1)},
        "referring": {
            "prompt": options.prompt,
            "reply": referred.text,
            "voxels": int(referred.mask.astype(bool).sum()),
        },
        "answers": answers,
        "report": report.text,
    }
    write_json_atomically(options.out / "answers.json", record)
    print(json.dumps(record, indent=2))
    return 0


def _interactive(options: argparse.Namespace, predictor: Predictor, session: Session, volume: Volume) -> float | None:
    """Prompt by the given box, or by a true structure's box and five simulated clicks; returns the Dice if known."""
    truth, score = None, None
    if options.truth is not None:
        labels, _ = read_mask(options.truth, volume.geometry)
        truth = labels == options.structure
        transform = CanonicalTransform(volume.geometry)
        canonical = np.ascontiguousarray(transform.forward_array(truth))
        prompt = Prompt(box=transform.inverse_box(box_prompt(canonical)))
        result = predictor.segment_prompt(session, prompt, "showcase")
        for _ in range(5):
            click = next_click(canonical, np.ascontiguousarray(transform.forward_array(result.mask)) > 0)
            if click is None:
                break
            point = transform.inverse_points(np.array([click.position]))
            prompt = Prompt(
                np.concatenate([prompt.points, point]), np.append(prompt.labels, click.label), box=prompt.box
            )
            result = predictor.segment_prompt(session, prompt, "showcase")
        score = float(dice(result.mask > 0, truth))
    elif options.box is not None:
        numbers = [float(n) for n in options.box.split(",")]
        if len(numbers) != 6:
            raise PromptError(f"box {options.box!r} needs six numbers i0,j0,k0,i1,j1,k1")
        prompt = Prompt(box=np.array(numbers).reshape(2, 3))
        result = predictor.segment_prompt(session, prompt, "showcase")
    else:
        raise PromptError("nothing to prompt with; give --box i0,j0,k0,i1,j1,k1 or --truth MASK --structure VALUE")
    title = "medvl_interactive" + (f": Dice {score:.3f} after 5 clicks" if score is not None else "")
    draw(options.out / "interactive.png", volume, result.mask, title, ("object",), truth=truth, prompt=prompt)
    return score


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("image", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    add_model_options(parser, threads=2)
    parser.add_argument("--box", help="i0,j0,k0,i1,j1,k1 in stored voxels")
    parser.add_argument("--truth", type=Path, help="label map with the true structure")
    parser.add_argument("--structure", type=int, default=1, help="its value in the label map")
    parser.add_argument("--classes", default="", help="classes of the semantic picture, comma separated (default: all)")
    parser.add_argument("--prompt", default="the right kidney", help="sentence of the referring picture")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
