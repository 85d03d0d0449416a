"""The generator: the same seed gives the same study, and every word of its texts is true of the voxels."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

from medvl_sam2.errors import ConfigError, DataError
from medvl_sam2.synthesis import (
    Case,
    GeneratorConfig,
    augment_real,
    generate_case,
    report_findings,
    synthesise_from_labels,
)
from medvl_sam2.vocabulary import CLASSES, class_value, spoken

SEEDS = range(100, 130)


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    return [generate_case(seed) for seed in SEEDS]


@pytest.fixture(scope="module")
def whole() -> list[Case]:
    config = GeneratorConfig(slab_probability=0.0, crop_probability=0.0, removed_probability=0.0)
    return [generate_case(seed, config) for seed in range(6)]


def value(name: str) -> int:
    number = class_value(name)
    assert number is not None
    return number


def fingerprint(case: Case) -> str:
    digest = hashlib.sha256()
    for array in (case.image, case.organs, case.lesions):
        digest.update(np.ascontiguousarray(array).tobytes())
    digest.update(repr((case.report, case.qa, case.referring, case.findings)).encode())
    return digest.hexdigest()


def test_same_seed_gives_the_same_study_in_another_process(cases: list[Case], repository: Path) -> None:
    script = (
        "import hashlib, numpy as np\n"
        "from medvl_sam2.synthesis import generate_case\n"
        "case = generate_case(100)\n"
        "digest = hashlib.sha256()\n"
        "for array in (case.image, case.organs, case.lesions):\n"
        "    digest.update(np.ascontiguousarray(array).tobytes())\n"
        "digest.update(repr((case.report, case.qa, case.referring, case.findings)).encode())\n"
        "print(digest.hexdigest())\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(repository / "model"), "PYTHONHASHSEED": "77"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == fingerprint(cases[0])
    assert fingerprint(generate_case(100)) == fingerprint(cases[0])
    assert fingerprint(cases[1]) != fingerprint(cases[0])


def test_arrays_fit_together(cases: list[Case]) -> None:
    for case in cases:
        assert case.image.dtype == np.int16
        assert case.image.shape == case.labels.shape == case.organs.shape == case.lesions.shape
        np.testing.assert_array_equal(case.labels == value("lesion"), case.lesions > 0)
        np.testing.assert_array_equal(case.labels[case.lesions == 0], case.organs[case.lesions == 0])
        assert not (case.organs == value("lesion")).any()
        assert set(np.unique(case.lesions)) - {0} == {f.value for f in case.findings}
    assert any(len(set(case.image.shape)) == 3 for case in cases), "no study with three different axes"


def test_volume_is_right_handed_to_the_patient(cases: list[Case]) -> None:
    volume = cases[0].volume()
    base = volume.geometry.voxel_to_world(np.zeros((1, 3)))[0]
    steps = volume.geometry.voxel_to_world(np.eye(3)) - base
    sz, sy, sx = cases[0].spacing
    # RAS+ world: up is +z, posterior is -y, left is -x.
    np.testing.assert_allclose(steps, [[0, 0, sz], [0, -sy, 0], [-sx, 0, 0]])


def test_organs_lie_on_their_side(whole: list[Case]) -> None:
    for case in whole:
        middle = np.argwhere(case.organs == value("spinal_cord")).mean(0)
        place = {
            name: np.argwhere(case.organs == value(name)).mean(0)
            for name in ("liver", "spleen", "kidney_right", "kidney_left", "lung_right", "lung_left", "stomach")
            if (case.organs == value(name)).sum() > 60
        }
        for name, (_, y, x) in place.items():
            assert (x < middle[2]) == (name in ("liver", "kidney_right", "lung_right")), (case.seed, name)
            assert y < middle[1], f"{name} of seed {case.seed} lies behind the spinal cord"


def test_attenuation_is_that_of_ct(whole: list[Case]) -> None:
    for case in whole:
        clean = case.lesions == 0
        means = {
            name: float(np.median(case.image[(case.organs == value(name)) & clean]))
            for name in ("liver", "lung_left", "aorta", "vertebrae")
        }
        assert -900 < means["lung_left"] < -600
        assert 35 < means["liver"] < 140
        assert means["vertebrae"] > 150
        assert (means["aorta"] > 80) == (case.phase != "non-contrast")


def test_every_finding_has_its_lesion(cases: list[Case]) -> None:
    assert sum(len(case.findings) for case in cases) > 15
    for case in cases:
        for finding in case.findings:
            lesion = case.lesions == finding.value
            assert set(np.unique(case.organs[lesion])) == {value(finding.organ)}
            np.testing.assert_allclose(np.argwhere(lesion).mean(0), finding.center_zyx)
            volume = lesion.sum() * np.prod(case.spacing)
            assert finding.diameter_mm == pytest.approx((6 * volume / np.pi) ** (1 / 3))
            assert spoken(finding.organ) in finding.location
            assert finding.location in case.report
            inside = float(np.median(case.image[lesion]))
            # Away from the border, where partial volume with fat blurs the comparison.
            around = ndimage.binary_erosion(case.organs == value(finding.organ)) & (case.lesions == 0)
            outside = float(np.median(case.image[around]))
            brighter = finding.kind in ("hyperdense lesion", "nodule")
            assert (inside > outside) == brighter, (case.seed, finding)
            assert abs(inside - outside) >= 25, (case.seed, finding)


def test_removed_organs_have_no_voxels(cases: list[Case]) -> None:
    removed = [(case, name) for case in cases for name in case.removed]
    assert removed
    for case, name in removed:
        assert not (case.organs == value(name)).any()
        assert f"The {spoken(name)} is absent." in case.report
        assert not any(value(name) in r.values for r in case.referring if r.kind == "class")


def test_report_reads_back_as_the_ground_truth(cases: list[Case]) -> None:
    for case in cases:
        truth = {(f.organ, f.kind) for f in case.findings} | {(name, "absent") for name in case.removed}
        assert report_findings(case.report) == truth
        _, _, impression = case.report.partition("Impression:")
        assert report_findings(f"Impression:{impression}") == truth


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", set()),
        ("The liver, spleen and left kidney are normal. Impression: no focal lesion.", set()),
        ("no lesion in the liver and spleen", set()),
        ("There is a 2.5 cm cyst in the lower pole of the left kidney.", {("kidney_left", "cyst")}),
        ("A HYPODENSE LESION of 3.0 cm lies in the left lobe of the liver", {("liver", "hypodense lesion")}),
        ("the gallbladder is absent; nodule in the upper lobe of the right lung",
         {("gallbladder", "absent"), ("lung_right", "nodule")}),
        ("Impression: cyst in the liver and cyst in the spleen.", {("liver", "cyst"), ("spleen", "cyst")}),
    ],
)  # fmt: skip
def test_report_parser_on_loose_text(text: str, expected: set[tuple[str, str]]) -> None:
    assert report_findings(text) == expected


def test_questions_are_true_and_balanced(cases: list[Case]) -> None:
    answers: dict[str, list[bool]] = {"presence": [], "visibility": []}
    for case in cases:
        ill = {spoken(f.organ) for f in case.findings}
        for qa in case.qa:
            if qa.choices:
                letter, _, text = qa.answer.partition(". ")
                assert qa.choices["ABCDEFGH".index(letter)] == text
                assert len(set(qa.choices)) == len(qa.choices)
                assert f"{letter}. {text}" in qa.prompt
            if qa.kind in answers:
                answers[qa.kind].append(qa.answer == "A. yes")
            if qa.kind == "presence":
                assert any(f"in the {name}?" in qa.question for name in ill) == (qa.answer == "A. yes")
            if qa.kind == "visibility":
                name = qa.question.removeprefix("Is the ").removesuffix(" visible?")
                number = next(n for n, c in enumerate(CLASSES, 1) if spoken(c) == name)
                assert (case.organs == number).any() == (qa.answer == "A. yes")
    for kind, given in answers.items():
        assert 0.35 < np.mean(given) < 0.65, f"{kind}: {np.mean(given):.2f} of {len(given)} answers are yes"


def test_referring_sentences_mean_what_they_say(cases: list[Case]) -> None:
    for case in cases:
        for referring in case.referring:
            target = case.target(referring)
            assert target.shape == case.image.shape
            assert target.any(), referring
        sizes = {f.value: f.diameter_mm for f in case.findings}
        by_text = {r.text: r.values for r in case.referring if r.kind == "lesion"}
        for text, ids in by_text.items():
            group = [
                f
                for f in case.findings
                if text.rstrip("?").endswith((f"in the {f.location}", f"in the {spoken(f.organ)}"))
            ]
            pool = [f.value for f in group] or list(sizes)
            assert set(ids) <= set(pool), text
            if "largest" in text:
                assert sizes[ids[0]] == max(sizes[v] for v in pool)
            if "smallest" in text:
                assert sizes[ids[0]] == min(sizes[v] for v in pool)
        if case.findings:
            assert set(by_text["all lesions"]) == set(sizes)


def test_impossible_config_is_refused() -> None:
    with pytest.raises(ConfigError, match="sum to 1"):
        GeneratorConfig(lesion_counts=(0.5, 0.2))
    with pytest.raises(ConfigError, match="phases"):
        GeneratorConfig(phases=("delayed",))


def block_labels() -> np.ndarray:
    labels = np.zeros((24, 30, 36), dtype=np.int16)
    labels[4:20, 6:24, 3:15] = 5
    labels[6:18, 8:20, 22:33] = 9
    return labels


def test_synthesise_from_labels_deforms_and_keeps_sides() -> None:
    labels = block_labels()
    images = []
    for seed in range(8):
        image, moved = synthesise_from_labels(labels, (4.0, 3.0, 2.5), seed, {5: "liver"})
        assert image.shape == moved.shape
        assert moved.dtype == labels.dtype
        assert all(m >= 0.6 * n for m, n in zip(moved.shape, labels.shape, strict=True))
        assert set(np.unique(moved)) <= {0, 5, 9}
        if (moved == 5).any() and (moved == 9).any():
            assert np.argwhere(moved == 5)[:, 2].mean() < np.argwhere(moved == 9)[:, 2].mean()
        images.append(image)
    again, _ = synthesise_from_labels(labels, (4.0, 3.0, 2.5), 3, {5: "liver"})
    np.testing.assert_array_equal(images[3], again)


def test_augment_real_keeps_image_and_labels_together() -> None:
    labels = block_labels()
    image = np.where(labels == 5, 120, np.where(labels == 9, -200, 0)).astype(np.int16)
    for seed in range(6):
        out, moved = augment_real(image, labels, (4.0, 3.0, 2.5), seed)
        assert out.shape == moved.shape
        assert out.dtype == np.float32
        means = [float(out[moved == v].mean()) for v in (9, 0, 5)]
        assert means == sorted(means), "the label no longer lies on its structure"
    np.testing.assert_array_equal(augment_real(image, labels, (4.0, 3.0, 2.5), 5)[0], out)


def test_contrast_agent_reaches_named_organs_only() -> None:
    labels = block_labels()
    image = np.full(labels.shape, 40, dtype=np.int16)
    image[:, :2] = -1000
    image[:, -2:] = 400
    spacing, enhanced = (4.0, 3.0, 2.5), 0
    for seed in range(10):
        plain, _ = augment_real(image, labels, spacing, seed, per_class=False)
        out, moved = augment_real(image, labels, spacing, seed, per_class=False, names={5: "aorta", 9: "lung_left"})
        inside = ndimage.binary_erosion(moved == 5, iterations=2)
        added = float(out[inside].mean() - plain[inside].mean())
        enhanced += added > 60
        assert added > 60 or abs(added) < 5
        air = ndimage.binary_erosion(moved == 9, iterations=2)
        assert abs(float(out[air].mean() - plain[air].mean())) < 5
    assert 2 <= enhanced <= 8, "about half of the draws get contrast agent"


def test_label_maps_that_do_not_fit_are_refused() -> None:
    with pytest.raises(DataError, match="integer"):
        synthesise_from_labels(np.zeros((4, 4, 4)), (1.0, 1.0, 1.0), 0)
    with pytest.raises(DataError, match="differ in shape"):
        augment_real(np.zeros((4, 4, 5)), np.zeros((4, 4, 4), dtype=np.uint8), (1.0, 1.0, 1.0), 0)
