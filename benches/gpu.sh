#!/usr/bin/env bash
# Test and bench the operators on this node's GPU; benches/gpu.py says how, and takes the options.
#
#   bash benches/gpu.sh
#   sbatch --gres=gpu:1 --time=01:00:00 benches/gpu.sh --out "$PWD/figures"
#
# Installs nothing, asks nothing, needs no network and no terminal. Uses the python that comes first in PATH.
set -u

# a batch system runs a copy of this file from its own folder: the clone is then where the job was submitted
for place in "$(dirname "${BASH_SOURCE[0]:-$0}")" "$PWD/benches" "$PWD" \
  "${SLURM_SUBMIT_DIR:-.}/benches" "${SLURM_SUBMIT_DIR:-.}" "${PBS_O_WORKDIR:-.}/benches" "${PBS_O_WORKDIR:-.}"; do
  if [ -f "$place/gpu.py" ] && [ -f "$place/_gpu_costs.py" ]; then
    python=$(command -v python || command -v python3) || { echo "gpu.sh: there is no python in PATH" >&2; exit 2; }
    exec "$python" -u "$place/gpu.py" "$@" </dev/null
  fi
done
echo "gpu.sh: gpu.py is not beside this script; submit the job from the clone, or from its benches/" >&2
exit 2
