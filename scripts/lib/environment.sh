# Sourced by scripts/quickstart and scripts/test: one way to make the Python environment.
#
#   source scripts/lib/environment.sh
#   ensure_environment <repository root>      makes or updates the environment, sets MEDVL_PYTHON_BIN
#   timed <label> <command> [arguments...]    runs the command and prints how many seconds it took
#
# Settings, all optional:
#   MEDVL_VENV     where the environment lives (default: <repository root>/.venv)
#   MEDVL_PYTHON   the Python 3.11 to make it from (default: the first of python3.11, python3, python that is one)

# Pinned so that a machine without uv gets the resolver that requirements.txt was tested with.
MEDVL_UV_VERSION="0.13.9"

timed() {
    local label=$1 started=$SECONDS status=0
    shift
    printf '== %s\n' "$label"
    "$@" || status=$?
    printf '== %s: %s after %d s\n' "$label" "$([ "$status" -eq 0 ] && echo "done" || echo "FAILED")" "$((SECONDS - started))"
    return "$status"
}

# Prints the path of a Python 3.11, or explains on stderr what is missing.
_find_python() {
    local candidate found seen=""
    for candidate in ${MEDVL_PYTHON:+"$MEDVL_PYTHON"} python3.11 python3 python; do
        found=$("$candidate" -c 'import sys; print("%d.%d" % sys.version_info[:2], sys.executable)' 2>/dev/null) || continue
        if [ "${found%% *}" = "3.11" ]; then
            printf '%s\n' "${found#* }"
            return 0
        fi
        seen="$seen $candidate is ${found%% *};"
        # A Python named on purpose is not silently replaced by another one.
        [ "$candidate" != "${MEDVL_PYTHON:-}" ] || break
    done
    echo "error: Python 3.11 is needed and was not found (${seen:- no Python on PATH;} MONAI Label needs distutils," \
        "which 3.12 removed)." >&2
    echo "       Install Python 3.11, or point MEDVL_PYTHON at one: MEDVL_PYTHON=/path/to/python3.11 $0" >&2
    return 1
}

# Prints what the installed packages depend on: a change of it means installing again.
_environment_stamp() {
    local root=$1 python=$2
    "$python" - "$root" <<'PYTHON'
import hashlib
import pathlib
import sys

root = pathlib.Path(sys.argv[1])
digest = hashlib.sha256(f"{sys.version}\0{root.resolve()}\0".encode())
for name in ("requirements.txt", "pyproject.toml"):
    digest.update((root / name).read_bytes())
print(digest.hexdigest())
PYTHON
}

# Makes <venv> from Python 3.11, with uv inside unless the machine has one.
_create_venv() {
    local venv=$1 python
    python=$(_find_python) || return 1
    if command -v uv >/dev/null 2>&1; then
        uv venv --quiet --clear --python "$python" "$venv"
        return
    fi
    if ! "$python" -m venv --clear "$venv"; then
        echo "error: $python cannot make virtual environments; install its venv module" \
            "(Debian and Ubuntu: apt-get install python3.11-venv) or uv" >&2
        return 1
    fi
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "uv==$MEDVL_UV_VERSION"
}

_install_requirements() {
    local root=$1 venv=$2 uv quiet=--quiet
    [ ! -t 2 ] || quiet="" # progress bars for a person, two hundred fewer lines in a log
    uv=$(command -v uv || true)
    if [ -z "$uv" ]; then
        uv="$venv/bin/uv"
        [ -x "$uv" ] || "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "uv==$MEDVL_UV_VERSION" || return 1
    fi
    # `-e .` in requirements.txt is read against the working directory.
    (cd "$root" && "$uv" pip install $quiet --python "$venv/bin/python" -r requirements.txt)
}

# ensure_environment <repository root>: sets and exports MEDVL_PYTHON_BIN, puts the environment's bin/ first on PATH.
ensure_environment() {
    local root venv python stamp
    root=$(cd "$1" && pwd) || return 1
    venv=${MEDVL_VENV:-$root/.venv}
    case $venv in /*) ;; *) venv=$PWD/$venv ;; esac
    python="$venv/bin/python"

    # Python keeps what it compiled at the first import; without that every start costs tens of seconds more.
    unset PYTHONDONTWRITEBYTECODE

    if ! "$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null; then
        if [ -e "$venv" ] && [ ! -e "$venv/pyvenv.cfg" ] && [ -n "$(ls -A "$venv")" ]; then
            echo "error: $venv exists and is not a virtual environment; move it away or set MEDVL_VENV" >&2
            return 1
        fi
        timed "make the Python environment in $venv" _create_venv "$venv" || return 1
    fi

    stamp=$(_environment_stamp "$root" "$python") || return 1
    if [ "$(cat "$venv/medvl-stamp" 2>/dev/null)" != "$stamp" ]; then
        timed "install the packages of requirements.txt" _install_requirements "$root" "$venv" || return 1
        printf '%s\n' "$stamp" >"$venv/medvl-stamp"
    fi

    export PATH="$venv/bin:$PATH" # dcmqi's tools are looked up there
    export MEDVL_PYTHON_BIN="$python"
}
