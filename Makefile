# Thin names for commands; the checks themselves are in .ci/run.
FUZZTIME ?= 60s

.PHONY: check test race lint fuzz bench

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

bench:
	bench/run --quick
