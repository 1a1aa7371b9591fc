#!/usr/bin/env python3
"""One table of our benchmarks beside the best peer: table.py OURS.json... --peers PEERS.json

Names are joined as they are, but for the peer's: `op/param:value/.../peer:P/cache:C`. Times are medians in
microseconds, from one run on one machine; `floor` is that of the peers' file, else our own; `share` is
floor / ours.
"""
import argparse
import json
import re
import sys


def entries(path):
    try:
        with open(path) as f:
            document = json.load(f)
        return document["benchmarks"]
    except (OSError, ValueError, KeyError, TypeError) as e:
        sys.exit(f"table.py: {path} is not Google Benchmark's JSON: {e!r}")


def plain(name):
    """A name without what Google Benchmark appends."""
    return re.sub(r"/(iterations:\d+|manual_time)", "", name)


def key_of(name):
    return re.sub(r"/peer:[^/]*", "", plain(name))


def peer_of(name):
    return re.search(r"/peer:([^/]*)", name).group(1)


def is_on_its_gpus(name, entry):
    """Ranks that shared a GPU say nothing about a group of GPUs."""
    tp = re.search(r"/tp:(\d+)", name)
    return tp is None or int(tp.group(1)) == int(entry.get("processes", 1))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("ours", nargs="+", help="tpcheck bench --benchmark_out=FILE")
    parser.add_argument("--peers", help="peers.py --out FILE")
    args = parser.parse_args()

    best, floors, failed = {}, {}, []
    for e in entries(args.peers) if args.peers else []:
        if e.get("error_occurred") or e.get("check") == "FAILED":
            failed.append(f"{e['name']}: {e.get('error_message', 'a wrong result')}")
            continue
        key = key_of(e["name"])
        floors[key] = e["floor_us"]
        if key not in best or e["real_time"] < best[key][0]:
            best[key] = (e["real_time"], peer_of(e["name"]))

    rows, without = [], []
    for path in args.ours:
        for e in entries(path):
            name = plain(e["run_name"])
            if "/cache:" not in name:
                continue
            if e.get("error_occurred"):
                failed.append(f"{name}: {e.get('error_message', '')}")
                continue
            if not is_on_its_gpus(name, e):
                continue
            us, floor = e["real_time"], floors.get(name, e.get("floor_us"))
            peer_us, peer = best.get(name, (None, "-"))
            if peer_us is None:
                without.append(name)
            rows.append((name, us, peer_us, peer, floor))

    print("| benchmark | ours us | best peer us | which | ours / peer | floor us | share of floor |")
    print("| --- | ---: | ---: | --- | ---: | ---: | ---: |")
    for name, us, peer_us, peer, floor in rows:
        print(f"| {name} | {us:.4g} | {f'{peer_us:.4g}' if peer_us else '-'} | {peer} | "
              f"{f'{us / peer_us:.2f}' if peer_us else '-'} | {f'{floor:.4g}' if floor else '-'} | "
              f"{f'{floor / us:.2f}' if floor else '-'} |")
    beaten = sum(us <= peer_us for _, us, peer_us, _, _ in rows if peer_us)
    print(f"\n{len(rows)} benchmarks; {len(rows) - len(without)} with a peer, no slower than the best in {beaten}.")
    for line in failed:
        print(f"\nFAILED: {line}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
