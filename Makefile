# make help lists the targets. Each does all its own set-up.
SHELL := /bin/bash
GO ?= go
VERSION := $(shell git describe --tags --always --dirty 2>/dev/null || echo devel)
STATICCHECK := honnef.co/go/tools/cmd/staticcheck@v0.8.2

.PHONY: help build demo test bench generate lint vm

help:
	@echo "make build     one binary: bin/tidemark"
	@echo "make demo      protect a busy disk, ruin it, recover it (without root: an image that is served)"
	@echo "make test      every test that this machine can run"
	@echo "make vm        only those in virtual machines with Debian's kernels"
	@echo "make bench     benchmarks (docs/performance.md)"
	@echo "make generate  compile the eBPF programs anew (clang)"
	@echo "make lint      gofmt, vet, staticcheck, generated files"

build:
	@test/need.sh
	$(GO) build -trimpath -ldflags "-X main.version=$(VERSION)" -o bin/tidemark ./cmd/tidemark

demo: build
	@test/setup.sh
	@test/demo.sh

test: build
	@test/setup.sh
	@test/run.sh

vm:
	@test/need.sh
	@test/setup.sh
	TIDEMARK_REQUIRE=vm $(GO) test -count=1 -timeout 60m -v ./test/vm

bench:
	@test/need.sh
	@test/setup.sh
	$(GO) test -run '^$$' -bench . -benchtime 5000x -p 1 ./internal/...
	$(GO) test -run '^$$' -bench . -benchtime 1x -timeout 30m ./test/bench
	$(GO) test -run '^$$' -bench . -benchtime 1x -timeout 30m ./test/vm

generate:
	$(GO) generate ./bpf

lint:
	@test/need.sh
	@test -z "$$(gofmt -l .)" || { gofmt -l .; echo "gofmt these files"; exit 1; }
	$(GO) vet ./...
	$(GO) vet -tags guest,steps ./cmd/tidemark ./test/vm/...
	@GO=$(GO) test/staticcheck.sh
	@test/generated.sh
