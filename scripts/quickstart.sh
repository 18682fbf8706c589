#!/usr/bin/env bash
# Sets everything up on a fresh machine and runs the whole benchmark on the embedded suite.
#
#   bash scripts/quickstart.sh [--quick] [--cpu] [flags of scripts/reproduce.py]
#
# Run again, it skips what is done. --quick is a cut-down version of a few minutes.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
setup=() rest=()
for word in "$@"; do
  if [ "$word" = --cpu ]; then setup+=("$word"); else rest+=("$word"); fi
done
python=$(bash "$root/scripts/setup.sh" "${setup[@]+"${setup[@]}"}" | tail -n 1)
cd "$root"
modes=standard,linear,linear+taujp # and zero-shot
exec "$python" scripts/reproduce.py --suite=embedded --modes="$modes" "${rest[@]+"${rest[@]}"}"
