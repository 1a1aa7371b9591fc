#!/usr/bin/env bash
# The table joins what it should, and what is missing is said: peers_test.sh
set -uo pipefail
here=$(dirname "$(readlink -f "$0")")
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir" || exit 1
failures=0
fail() {
  echo "FAILED: $1"
  sed 's/^/  /' .out .err
  failures=$((failures + 1))
}

cat >ours.json <<'END'
{"benchmarks": [
 {"run_name": "norm/tokens:4/cache:cold/iterations:1/manual_time", "real_time": 5.0, "floor_us": 1.0},
 {"run_name": "norm/tokens:4/tp:2/cache:warm/iterations:1/manual_time", "real_time": 7.0, "processes": 1},
 {"run_name": "whole_case", "real_time": 9.0}]}
END
cat >peers.json <<'END'
{"benchmarks": [
 {"name": "norm/tokens:4/peer:slow/cache:cold", "real_time": 20.0, "floor_us": 4.0, "check": "ok"},
 {"name": "norm/tokens:4/peer:wrong/cache:cold", "real_time": 2.0, "floor_us": 4.0, "check": "FAILED"},
 {"name": "norm/tokens:4/peer:fast/cache:cold", "real_time": 10.0, "floor_us": 4.0, "check": "ok"}]}
END
"$here/table.py" ours.json --peers peers.json >.out 2>.err
[[ $? == 1 ]] || fail 'a peer with a wrong result is no failure'
grep -qF '| norm/tokens:4/cache:cold | 5 | 10 | fast | 0.50 | 4 | 0.80 |' .out || fail 'the row of ours and the best peer'
grep -qF 'FAILED: norm/tokens:4/peer:wrong/cache:cold' .out || fail 'the wrong peer is not named'
[[ $(grep -c '^| norm' .out) == 1 ]] || fail 'ranks on one GPU, or whole cases, are in the table'

echo 'not JSON' >bad.json
"$here/table.py" bad.json >.out 2>.err
[[ $? == 1 && $(wc -l <.err) == 1 ]] || fail 'a file that is no JSON: not one sentence'

if ! python3 -c 'import torch' 2>/dev/null; then
  "$here/peers.py" --out x.json >.out 2>.err
  [[ $? == 1 && $(wc -l <.err) == 1 ]] || fail 'without PyTorch: not one sentence'
fi
"$here/run" --nonsense >.out 2>.err
[[ $? == 2 && $(wc -l <.err) == 1 ]] || fail 'a wrong flag: not 2 with one sentence'
if ! command -v nvidia-smi >/dev/null; then
  "$here/run" --out "$dir/results" >.out 2>.err
  [[ $? == 3 && $(wc -l <.err) == 1 && ! -e results ]] || fail 'without a GPU: not 3 with one sentence'
fi
((failures == 0)) && echo 'all as expected'
exit $((failures > 0))
