#!/usr/bin/env bash
# Shows that a Kubernetes with Pod Security "restricted" accepts this directory, and that
# a rolling update fails no request. It builds a real API server, controller manager and
# kube-proxy, starts them beside an etcd in a network of their own, and applies every
# kustomization, strictly. The controllers then make the pods and volume claims, which is
# where Pod Security judges. There is no node: for the update trial_kubelet.py runs the
# pods as processes of this machine. Needs Go, Python, jq, iptables, and Debian's
# etcd-server and redis-server; the first build takes a quarter of an hour. Not part of
# CI, which validates the files by Kubernetes' schemas.
#
#   deploy/kubernetes/trial.sh [BIN]     # BIN: where the programs are kept and used again
set -euo pipefail
cd "$(dirname "$0")/../.."
kubernetes=v1.37.2
operator=github.com/prometheus-operator/prometheus-operator@v0.85.0

if [[ ${1:-} != inside ]]; then
	bin=$(realpath -m "${1:-$(mktemp -d)}") work=$(mktemp -d)
	trap 'rm -rf "$work"' EXIT
	if [[ ! -x $bin/kubectl ]]; then
		cd "$work"
		go mod init verve.test/kubernetes
		go mod edit -require "k8s.io/kubernetes@$kubernetes"
		# Its own parts are released beside it, as v0.
		sed -n 's|^\t*\(k8s.io/[^ ]*\) => ./staging/.*|\1|p' "$(go mod download -json "k8s.io/kubernetes@$kubernetes" | jq -r .GoMod)" |
			while read -r part; do go mod edit -replace "$part=$part@v0${kubernetes#v1}"; done
		go get k8s.io/kubernetes/cmd/{kube-apiserver,kube-controller-manager,kube-proxy,kubectl}
		nice -n 19 go build -trimpath -ldflags "-s -w -X k8s.io/component-base/version.gitVersion=$kubernetes" -o programs/ \
			k8s.io/kubernetes/cmd/{kube-apiserver,kube-controller-manager,kube-proxy,kubectl}
		mkdir -p "$bin"
		mv programs/* "$bin/"
		cd "$OLDPWD"
	fi
	(cd / && go mod download -json "$operator") | jq -r .Dir >"$work/operator"
	CGO_ENABLED=0 go build -o "$work/" . ./bench/verify
	# The processes end with their namespace.
	unshare --map-root-user --net --pid --fork --kill-child "$PWD/deploy/kubernetes/trial.sh" inside "$bin" "$work"
	exit
fi

bin=$2 work=$3
export KUBECONFIG=$work/kubeconfig PATH=$bin:$PATH
trap '(($? == 0)) || tail -n 5 "$work"/*.log' EXIT
ip link set lo up
ip address add 192.0.2.1/32 dev lo
ip route add 10.0.0.0/24 dev lo src 192.0.2.1 # services, whose addresses kube-proxy translates

# eventually COMMAND...: until it succeeds, for a minute.
eventually() {
	local end=$((SECONDS + 60))
	until "$@" >"$work/eventually" 2>&1; do
		((SECONDS < end)) || { cat "$work/eventually"; echo "not in time: $*"; return 1; }
		sleep 0.2
	done
}

openssl genrsa -out "$work/key" 2048 2>/dev/null
echo 'token,admin,admin,system:masters' >"$work/tokens"
kubectl config set-cluster trial --server=https://192.0.2.1:6443 --insecure-skip-tls-verify >/dev/null
kubectl config set-credentials admin --token=token >/dev/null
kubectl config set-context trial --cluster=trial --user=admin >/dev/null
kubectl config use-context trial >/dev/null
etcd --data-dir "$work/etcd" --listen-peer-urls http://127.0.0.1:2380 >"$work/etcd.log" 2>&1 &
kube-apiserver --etcd-servers=http://127.0.0.1:2379 --cert-dir="$work/certificates" --advertise-address=192.0.2.1 \
	--token-auth-file="$work/tokens" --authorization-mode=RBAC --service-cluster-ip-range=10.0.0.0/24 \
	--service-account-issuer=trial --service-account-key-file="$work/key" --service-account-signing-key-file="$work/key" >"$work/apiserver.log" 2>&1 &
eventually kubectl get --raw=/readyz
kube-controller-manager --kubeconfig="$KUBECONFIG" --leader-elect=false --service-account-private-key-file="$work/key" \
	--controllers=*,-node-lifecycle-controller >"$work/controllers.log" 2>&1 &
kubectl version

# namespace NAME: where Pod Security refuses what is not restricted.
namespace() {
	kubectl create namespace "$1" >/dev/null
	kubectl label namespace "$1" pod-security.kubernetes.io/{enforce,warn,audit}=restricted >/dev/null
	eventually kubectl --namespace "$1" get serviceaccount default
}

echo "--- Pod Security is at work: a pod without a security context"
namespace refused
! kubectl --namespace refused run plain --image=verve 2>&1 || exit 1

echo "--- what the Prometheus operator defines"
for kind in podmonitors prometheusrules; do
	kubectl apply --server-side --filename "$(cat "$work/operator")/example/prometheus-operator-crd/monitoring.coreos.com_$kind.yaml"
	eventually kubectl get "$kind.monitoring.coreos.com"
done

made() { [[ $(kubectl --namespace "$1" get pods --output name | wc -l) == "$2" ]]; }
for kustomization in base instances full; do
	echo "--- kubectl apply -k deploy/kubernetes/$kustomization"
	namespace "$kustomization"
	if [[ $kustomization == full ]]; then
		kubectl --namespace full create secret generic verve --from-literal=kafka-password=x --from-literal=redis-url=redis://user:password@redis:6379
	fi
	kubectl --namespace "$kustomization" apply --server-side --validate=strict -k "deploy/kubernetes/$kustomization" 2>&1 | tee "$work/applied"
	! grep Warning "$work/applied" || exit 1
	eventually made "$kustomization" "$(kubectl --namespace "$kustomization" get statefulset verve --output jsonpath='{.spec.replicas}')"
	kubectl --namespace "$kustomization" get pods,persistentvolumeclaims --output name
	! kubectl --namespace "$kustomization" get events | grep --ignore-case -e forbidden -e FailedCreate || exit 1
done

echo "--- a rolling update, 400 requests a second by the service's address"
namespace rolling
kubectl create --filename - >/dev/null <<-'YAML'
	{apiVersion: v1, kind: Node, metadata: {name: node}, status: {addresses: [{type: InternalIP, address: 192.0.2.1}]}}
YAML
redis-server --save '' --dir "$work" >"$work/redis.log" &
VERVE_REDIS_URL=redis://127.0.0.1:6379 VERVE_KAFKA_BROKERS='' VERVE_COUNTS_FILE=$work/counts.jsonl VERVE_WINDOW=5s VERVE_WINDOW_HEADER=true \
	python3 deploy/kubernetes/trial_kubelet.py rolling "$work/verve" "$work" 2>"$work/kubelet.log" &
kube-proxy --kubeconfig="$KUBECONFIG" --hostname-override=node --proxy-mode=iptables --cluster-cidr=10.244.0.0/16 \
	--conntrack-max-per-core=0 --conntrack-tcp-timeout-established=0s --conntrack-tcp-timeout-close-wait=0s >"$work/proxy.log" 2>&1 &
kubectl config set-context --current --namespace=rolling >/dev/null
kubectl apply --server-side -k deploy/kubernetes/instances >/dev/null
kubectl rollout status statefulset verve --timeout=3m | tail -n 1
url=http://$(kubectl get service verve --output jsonpath='{.spec.clusterIP}')
eventually curl --silent --max-time 2 "$url/"
"$work/verify" --url="$url" --connections=16 --rate=400 --duration=10m --skip-first --strict --wait=40s --json --counts-file="$work/counts.jsonl" >"$work/verdict.json" 2>"$work/verify.log" &
load=$!
# Beside it new connections, for a page that there is not: ids would be missing in verify's sum.
while [[ ! -e $work/over ]]; do curl --silent --output /dev/null --write-out '%{http_code}\n' "$url/" || true; sleep 0.02; done >"$work/codes" &
connections=$!
sleep 5
kubectl rollout restart statefulset verve
kubectl rollout status statefulset verve --timeout=5m | tail -n 1
sleep 5
touch "$work/over"
wait "$connections"
kill "$load"
wait "$load" || { jq 'del(.table)' "$work/verdict.json"; exit 1; }
jq --compact-output '{answers, ok, failed, refused, in_doubt, windows, bad_windows, inexact_windows}' "$work/verdict.json"
echo "new connections: $(grep --count 404 "$work/codes") answered, $(grep --count --invert-match 404 "$work/codes") failed"
jq --exit-status '.in_doubt == 0' "$work/verdict.json" >/dev/null
[[ $(sort --unique "$work/codes") == 404 ]]
# A Redis without CPU for a moment is no fault of the update, and has its line in the log.
! jq --compact-output --exit-status 'select(.message == "a request was refused" and .reason != "unavailable" and .reason != "not-found")' "$work"/verve-*.log || exit 1
jq --compact-output 'select(.reason == "unavailable")' "$work"/verve-*.log
