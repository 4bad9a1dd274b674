#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Makes a Debian 12 machine run the reference Bucket and the agent as services. Run as root; run again, it renews them.
set -euo pipefail
cd "$(dirname "$(readlink -f "$0")")/.."
home=$PWD
export DEBIAN_FRONTEND=noninteractive

if ! command -v make >/dev/null; then
  apt-get update -qq
  apt-get install -y -qq --no-install-recommends make >/dev/null
fi
make --no-print-directory setup

id -u bucket >/dev/null 2>&1 || useradd --system --home-dir /var/lib/bucket --shell /usr/sbin/nologin bucket

mkdir -p /etc/bucketprobe
# The operator's from the first run on.
[ -e /etc/bucketprobe/config.toml ] || cat > /etc/bucketprobe/config.toml <<'TOML'
[target]
ports = [8080]

[storage]
roots = ["/var/lib/bucket"]
metadata = ["meta/**"]

[tags]
environment = "vagrant"

[agent]
# The machine's own address rather than loopback, as the host's port 9464 is forwarded to it.
listen = "0.0.0.0:9464"
records = "/var/log/bucketprobe/requests.jsonl"
TOML

cat > /etc/systemd/system/bucket.service <<UNIT
[Unit]
Description=Reference Bucket v1 server

[Service]
ExecStart=$home/.venv/bin/python -m bucketprobe.demo.bucket --port 8080 --root /var/lib/bucket
User=bucket
StateDirectory=bucket
Restart=on-failure

[Install]
WantedBy=multi-user.target
UNIT

cat > /etc/systemd/system/bucketprobe.service <<UNIT
[Unit]
Description=Where each request to the Bucket spent its time
After=bucket.service

[Service]
# Starts as root to load its probes, and gives its privileges up by itself.
ExecStart=$home/.venv/bin/bucketprobe run --config /etc/bucketprobe/config.toml
CacheDirectory=bucketprobe
LogsDirectory=bucketprobe
Restart=on-failure
MemoryMax=256M

[Install]
WantedBy=multi-user.target
UNIT

if [ ! -d /run/systemd/system ]; then
  echo "provision: systemd does not run here, so the services are installed but not started"
  exit 0
fi
systemctl daemon-reload
systemctl enable --quiet bucket.service bucketprobe.service
systemctl restart bucket.service bucketprobe.service
if ! curl --silent --fail --output /dev/null --retry 30 --retry-delay 1 --retry-connrefused --retry-all-errors http://127.0.0.1:9464/readyz; then
  systemctl --no-pager status bucketprobe.service || true
  echo "provision: the agent is not ready; 'journalctl -u bucketprobe' says why" >&2
  exit 1
fi
echo "provision: the Bucket listens on port 8080, the agent's metrics are at http://127.0.0.1:9464/metrics"
