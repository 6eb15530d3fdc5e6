# Thin names for commands; the checks themselves are in .ci/run.
FUZZTIME ?= 60s

.PHONY: check test race lint fuzz explore soak bench containers module rules

check:
	.ci/run

test:
	go test ./...

race:
	go test -race ./...

lint:
	.ci/run lint

fuzz:
	FUZZTIME=$(FUZZTIME) .ci/run fuzz

explore:
	VERVE_TEST_EXPLORE=deep go test -count=1 -timeout=24h -v -run Interleavings ./counter ./dedup ./server ./server/callback

soak:
	.ci/run soak

containers:
	.ci/run containers

# make module MODULE=github.com/OWNER/verve: gives the module the path that it is
# published under, so that go install finds it, and the manifests the image beside it.
IMAGE ?= $(patsubst github.com/%,ghcr.io/%,$(MODULE))
module:
	@test -n "$(MODULE)" || { echo "usage: make module MODULE=github.com/OWNER/verve [IMAGE=...]"; exit 2; }
	export old=$$(go list -m) new=$(MODULE); \
	git ls-files -z '*.go' | xargs -0 perl -pi -e 's#"$$ENV{old}/(?=(bench|counter|dedup|internal|server|stream)[/"])#"$$ENV{new}/#g' && \
	git ls-files -z '*go.mod' | xargs -0 perl -pi -e 's#^module \Q$$ENV{old}\E#module $$ENV{new}#'
	perl -pi -e 's#newName: .*#newName: $(IMAGE)#' deploy/kubernetes/base/kustomization.yaml

# The alerts again, as the Prometheus operator wants them.
rules:
	{ printf '# Made by make rules.\napiVersion: monitoring.coreos.com/v1\nkind: PrometheusRule\nmetadata:\n  name: verve\nspec:\n'; \
		sed -n '/^groups:/,$$p' deploy/prometheus/verve.rules.yml | sed 's/^\(.\)/  \1/'; } >deploy/kubernetes/monitoring/rules.yaml

bench:
	bench/run --quick
