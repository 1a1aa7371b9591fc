#!/usr/bin/env bash
# What a person sees of wrong input, from outside: cli_test.sh PATH-OF-TPCHECK
# Exit codes, one sentence on standard error, nothing on standard output, nothing left behind.
set -uo pipefail
tpcheck=$(readlink -f "${1:?usage: cli_test.sh PATH-OF-TPCHECK}")
launcher=$(dirname "$(readlink -f "$0")")/../../tpcheck
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir" || exit 1
failures=0

fail() {
  echo "FAILED: $1"
  sed 's/^/  stderr: /' "$dir/.err"
  failures=$((failures + 1))
}

run() { "$tpcheck" "$@" >"$dir/.out" 2>"$dir/.err" </dev/null; }

# refuses TEXT ARGUMENTS...: exit code 2 and one sentence that contains TEXT.
refuses() {
  local text=$1 code
  shift
  run "$@"
  code=$?
  [[ $code == 2 ]] || fail "tpcheck $* returned $code, not 2"
  [[ $(wc -l <.err) == 1 ]] || fail "tpcheck $*: not one line on standard error"
  grep -qF -- "$text" .err || fail "tpcheck $*: '$text' is not in the message"
  [[ ! -s .out ]] || fail "tpcheck $*: something on standard output"
}

# passes ARGUMENTS...: exit code 0, something on standard output, nothing on standard error.
passes() {
  run "$@" || fail "tpcheck $* returned $?"
  [[ -s .out ]] || fail "tpcheck $*: nothing on standard output"
  [[ ! -s .err ]] || fail "tpcheck $*: something on standard error"
}

refuses 'tpcheck --help' nonsense
refuses 'tpcheck --help' --nonsense
refuses 'tpcheck fuzz --help' fuzz --nonsense
refuses "'no_op'" fuzz --ops no_op --cases 1
refuses "'no-model'" fuzz --model no-model --cases 1
refuses "'9999:none'" fuzz --mutant 9999:none --cases 1
refuses '-n 0' fuzz -n 0 --cases 1
refuses 'emulator, gpu, both' fuzz --on moon
refuses 'best, mpi, nccl' replay --group tcp 'v1 rms_norm seed=1'
refuses '--for' fuzz --for never
refuses 'v9' replay 'v9 rms_norm seed=1'
refuses 'no_op' replay 'v1 no_op seed=1'
refuses 'nonsense' replay 'v1 rms_norm nonsense=1'
refuses "'no-model'" explain no-model --tp 2
refuses 'num_kv_heads=8' explain MiniMax-M2.5 --tp 12
refuses 'tp_size=12' explain MiniMax-M2.5 --tp 12
refuses '--head-dim 0' explain --heads 4 --kv-heads 2 --head-dim 0 --tp 2
refuses "'9999:none'" zoo 9999:none
refuses 'ops, models, mutants, laws' list nonsense
refuses '--nonsense' bench --nonsense
refuses 'zzzz' bench --benchmark_filter=zzzz
refuses 'cannot be read' bench --baseline=no_such.json
echo '{"benchmarks": 3}' >no_times.json
refuses "no list 'benchmarks'" bench --baseline=no_times.json

printf '{"hidden_size": 64, "num_att' >truncated.json
refuses 'truncated.json: ' explain truncated.json --tp 2
printf '{"hidden_size": 64, "hidden_size": 64, "num_attention_heads": 4}' >twice.json
refuses '"hidden_size" is given twice' explain twice.json --tp 2
refuses 'missing.json' explain missing.json --tp 2
printf '{"hidden_size": 64, "num_attention_heads": 4}' >good.json
passes explain good.json --tp 2

# A model with its tensors.
shape='"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2'
line='v1 rms_norm hidden_size=8 tp_size=1 num_tokens=1 dtype=bf16 fill=exact seed=1'
# tensors DIR: a safetensors file with one f32.
tensors() {
  local header='{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}} '
  printf '%b%s1234' "\\x$(printf %02x ${#header})\\0\\0\\0\\0\\0\\0\\0" "$header" >"$1/model.safetensors"
}
mkdir model awq
printf '{%s}' "$shape" >model/config.json
refuses 'has no safetensors' replay "$line" --model model
refuses 'is no directory' replay "$line" --model MiniMax-M2.5
refuses '--model is empty' replay "$line" --model ''
tensors model
passes explain model --tp 2
run fuzz --ops rms_norm --model model --cases 3 -n 1 --jobs 1 || fail "fuzz --model DIR returned $?"
grep -qxF 'checkpoint model: 1 file, 1 tensor, not quantised' .err || fail 'fuzz --model DIR: no word of the checkpoint'
run replay "$line" --model model -n 1 || fail "replay --model DIR returned $?"
grep -qxF 'checkpoint model: 1 file, 1 tensor, not quantised' .err || fail 'replay --model DIR: no word of the checkpoint'
refuses '--adapter goes with one --model DIR' fuzz --adapter adapter
refuses '--adapter goes with one --model DIR' replay "$line" --adapter adapter
refuses 'rms_norm runs no adapter' fuzz --ops rms_norm --adapter adapter --model model
refuses 'adapter is no directory with an adapter' replay "$line" --adapter adapter --model model
printf '12345678{' >model/model.safetensors
refuses 'model.safetensors' fuzz --model model --cases 1
refuses 'model.safetensors' replay "$line" --model model
printf '{%s, "quantization_config": {"quant_method": "awq", "bits": 4}}' "$shape" >awq/config.json
refuses 'quant_method="awq"' fuzz --model awq --cases 1
refuses 'quant_method="awq"' fuzz --model awq/config.json --cases 1
passes explain awq --tp 2
grep -qF 'quant_method="awq" is not known' .out || fail 'explain: no word of an unknown quantisation'
tensors awq
refuses 'quant_method="awq"' replay "$line" --model awq
rm -r model awq

run explain MiniMax-M2.5 --tp 12 --json
[[ $? == 2 ]] || fail 'explain --json of an illegal pair did not return 2'
grep -q '"valid":false' .out || fail 'explain --json of an illegal pair says nothing on standard output'

run
[[ $? == 2 ]] || fail 'tpcheck without a command did not return 2'
passes --version
for command in '' fuzz replay explain zoo list; do
  # shellcheck disable=SC2086  # the first is no word at all
  passes $command --help
done
for what in ops models mutants laws; do passes list "$what"; done
passes explain MiniMax-M2.5 --tp 16
passes explain MiniMax-M2.5 --tp 16 --json
if command -v python3 >/dev/null; then
  for model in MiniMax-M2.5 DeepSeek-V3 Qwen3.5-27B good.json; do
    passes explain "$model" --tp 2 --json
    python3 -m json.tool .out >/dev/null || fail "explain $model --json is no JSON"
  done
fi

# The launcher, before it touches anything.
TPCHECK_PRESET=nonsense "$launcher" list ops >.out 2>.err </dev/null
[[ $? == 2 && $(wc -l <.err) == 1 ]] || fail 'an unknown TPCHECK_PRESET is not refused in one sentence'

tools=$dir/tools
mkdir "$tools"
for tool in bash env dirname readlink; do ln -s "$(command -v $tool)" "$tools/$tool"; done
for arguments in 'fuzz --on gpu' 'replay x --on=both' 'zoo --on both --for 1s'; do
  # shellcheck disable=SC2086  # several words
  CUDACXX='' TPCHECK_CUDA=/nowhere PATH=$tools "$launcher" $arguments >.out 2>.err </dev/null
  [[ $? == 3 && $(wc -l <.err) == 1 && ! -s .out ]] || fail "launcher, $arguments without nvcc: not 3 with one sentence"
  grep -qF 'nvcc' .err || fail "launcher, $arguments: no word of nvcc"
  # shellcheck disable=SC2086
  CUDACXX=/nowhere/nvcc "$launcher" $arguments >.out 2>.err </dev/null
  [[ $? == 3 && $(wc -l <.err) == 1 && ! -s .out ]] || fail "launcher, $arguments with no nvcc at CUDACXX: not 3 with one sentence"
done
# Where the toolkit's installers put it, nvcc is found: the launcher comes as far as its first missing tool.
mkdir -p "$dir/cuda/bin"
printf '#!/bin/sh\n' >"$dir/cuda/bin/nvcc"
chmod +x "$dir/cuda/bin/nvcc"
CUDACXX='' TPCHECK_CUDA=$dir/cuda PATH=$tools "$launcher" fuzz --on gpu >.out 2>.err </dev/null
grep -qF "needs CUDA's nvcc" .err && fail 'launcher: nvcc in TPCHECK_CUDA/bin is not found'
rm -r "$tools" "$dir/cuda"

# The GPU run: its help, wrong usage, and a machine without a GPU.
gpu_run=$(dirname "$launcher")/.ci/gpu
"$gpu_run" --help >.out 2>.err </dev/null
[[ $? == 0 && -s .out && ! -s .err ]] || fail '.ci/gpu --help'
"$gpu_run" --nonsense >.out 2>.err </dev/null
[[ $? == 2 && $(wc -l <.err) == 1 ]] || fail '.ci/gpu --nonsense: not 2 with one sentence'
if ! command -v nvidia-smi >/dev/null; then
  "$gpu_run" --only zoo --build "$dir/trees" >.out 2>.err </dev/null
  [[ $? == 3 && $(wc -l <.err) == 1 ]] || fail '.ci/gpu without a GPU: not 3 with one sentence'
fi

# Under mpirun one process speaks, and all return the same code.
if command -v mpirun >/dev/null; then
  export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 OMPI_MCA_rmaps_base_oversubscribe=1
  mpirun --bind-to none -n 2 "$tpcheck" explain MiniMax-M2.5 --tp 16 >.out 2>.err </dev/null ||
    fail 'explain under mpirun'
  [[ $(grep -c '^TP 16' .out) == 1 ]] || fail 'explain under mpirun: not printed once'
  mpirun --bind-to none -n 2 "$tpcheck" fuzz --ops no_op >.out 2>.err </dev/null
  [[ $? == 2 ]] || fail 'a wrong operator under mpirun did not return 2'
  [[ $(grep -c '^tpcheck: ' .err) == 1 ]] || fail 'a wrong operator under mpirun: not one sentence'
  timeout 60 mpirun --bind-to none -n 2 "$tpcheck" bench --benchmark_filter=smallest_case >.out 2>.err </dev/null
  [[ $? == 1 ]] || fail 'a bench of whole cases under mpirun did not return 1'
  [[ $(grep -c 'timed in one process' .out) == 1 ]] || fail 'a bench of whole cases under mpirun: not said once'
fi

left=$(find . -mindepth 1 ! -name '.out' ! -name '.err' ! -name '*.json')
[[ -z $left ]] || fail "left behind: $left"
((failures == 0)) && echo 'all as expected'
exit $((failures > 0))
