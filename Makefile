# muster: make demo shows it at work, make test runs every test. Both do all
# their own set-up on a machine with Go and, for the Docker engine, root on
# Debian.

SHELL := /bin/bash
VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo dev)

# NVML is loaded when it is there: the binary must start without it, so that its
# symbols are bound lazily even where the toolchain's default is otherwise.
LDFLAGS := -X main.version=$(VERSION) -extldflags=-Wl,-z,lazy
export CGO_CFLAGS ?= -O2 -g -Wno-deprecated-declarations

TOOLS := go tool -modfile=$(CURDIR)/tools/go.mod
STATIC := CGO_ENABLED=0 GOOS=linux go build -trimpath -ldflags="-s -w"
WASM := GOOS=wasip1 GOARCH=wasm go build -trimpath -ldflags="-s -w"

.DEFAULT_GOAL := help
.PHONY: bench compiler help demo test build examples vet unit race docker generate tidy fuzz clean FORCE
FORCE:

help: ## say what the targets do
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

demo: build examples ## the main job, visibly, in about a minute
	@if [ "$(MUSTER_SKIP_DOCKER)" = 1 ]; then echo "MUSTER_SKIP_DOCKER=1: no container engine is set up"; \
	else deploy/dev/docker-engine.sh || echo "no container engine: the demo runs WebAssembly instead"; fi
	go run ./examples/demo --bin bin/muster --build build --out demo-out

test: compiler docker vet unit race ## every test

build: bin/muster ## the one binary

bin/muster: FORCE
	@mkdir -p bin
	go build -ldflags="$(LDFLAGS)" -o $@ ./cmd/muster

examples: build/raytrace.tar build/raytrace.wasm build/tinylm.tar build/tinylm.wasm ## the programs that the examples run

build/raytrace build/tinylm: build/%: FORCE
	@mkdir -p build
	$(STATIC) -o $@ ./examples/$*

build/raytrace.tar build/tinylm.tar: build/%.tar: build/%
	go run ./examples/pack --out $@ $<

build/raytrace.wasm build/tinylm.wasm: build/%.wasm: FORCE
	@mkdir -p build
	$(WASM) -o $@ ./examples/$*

compiler: ## find a C compiler, or install one: NVML and the race detector need it
	@command -v cc >/dev/null || command -v gcc >/dev/null || { \
		if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
			apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq gcc libc6-dev; \
		else echo "No C compiler: install gcc and the C library's headers (Debian: apt-get install gcc libc6-dev)."; exit 1; fi; }

docker: ## find a container engine, or install and start one
	@if [ "$(MUSTER_SKIP_DOCKER)" = 1 ]; then \
		echo "MUSTER_SKIP_DOCKER=1: every test that needs a container engine is SKIPPED"; \
	else deploy/dev/docker-engine.sh; fi

vet: ## go vet, gofmt and staticcheck
	@test -z "$$(gofmt -l $$(git ls-files '*.go' | grep -v '\.pb\.go$$'))" || { echo "gofmt would change:"; gofmt -l $$(git ls-files '*.go'); exit 1; }
	go vet ./...
	$(TOOLS) staticcheck ./...

# Long enough for two busy cores; a test that hangs shows its goroutines.
TIMEOUT := -timeout 8m

unit: build examples ## unit, property, transcript and command-line tests
	go test $(TIMEOUT) ./...
	@# The engine is no file that the test cache could watch.
	@if [ "$(MUSTER_SKIP_DOCKER)" != 1 ]; then go test $(TIMEOUT) -count=1 ./container/docker; fi

# The packages that run goroutines of their own, or a real cluster.
RACE := ./scheduler/... ./api/... ./worker/... ./cmd/... ./container ./container/wasm ./gpu/...
race: build examples ## integration tests with the race detector
	go test $(TIMEOUT) -race -short $(RACE)

generate: ## make the generated code anew
	go run ./proto/generate

tidy: ## go.mod and go.sum of both modules
	go mod tidy
	cd tools && go mod tidy

# Everything under bench/out is of the last run; bench/history.jsonl keeps every
# run's figures. BENCH="--full" measures longer, BENCH="--only lifecycle" less.
BENCH ?=
bench: build ## measure, in under ten minutes: the table, bench/out, a line of bench/history.jsonl
	@mkdir -p bench/out
	@if [ "$(MUSTER_SKIP_DOCKER)" = 1 ]; then echo "MUSTER_SKIP_DOCKER=1: no container engine is set up"; \
	else deploy/dev/docker-engine.sh || echo "no container engine: what it would start is not measured"; fi
	@rm -f bench/out/sim.json
	go run ./bench/sim $(if $(findstring --full,$(BENCH)),,-quick) -out bench/out/sim.json
	go run ./bench/load --binary bin/muster --out bench/out --sim bench/out/sim.json --history bench/history.jsonl $(BENCH)

FUZZTIME ?= 30s
fuzz: ## run every fuzz target for FUZZTIME
	@for f in $$(grep -rlE '^func Fuzz' --include=*_test.go . ); do \
		for t in $$(grep -oE '^func (Fuzz[A-Za-z0-9]+)' $$f | cut -c6-); do \
			echo "$$t $$(dirname $$f)"; go test -run '^$$' -fuzz "^$$t$$" -fuzztime $(FUZZTIME) ./$$(dirname $$f) || exit 1; \
		done; done

clean: ## remove what was built
	rm -rf bin build demo-out out
