"""Reports and answers as structured reports."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
from highdicom.sr import EnhancedSR, srread
from pydicom.dataset import Dataset

from app.fake_dicomweb import FakeDicomWeb, Open
from app.phantom import phantom, write
from app.segs import reread
from lib.dicom_seg import LabelOrigin, build_segmentation
from lib.dicom_sr import Report, StoredReport, build_report_sr, report_text, store_report_sr
from medvl_sam2.errors import DataError

TEXT = "Leber: Läsion in Segment VI.\nMilz: unauffällig."
REPORT = Report("report", TEXT, "reader1", "demo-4", structures=("liver", "spleen"), version=2)


def headers(folder: Path, **tags: object) -> list[Dataset]:
    return write(folder, phantom(), **tags)[1]


def items(document: Dataset, kind: str) -> list[Dataset]:
    """All content items of a value type, by depth first."""
    found = []
    for item in document.get("ContentSequence", []):
        found += [item] if item.ValueType == kind else []
        found += items(item, kind)
    return found


def test_report_is_an_enhanced_sr_beside_its_images(tmp_path: Path) -> None:
    source = headers(tmp_path / "s", SpecificCharacterSet="ISO_IR 100", PatientName="Müller^Jörg")
    build_report_sr(source, REPORT).save_as(tmp_path / "report.dcm")
    document = srread(tmp_path / "report.dcm")
    assert isinstance(document, EnhancedSR)
    assert report_text(document) == TEXT
    assert document.StudyInstanceUID == source[0].StudyInstanceUID
    assert document.SeriesInstanceUID != source[0].SeriesInstanceUID
    assert (str(document.PatientName), document.Modality) == ("Müller^Jörg", "SR")
    assert document.SeriesDescription == "MedVL-SAM2 report version 2"
    evidence = document.PertinentOtherEvidenceSequence[0].ReferencedSeriesSequence[0].ReferencedSOPSequence
    assert [item.ReferencedSOPInstanceUID for item in evidence] == [item.SOPInstanceUID for item in source]


def test_both_observers_are_named(tmp_path: Path) -> None:
    source = headers(tmp_path / "s")
    drafted = reread(build_report_sr(source, REPORT))
    assert [str(item.PersonName) for item in items(drafted, "PNAME")] == ["reader1^"]
    assert "demo-4" in [item.TextValue for item in items(drafted, "TEXT")]
    by_hand = reread(build_report_sr(source, Report("report", TEXT, "Doe^Jane")))
    assert [str(item.PersonName) for item in items(by_hand, "PNAME")] == ["Doe^Jane"]
    assert len(items(by_hand, "UIDREF")) == 0


def test_report_is_verified_only_when_somebody_says_so(tmp_path: Path) -> None:
    source = headers(tmp_path / "s")
    draft = build_report_sr(source, REPORT)
    assert (draft.VerificationFlag, draft.PreliminaryFlag) == ("UNVERIFIED", "PRELIMINARY")
    signed = build_report_sr(source, Report("report", TEXT, "Doe^Jane", verified=True, organization="Clinic"))
    assert (signed.VerificationFlag, signed.PreliminaryFlag) == ("VERIFIED", "FINAL")
    observer = signed.VerifyingObserverSequence[0]
    assert (str(observer.VerifyingObserverName), observer.VerifyingOrganization) == ("Doe^Jane", "Clinic")


def test_answer_states_its_question(tmp_path: Path) -> None:
    answer = Report("answer", "Yes.", "reader1", "demo-4", question="Is there a lesion?")
    document = reread(build_report_sr(headers(tmp_path / "s"), answer))
    sections = [item for item in document.ContentSequence if item.ValueType == "CONTAINER"]
    assert [s.ConceptNameCodeSequence[0].CodeMeaning for s in sections] == ["Request", "Findings"]
    assert sections[0].ContentSequence[0].TextValue == "Is there a lesion?"
    assert report_text(document) == "Yes."


def test_text_rests_on_the_segments_it_names(tmp_path: Path) -> None:
    source = headers(tmp_path / "s")
    names = {2: "kidney_right", 5: "Liver", 17: "lesion"}
    seg = build_segmentation(source, phantom().labels, names, LabelOrigin("reader1"))
    document = reread(build_report_sr(source, REPORT, seg))
    reference = items(document, "IMAGE")[0].ReferencedSOPSequence[0]
    assert reference.ReferencedSOPInstanceUID == seg.SOPInstanceUID
    assert reference.ReferencedSegmentNumber == 2
    current = document.CurrentRequestedProcedureEvidenceSequence[0].ReferencedSeriesSequence[0]
    assert current.ReferencedSOPSequence[0].ReferencedSOPInstanceUID == seg.SOPInstanceUID
    unnamed = build_report_sr(source, Report("report", TEXT, "reader1", structures=("spleen",)), seg)
    assert not items(unnamed, "IMAGE")


def test_next_version_names_the_one_before(tmp_path: Path) -> None:
    source = headers(tmp_path / "s")
    first = build_report_sr(source, REPORT)
    before = StoredReport(str(first.StudyInstanceUID), str(first.SeriesInstanceUID), str(first.SOPInstanceUID))
    second = build_report_sr(source, Report("report", "Better.", "reader2", replaces=before))
    reference = second.PredecessorDocumentsSequence[0].ReferencedSeriesSequence[0].ReferencedSOPSequence[0]
    assert reference.ReferencedSOPInstanceUID == first.SOPInstanceUID


def test_a_report_made_again_is_the_same_object(tmp_path: Path) -> None:
    source, made = headers(tmp_path / "s"), datetime(2024, 2, 29, 12, 30, 1, 500_000, UTC)
    first, again, newer = (
        build_report_sr(source, replace(REPORT, made=made, version=version)) for version in (1, 1, 2)
    )
    assert reread(first) == reread(again)
    assert {first.SOPInstanceUID, first.SeriesInstanceUID}.isdisjoint({newer.SOPInstanceUID, newer.SeriesInstanceUID})


def test_empty_report_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="report is empty"):
        build_report_sr(headers(tmp_path / "s"), Report("report", " \n", "reader1"))


def test_report_waits_while_the_server_does_not_answer(tmp_path: Path, open_store: Open, server: FakeDicomWeb) -> None:
    series, source, _ = write(tmp_path / "s", phantom())
    server.add(series)
    store = open_store()
    store.get_image_uri(series.series)
    server.down = True
    stored = store_report_sr(store, series.series, REPORT)
    assert "nobody answers" in stored.waiting
    server.down = False
    store.datalist()
    document = server.held[stored.instance]
    assert report_text(document) == TEXT
    assert (stored.study, stored.series) == (document.StudyInstanceUID, document.SeriesInstanceUID)
    assert document.StudyInstanceUID == source[0].StudyInstanceUID
