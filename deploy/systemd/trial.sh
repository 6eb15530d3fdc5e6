#!/usr/bin/env bash
# Boots a real systemd in a container and restarts the service of this directory more
# than a hundred times under load: how many connections were refused, how many requests
# failed, and whether the records add up to the answers. It also tries a bad setting
# and a secret that only root can read. Takes some five minutes; needs root and
# Debian's systemd-container and debootstrap. Not part of CI, which restarts the
# program a hundred times without systemd (TestRestartsRefuseNobody).
#
#   deploy/systemd/trial.sh [ROOT]     # ROOT: a debootstrap that is kept and used again
set -euo pipefail
cd "$(dirname "$0")/../.."
root=${1:-$(mktemp -d)/root}

if [[ ! -x $root/usr/bin/curl ]]; then
	debootstrap --variant=minbase --include=systemd,systemd-sysv,dbus,curl bookworm "$root"
fi
CGO_ENABLED=0 go build -o "$root/usr/local/bin/" . ./bench/verify
install -m 0644 deploy/systemd/verve.{socket,service} "$root/etc/systemd/system/"
install -D -m 0640 deploy/systemd/verve.env "$root/etc/verve/verve.env"
cat >>"$root/etc/verve/verve.env" <<-'ENV'
	VERVE_WINDOW=5s
	VERVE_WINDOW_HEADER=true
	VERVE_LOG_LEVEL=warn
ENV
(umask 077 && echo the-token >"$root/etc/verve/admin-token")
# The remarks of verve.service on secrets, followed.
mkdir -p "$root/etc/systemd/system/verve.service.d"
{ echo '[Service]'; sed -n '/admin-token/s/^#//p' deploy/systemd/verve.service; } >"$root/etc/systemd/system/verve.service.d/secrets.conf"

cat >"$root/usr/local/bin/trial" <<'TRIAL'
#!/bin/bash
cd /tmp || exit
systemctl --version | head -n 1

echo "--- a bad setting"
sed -i s/VERVE_WINDOW=5s/VERVE_WINDOW=banana/ /etc/verve/verve.env
systemctl start verve; echo "systemctl start: exit $?, the service: exit $(systemctl show -P ExecMainStatus verve), $(systemctl show -P NRestarts verve) restarts"
sed -i s/VERVE_WINDOW=banana/VERVE_WINDOW=5s/ /etc/verve/verve.env
systemctl start verve.socket verve; echo "corrected, systemctl start: exit $?, $(systemctl show -P StatusText -P ActiveState verve)"

echo "--- a secret of root, through LoadCredential"
stat -c '%U %a %n' /etc/verve/admin-token
echo "metrics without it: $(curl -s -o /dev/null -w '%{http_code}' 127.0.0.1:8081/metrics), with it: $(curl -s -o /dev/null -w '%{http_code}' -H 'Authorization: Bearer the-token' 127.0.0.1:8081/metrics)"

echo "--- a frozen process is restarted by the watchdog"
mkdir -p /run/systemd/system/verve.service.d
printf '[Service]\nWatchdogSec=2s\n' >/run/systemd/system/verve.service.d/watchdog.conf
systemctl daemon-reload; systemctl restart verve
kill -STOP "$(systemctl show -P MainPID verve)"
for ((i = 0; i < 200; i++)); do (($(systemctl show -P NRestarts verve) == 0)) || break; sleep 0.1; done
echo "restarts: $(systemctl show -P NRestarts verve)"
rm /run/systemd/system/verve.service.d/watchdog.conf; systemctl daemon-reload; systemctl restart verve
sum() { grep -ho '"unique":[0-9]*' /var/lib/verve/counts.jsonl | awk -F: '{ n += $2 } END { print n + 0 }'; }
systemctl restart verve; before=$(sum)

echo "--- restarts for two and a half minutes, a new connection for each of 400 requests a second"
each=15000
for caller in 1 2 3 4; do
	curl -s -o /dev/null --rate 100/s -H 'Connection: close' -w '%{http_code} %{exitcode} %{time_total}\n' \
		"http://127.0.0.1:8080/api/verve/accept?id=$caller-[1-$each]" >answers.$caller &
done
restarts=0 failed=0
while [[ -n $(jobs -r) ]]; do
	systemctl restart verve || failed=$((failed + 1))
	restarts=$((restarts + 1))
done
systemctl restart verve # publishes what is open
awk '{ n[$1 " " $2]++; if ($3 > slowest) slowest = $3 }
	END { for (k in n) print "status and exit code of curl " k ": " n[k]; print "slowest " slowest "s"; print n["200 0"] + 0 >"ok" }' answers.*
echo "$restarts restarts, $failed failed; $(cat ok) answers ok, $(($(sum) - before)) ids in the records"

echo "--- 20 restarts, 64 connections kept, 2,000 requests a second"
curl -s 127.0.0.1:8080/api/verve/accept?id=last >/dev/null
verify --rate=2000 --duration=10m --connections=64 --counts-file=/var/lib/verve/counts.jsonl --skip-first --strict --wait=20s >verdict 2>&1 &
load=$!
sleep 2
for ((i = 0; i < 20; i++)); do systemctl restart verve; done
kill $load; wait $load; tail -n 4 verdict
systemctl poweroff
TRIAL
chmod +x "$root/usr/local/bin/trial"
cat >"$root/etc/systemd/system/trial.service" <<-'UNIT'
	[Service]
	Type=oneshot
	ExecStart=/usr/local/bin/trial
	StandardOutput=file:/trial.log
	StandardError=inherit
	TimeoutStartSec=30min
	[Install]
	WantedBy=multi-user.target
UNIT
ln -sf ../trial.service "$root/etc/systemd/system/multi-user.target.wants/trial.service"
rm -rf "$root/trial.log" "$root/var/lib/private/verve"
systemd-nspawn --quiet --directory="$root" --register=no --keep-unit --boot --private-network >"$root/console.log" 2>&1 || true
cat "$root/trial.log"
