#!/usr/bin/env bash
# The main job on the model that ships with the project: from a checkpoint to text and figures.
# Run it with `make demo`; it writes to build/demo and needs nothing from outside the repository.
set -euo pipefail
cd "$(dirname "$0")/.."

model=examples/models/tiny-mla
text=examples/text/three-essays.txt
out=build/demo
mkdir -p "$out"
started=$SECONDS

say() { printf '\n\033[1m%s\033[0m\n%s\n\n' "$1" "$2"; }
do_it() {
  printf '$ mla-deploy'
  local word
  for word in "$@"; do
    case $word in *" "*) printf ' "%s"' "$word" ;; *) printf ' %s' "$word" ;; esac
  done
  printf '\n'
  mla-deploy "$@"
}

say "1. What is it, and what would it cost?" \
  "tiny-mla: 5 million parameters, trained for this project, DeepSeek-V3's architecture. Its cache
holds a latent instead of keys and values; the table shows what that saves, and what int4 adds."
do_it inspect "$model" --memory 16MB

say "2. Make it small" \
  "Weights to 4 bits by HQQ; the latent is rotated, so that 4 bits of it lose little."
do_it quantize "$model" -o "$out/checkpoint" --kv int4 --weights int4 --force

say "3. Make it one file that runs everywhere" \
  "One ONNX graph for prefill and decode, the weights beside it, the tokenizer, a manifest."
do_it export "$out/checkpoint" -o "$out/bundle" --to onnx --force

say "4. Run it" \
  "Shakespeare was among the little that it read. It is a very small model: expect a tone, not sense."
do_it run "$out/bundle" "My lord, the king is" --max-tokens 96 --temperature 0.7 --min-p 0.1 \
  --seed 1

say "5. What did the 4 bits cost?" \
  "The bundle, as it ships, against the original weights in float32, on text that it was not
trained on."
do_it eval "$out/bundle" --reference "$model" --text "$text" --max-tokens 2048

say "6. How fast is it, and does that last?" \
  "Behind a full context every new token reads the whole cache: this is where its size counts."
do_it bench "$out/bundle" --depth 0,2048 --repetitions 3

printf '\nDone in %d s. The bundle is in %s: try your own prompt with\n' $((SECONDS - started)) "$out/bundle"
printf '  mla-deploy run %s "It was a dark night"\n' "$out/bundle"
