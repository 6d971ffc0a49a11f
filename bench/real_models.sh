#!/usr/bin/env bash
# Trains and measures the models of docs/evaluation.md: bench/real_models.sh OUTPUT_DIR [quickstart] [smollm2]
set -eu
output=$1; shift
for name in "$@"; do
    case $name in
        quickstart) config=examples/quickstart.toml ;;
        smollm2) config=bench/smollm2-heads.toml ;;
        *) echo "unknown: $name" >&2; exit 2 ;;
    esac
    python -m wmtp run $config --run-name "$name" --set run.output_dir="$output" --set tracker.type=jsonl
    python -m wmtp eval "$output/$name" bench/real-models.toml --allow-code-execution
done
