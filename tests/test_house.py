"""Rules of the house that no linter knows: what may not stand in a file, and how large files may grow."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

from import_graph import imports_of

MAX_LINES = 450
MAX_WEIGHTS_BYTES = 25 * 1024 * 1024
MAX_FILE_BYTES = 25 * 1024 * 1024
WEIGHTS = {".safetensors", ".pt", ".pth", ".bin", ".onnx", ".npz"}

# Spelled in pieces, so that this file does not break its own rule.
FORBIDDEN_TEXT = {
    "a path of somebody's machine": re.compile(
        r"(?<![\w.~-])/(?:"
        + "|".join(("wor" + "k", "roo" + "t", "ho" + r"me/[a-z]\w*", "Use" + r"rs/[A-Za-z]\w*"))
        + r")(?![\w-])"
    ),
    "a registry host": re.compile(
        "|".join(("pypi" + r"\.(?:org|python\.org)", "python" + "hosted", "registry" + r"\.npmjs", "deb" + r"\.debian"))
        + r"|--(?:extra-)?index-url|--find-(?:links)"
    ),
    "a workplace's name": re.compile("|".join(("/opt/" + "wheels", "/opt/" + "pypi", "DESIGN" + r"\.md"))),
}
UNSAFE_LOADING = re.compile(
    r"\b(?:pickle|cloudpickle|dill|joblib)\.loads?\(|\ballow_pickle\s*=\s*True|\btorch\.load\((?P<call>[^\n]*)"
)


@pytest.fixture(scope="module")
def tracked(repository: Path) -> list[Path]:
    """Files that git tracks or would add: what the next commit can hold."""
    command = ["git", "-C", str(repository), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listing = subprocess.run(command, capture_output=True, check=True, text=True).stdout
    except (FileNotFoundError, subprocess.CalledProcessError) as error:
        pytest.skip(f"not a git checkout ({error}); the house rules are about tracked files")
    return [path for name in listing.split("\0") if name and (path := repository / name).is_file()]


@pytest.fixture(scope="module")
def texts(tracked: list[Path]) -> dict[Path, str]:
    found = {}
    for path in tracked:
        data = path.read_bytes()
        if b"\0" not in data[:8192]:
            found[path] = data.decode("utf-8")
    return found


@pytest.mark.parametrize("what", FORBIDDEN_TEXT)
def test_no_forbidden_text(texts: dict[Path, str], what: str) -> None:
    pattern = FORBIDDEN_TEXT[what]
    found = [f"{path}:{n}" for path, text in texts.items() for n, line in _lines(text) if pattern.search(line)]
    assert found == []


@pytest.mark.parametrize(
    ("what", "text", "forbidden"),
    [
        ("a path of somebody's machine", "open('/" + "work/main/x')", True),
        ("a path of somebody's machine", "cd /" + "home/jane/project", True),
        ("a path of somebody's machine", "see docs/" + "work/plan.md or the /" + "workflow", False),
        ("a path of somebody's machine", "GET /" + "roots", False),
        ("a registry host", "https://pypi" + ".org/simple", True),
        ("a registry host", "the registry's wheel", False),
    ],
)
def test_forbidden_text_is_recognised(what: str, text: str, forbidden: bool) -> None:
    assert bool(FORBIDDEN_TEXT[what].search(text)) is forbidden


def test_source_files_stay_short(texts: dict[Path, str]) -> None:
    sources = {
        path: text for path, text in texts.items() if path.suffix in {".py", ".sh"} or path.parent.name == "scripts"
    }
    assert [f"{path}: {n} lines" for path, text in sources.items() if (n := text.count("\n")) > MAX_LINES] == []


def test_weights_stay_small(tracked: list[Path]) -> None:
    assert sum(path.stat().st_size for path in tracked if path.suffix in WEIGHTS) <= MAX_WEIGHTS_BYTES
    assert [path for path in tracked if path.stat().st_size > MAX_FILE_BYTES] == []


def test_weights_are_safetensors(tracked: list[Path]) -> None:
    assert [path for path in tracked if path.suffix in {".pt", ".pth", ".bin", ".pkl", ".ckpt"}] == []


def test_no_unsafe_loading(texts: dict[Path, str]) -> None:
    sources = {path: text for path, text in texts.items() if path.suffix == ".py" and path != Path(__file__)}
    assert [f"{path}:{n}" for path, text in sources.items() for n, line in _lines(text) if _loads_unsafely(line)] == []


@pytest.mark.parametrize(
    ("line", "unsafe"),
    [
        ("state = torch.load(path)", True),
        ("state = torch.load(path, weights_only=False)", True),
        ("state = torch.load(path, map_location='cpu', weights_only=True)", False),
        ("data = pickle.load(stream)", True),
        ("numpy.load(path, allow_pickle=True)", True),
        ("json.load(stream)", False),
    ],
)
def test_unsafe_loading_is_recognised(line: str, unsafe: bool) -> None:
    assert _loads_unsafely(line) is unsafe


def test_requirements_pin_every_direct_dependency(repository: Path) -> None:
    lines = (repository / "requirements.txt").read_text(encoding="utf-8").splitlines()
    pins = {_normal(line.split("==")[0]) for line in lines if "==" in line}
    project = tomllib.loads((repository / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    direct = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    names = {_requirement_name(requirement) for requirement in direct}
    assert names - pins == set()
    assert lines[-1] == "-e ."
    assert [
        line for line in lines[:-1] if not line.startswith("#") and not re.match(r"[\w.-]+==[\w.]+(?: ; .+)?$", line)
    ] == []


def test_every_import_is_a_declared_dependency(tracked: list[Path], repository: Path) -> None:
    project = tomllib.loads((repository / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = {_requirement_name(r) for r in (*project["dependencies"], *project["optional-dependencies"]["dev"])}
    # Extras need not be installed, so nothing can tell which module they bring: the names must agree.
    extras = {_requirement_name(r) for group in project["optional-dependencies"].values() for r in group}
    local = [path for path in tracked if path.relative_to(repository).parts[0] in {"tests", "scripts"}]
    ours = {"medvl_sam2", "lib", "main"} | {path.stem for path in local} | {path.parent.name for path in local}
    providers = metadata.packages_distributions()
    undeclared = set()
    for path in tracked:
        if path.suffix != ".py":
            continue
        for wanted in imports_of(path.read_text(encoding="utf-8"), path.stem, is_package=False):
            top = wanted.module.split(".")[0]
            if top in sys.stdlib_module_names or top in ours:
                continue
            if _normal(top) not in extras and not {_normal(name) for name in providers.get(top, ())} & declared:
                undeclared.add(f"{path.relative_to(repository)}:{wanted.line} imports {top}")
    assert sorted(undeclared) == []


def test_every_package_folder_has_an_init(tracked: list[Path], repository: Path) -> None:
    package = repository / "model" / "medvl_sam2"
    folders = {path.parent for path in tracked if path.suffix == ".py" and path.is_relative_to(package)}
    assert [folder for folder in sorted(folders) if not (folder / "__init__.py").is_file()] == []


def test_app_folder_is_no_package(repository: Path) -> None:
    """An ``__init__.py`` there would shadow the real package whenever the working directory is apps/."""
    assert not (repository / "apps" / "medvl_sam2" / "__init__.py").exists()


def _loads_unsafely(line: str) -> bool:
    match = UNSAFE_LOADING.search(line)
    if match is None:
        return False
    call = match.group("call")
    return call is None or not re.search(r"weights_only\s*=\s*True", call)


def _lines(text: str) -> list[tuple[int, str]]:
    return list(enumerate(text.splitlines(), start=1))


def _requirement_name(requirement: str) -> str:
    return _normal(re.split(r"[<>=~!;\[ ]", requirement)[0])


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name.strip()).lower()
