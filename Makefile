# Thin names for commands; the checks themselves are in .ci/run.
FUZZTIME ?= 60s

.PHONY: check test race lint fuzz soak bench

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

soak:
	.ci/run soak

bench:
	bench/run --quick
