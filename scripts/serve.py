"""Start MONAI Label's server with this app and with settings that make today's versions run, offline.

    python scripts/serve.py --studies DIR_OR_DICOMWEB_URL [--host 127.0.0.1] [--port 8000] [--conf NAME VALUE ...]

Further arguments go to ``monailabel start_server`` unchanged (``--conf retrain_every_labels 5``, ``--ssl_keyfile``).
A setting that the environment already has wins over the ones made here.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
APP = ROOT / "apps" / "medvl_sam2"


def settings(app: Path) -> dict[str, str]:
    """Environment the server and its training and scoring processes need, where nothing else is set."""
    data = app / "model"
    return {
        # Every scoring method after every next-sample, each in a process of its own: not on an annotator's laptop.
        "MONAI_LABEL_AUTO_UPDATE_SCORING": "false",
        # MLflow refuses the file store MONAI Label would choose.
        "MONAI_LABEL_TRACKING_URI": f"sqlite:///{data / 'tracking.db'}",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        # The default folder is shared by all apps of a user, and one damaged session there stops every start.
        "MONAI_LABEL_SESSION_PATH": str(data / "sessions"),
        "MONAI_LABEL_DATASTORE_FILE_EXT": '["*.nii.gz", "*.nii", "*.nrrd"]',
        # Two hours by default, for which new studies and fresh labels stay unseen.
        "MONAI_LABEL_DICOMWEB_CACHE_EXPIRY": "5",
        # Only CT by default.
        "MONAI_LABEL_DICOMWEB_SEARCH_FILTER": json.dumps({"Modality": "CT\\MR"}),
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
    }


def prepare(app: Path) -> None:
    """Set the environment: settings, the interpreter's own tools first on PATH (dcmqi), import paths."""
    for name, value in settings(app).items():
        os.environ.setdefault(name, value)
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    present = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys([str(ROOT / "model"), *present]))
    sys.path[:0] = [str(app), str(ROOT / "model")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", required=True, help="folder of volumes, or address of a DICOMweb server")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--app", type=Path, default=APP, help=argparse.SUPPRESS)
    args, further = parser.parse_known_args()

    app = args.app.resolve()
    prepare(app)
    from monailabel.main import Main

    sys.argv = [
        *("monailabel", "start_server", "--app", str(app), "--studies", args.studies),
        *("--host", args.host, "--port", str(args.port), "--uvicorn_app", "lib.server:app", *further),
    ]
    Main().run()


if __name__ == "__main__":
    main()
