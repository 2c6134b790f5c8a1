#!/usr/bin/env bash
# Three hospitals and a coordinator on this machine, each in processes of its own, from nothing to a report: one has images, one
# reports, one both. TLS, registered keys, approved plans and ledgers are those of a real run; only the network is loopback.
# At the end the same experiment is trained in one process, and the weights have to be equal to the bit.
#   simulations/hospitals.sh [FOLDER]        (about three minutes; everything it writes is in FOLDER)
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
work=${1:-$root/runs/hospitals}
config=$root/configs/smoke.yaml
export PATH=${FEDMIX_BIN:-$root/.venv/bin}:$PATH
say() { printf '\n\033[1m%s\033[0m\n' "$*"; }
free_port() { python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }
waited() { # waited SECONDS WHAT COMMAND...: until the command succeeds
    local left=$(($1 * 2)) what=$2
    shift 2
    until "$@" >/dev/null 2>&1; do
        left=$((left - 1))
        [ "$left" -gt 0 ] || { echo "$what did not happen" >&2; exit 1; }
        sleep 0.5
    done
}
online() { [ "$(fedmix server status --home server | grep -cE '^ (north|south|west) +online ')" -eq 3 ]; }
started=()
finish() {
    for pid in "${started[@]}"; do kill "$pid" 2>/dev/null || true; done
    wait
}
trap finish EXIT

if [ -e "$work" ]; then
    echo "$work is there already; name another folder, or remove it" >&2
    exit 1
fi
mkdir -p "$work"
cd "$work"

say "The coordinator: a certificate authority, a certificate, settings"
fedmix server init --host localhost --home server --port "${FEDMIX_PORT:=$(free_port)}" \
    --control-port "$(free_port)" --health-port "$(free_port)"

for site in north south west; do
    say "Hospital $site: its data, its key, its policy"
    fedmix phantom --experiment "$config" --site $site --shard $site/shard
    fedmix site init $site --coordinator "localhost:$FEDMIX_PORT" --ca server/ca.crt --shard $site/shard --home $site/home
    fedmix server register $site --key $site/home/key.pub --home server
done

say "The coordinator takes calls, and writes the plan of a run"
fedmix server start --home server >server.log 2>&1 &
started+=($!)
waited 120 "the coordinator's start" grep -q "sites connect to" server.log
cat server.log
fedmix server plan "$config" --sites north,south,west --set federation.deadline_s=300 --out plan.yaml --home server

for site in north south west; do
    say "Hospital $site: look whether all is well, read the plan, approve it, start the agent"
    fedmix site doctor --home $site/home
    fedmix site review plan.yaml --home $site/home
    fedmix site approve plan.yaml --home $site/home
    fedmix site start --home $site/home >$site.log 2>&1 &
    started+=($!)
done

say "The run: three rounds over the sites on the plan"
waited 180 "all three sites' coming online" online
fedmix server status --home server
fedmix server run plan.yaml --home server

for site in north south west; do
    say "Hospital $site: what left, and whether the ledger is whole"
    fedmix site ledger --home $site/home
    fedmix site audit verify --home $site/home --peer server/ledger.jsonl
done

say "The same in one process"
fedmix simulate "$config" --set federation.deadline_s=300 --out alone
cmp server/runs/smoke/model/model.safetensors alone/model/model.safetensors
fedmix server stop --home server
say "The weights are equal to the bit. The report: $work/server/runs/smoke/report.html"
