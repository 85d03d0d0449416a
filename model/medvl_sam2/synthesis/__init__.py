"""Training data without downloads: generated studies with text, and volumes synthesised from label maps."""

from medvl_sam2.synthesis.case import GeneratorConfig, generate_case
from medvl_sam2.synthesis.label_map import augment_real, synthesise_from_labels
from medvl_sam2.synthesis.language import REPORTED, report_findings
from medvl_sam2.synthesis.records import QA, Case, Finding, Referring
from medvl_sam2.synthesis.tissues import PHASES

__all__ = [
    "PHASES",
    "QA",
    "REPORTED",
    "Case",
    "Finding",
    "GeneratorConfig",
    "Referring",
    "augment_real",
    "generate_case",
    "report_findings",
    "synthesise_from_labels",
]
