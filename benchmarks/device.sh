#!/usr/bin/env bash
# Everything worth measuring on a borrowed NVIDIA GPU, within twelve minutes:
#
#     benchmarks/device.sh [FOLDER]        # by default benchmarks/results/device
#
# Each step has a time of its own, writes a JSON file, and ends no other; summary.json says what
# became of each. All 36 layers run by torch; ONNX Runtime and TensorRT run the demo and two layers of
# full width, since an export of all takes longer than the machine is lent. Needs a checkout with `pip install -e '.[export,gpu]'`. Where no GPU answers, it
# says so and measures nothing. With EDGE_VLM_DEVICE_TRY=1 it runs the same steps, tiny and on the
# CPU: that is how it is tested.
set -u
cd "$(dirname "$0")/.."
out=$(realpath -m "${1:-benchmarks/results/device}")
python=${PYTHON:-python}
try=${EDGE_VLM_DEVICE_TRY:-}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
mkdir -p "$out"

if [ -z "$try" ] && ! "$python" -c 'from edge_vlm_runtime.engines.cuda import Cuda; print(Cuda().gpu)' 2>"$scratch/why"; then
    tail -n 1 "$scratch/why" >&2
    echo "device.sh: no GPU answers, nothing is measured" >&2
    exit 11
fi

results=()
step() {  # NAME SECONDS COMMAND...
    local name=$1 limit=$2 begin=$SECONDS code state
    shift 2
    echo "== $name: $*" >&2
    timeout "$limit" "$@" >"$out/$name.log" 2>&1
    code=$?
    case $code in
        0) state=measured ;;
        124) state="cut off after $limit s" ;;
        *) state="failed with $code: $(grep -v '^ *$' "$out/$name.log" | tail -n 1)" ;;
    esac
    echo "   $state, $((SECONDS - begin)) s" >&2
    results+=("$name" "$state" "$((SECONDS - begin))")
}

backends=(cuda trt)
tiny=()
export='import sys; from pathlib import Path
from benchmarks.runtime.cpu_backends import full_width
full_width("fp32", Path(sys.argv[1]))'
if [ -n "$try" ]; then
    backends=(ort)
    tiny=(--tiny)
fi

# The model itself, at full size, by torch.
step torch_vision 100 "$python" -m benchmarks.model.vit_pruning "${tiny[@]}" \
    --out "$out/torch_vision.json"
step torch_full_size 220 "$python" -m benchmarks.model.full_size "${tiny[@]}" --clips 1x64 \
    --removed 0 0.5 --rounds 3 --out "$out/torch_full_size.json"

# The demo and full-width layers by each backend that is there.
demo=$("$python" -c 'from edge_vlm_runtime.demo.paths import DEMO_BUNDLE; print(DEMO_BUNDLE)')
cp -r "$demo" "$scratch/demo"
bundles=("$scratch/demo")
if [ -z "$try" ]; then
    step export_full_width 150 "$python" -c "$export" "$scratch"
    [ -d "$scratch/full-width-fp32" ] && bundles+=("$scratch/full-width-fp32")
fi
for bundle in "${bundles[@]}"; do
    name=$(basename "$bundle")
    for backend in "${backends[@]}"; do
        if [ "$backend" = trt ]; then
            step "build_$name" 120 "$python" -m edge_vlm build "$bundle"
        fi
        step "bench_${name}_$backend" 90 "$python" -m edge_vlm bench "$bundle" --backend "$backend" \
            --repeat 3 --fps 2,max --json "$out/bench_${name}_$backend.json"
    done
done

"$python" - "$out/summary.json" "${results[@]}" <<'PY'
import json, sys

path, *rest = sys.argv[1:]
steps = [
    {"step": name, "state": state, "seconds": int(seconds)}
    for name, state, seconds in zip(rest[::3], rest[1::3], rest[2::3])
]
with open(path, "w") as file:
    json.dump({"steps": steps}, file, indent=1)
    file.write("\n")
print(f"{sum(s['state'] == 'measured' for s in steps)} of {len(steps)} steps measured: {path}")
PY
