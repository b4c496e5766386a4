# shellcheck shell=bash
# Sourced by the other scripts: makes the virtual environment once and installs what it needs.
# Usage: source launch/setup_venv.sh EXTRAS      (EXTRAS: "" or "[test]")
# VENV chooses the place (default .venv), PYTHON the interpreter (default python3).

VENV="${VENV:-.venv}"
if [ ! -x "$VENV/bin/python" ]; then
  "${PYTHON:-python3}" -m venv "$VENV"
fi
"$VENV/bin/python" - <<'PY'
import sys
if sys.version_info < (3, 11):
    sys.exit(f"caprl_jax needs Python 3.11 or newer, this is {sys.version.split()[0]}: "
             "set PYTHON to a newer one and remove the virtual environment")
PY
# Installed again only when what is asked for changes.
wanted="$(cat setup.cfg pyproject.toml | cksum) $1"
if [ "$(cat "$VENV/.caprl_installed" 2>/dev/null)" != "$wanted" ]; then
  "$VENV/bin/python" -m pip install --quiet --upgrade pip
  # Without setuptools' advice to those who write packages.
  PYTHONWARNINGS=ignore "$VENV/bin/python" -m pip install --quiet --editable ".$1"
  echo "$wanted" > "$VENV/.caprl_installed"
fi
