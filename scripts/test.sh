#!/usr/bin/env bash
# Sets up what the tests need and runs them: lint, types, import contracts, tests with coverage.
#
#   bash scripts/test.sh [--slow] [--cpu] [arguments of pytest]
#
# --slow runs the slow tests too, --cpu sets up with a CPU-only PyTorch. With arguments for pytest only
# those tests are run.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
quick="not slow and not gpu and not network"
markers=$quick
setup=(test) rest=()
for word in "$@"; do
  case "$word" in
    --slow) markers="not gpu and not network" ;;
    --cpu) setup+=("$word") ;;
    *) rest+=("$word") ;;
  esac
done
python=$(bash "$root/scripts/setup.sh" "${setup[@]}" | tail -n 1)
cd "$root"
export OMP_NUM_THREADS=1 # the tests run in two processes
if [ ${#rest[@]} -gt 0 ]; then
  exec "$python" -m pytest -m "$markers" "${rest[@]}"
fi
"$python" -m ruff check .
"$python" -m ruff format --check .
"$python" -m mypy
"$(dirname "$python")/lint-imports"
"$python" -m pytest -q -m "$quick" -n 2 --cov --cov-report=term:skip-covered --cov-fail-under=90 --durations=20
if [ "$markers" != "$quick" ]; then
  exec "$python" -m pytest -q -m "slow and $markers" -n 2 --durations=40
fi
