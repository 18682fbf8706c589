#!/usr/bin/env bash
# Makes the project ready to run: a virtual environment, PyTorch, the project and its dependencies.
#
#   bash scripts/setup.sh [--cpu] [EXTRA ...]       e.g.  bash scripts/setup.sh --cpu test
#
# The environment is the active one (venv or conda), else .venv beside this folder. --cpu, or
# TANGENT_CPU=1, takes a CPU-only PyTorch (200 MB instead of several GB). What is done is not done
# again. The last line on standard output is the Python to use; all else goes to standard error.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cpu=${TANGENT_CPU:-0}
extras=()
for word in "$@"; do
  case "$word" in
    --cpu) cpu=1 ;;
    -h | --help) sed -n '2,8p' "${BASH_SOURCE[0]}" | cut -c3-; exit 0 ;;
    -*) echo "error: unknown option $word; choose from --cpu" >&2; exit 2 ;;
    *) extras+=("$word") ;;
  esac
done
say() { echo "setup: $*" >&2; }

if [ -n "${VIRTUAL_ENV:-}" ] && [ -x "$VIRTUAL_ENV/bin/python" ]; then
  environment=$VIRTUAL_ENV
elif [ -n "${CONDA_PREFIX:-}" ] && [ "${CONDA_DEFAULT_ENV:-base}" != base ]; then
  environment=$CONDA_PREFIX
else
  environment=$root/.venv
fi
python=$environment/bin/python

if [ ! -x "$python" ]; then
  base=
  for candidate in python3 python3.13 python3.12 python3.11 python3.10 python; do
    if command -v "$candidate" >/dev/null 2>&1 &&
      "$candidate" -c 'import sys; raise SystemExit(sys.version_info < (3, 10))' 2>/dev/null; then
      base=$candidate
      break
    fi
  done
  if [ -z "$base" ]; then
    echo "error: expected Python 3.10 or newer on the PATH, found none" >&2
    exit 2
  fi
fi

key=$(cat "$root/pyproject.toml" <(echo "$root ${extras[*]:-} $cpu") | cksum | tr ' ' '-')
stamp=$environment/.tangent-arithmetic-$key
if [ -x "$python" ] && [ -f "$stamp" ]; then
  say "$environment is ready"
  echo "$python"
  exit 0
fi

if [ -x "$python" ] && ! "$python" -m pip --version >/dev/null 2>&1; then
  say "$environment has no pip"
  if ! "$python" -m ensurepip >/dev/null 2>&1; then
    echo "error: expected pip in $environment, and ensurepip cannot put it there; install it, such as by" \
      "'apt-get install python3-venv', and remove $environment if it is half made" >&2
    exit 2
  fi
fi
if ! "$python" -c 'import torch' >/dev/null 2>&1; then
  need=$([ "$cpu" = 1 ] && echo 3 || echo 9) # GB: packages, their archives while unpacking, data
  free=$(($(df -Pk "$root" | awk 'NR == 2 { print $4 }') / 1024 / 1024))
  if [ "$free" -lt "$need" ]; then
    echo "error: expected at least $need GB free at $root, found $free GB; make room" \
      "$([ "$cpu" = 1 ] || echo "or pass --cpu (TANGENT_CPU=1) for the small PyTorch")" >&2
    exit 2
  fi
fi
if [ ! -x "$python" ]; then
  say "making $environment with $base"
  "$base" -m venv "$environment"
fi
if [ "$cpu" = 1 ] && ! "$python" -c 'import torch, torchvision' >/dev/null 2>&1; then
  say "installing the CPU-only PyTorch"
  "$python" -m pip install --quiet --no-compile torch torchvision \
    --index-url https://download.pytorch.org/whl/cpu >&2
fi
name=$root
[ ${#extras[@]} -gt 0 ] && name="$root[$(IFS=,; echo "${extras[*]}")]"
say "installing the project and its dependencies (some minutes the first time)"
"$python" -m pip install --quiet --no-compile -e "$name" >&2
touch "$stamp"
say "$environment is ready"
echo "$python"
