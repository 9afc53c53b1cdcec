# qcow-csi. `make` lists the targets; `make demo` and `make test` install what they need on a Debian or an Ubuntu.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

GO ?= go
# Packages to test and to lint.
PKG ?= ./...
# Of each fuzz target.
FUZZTIME ?= 10s
# Of one package's tests.
TIMEOUT ?= 28m
# The enumerations of crashes and faults, and the matrix of images, take samples under the race detector; here they are whole.
ENUMERATED = $(filter $(if $(filter ./...,$(PKG)),%,$(PKG:/...=)),./qcow ./test/interop)
ENUMERATE = $(if $(ENUMERATED),$(GO) test -timeout $(TIMEOUT) -json -run '^Test(Crash|Fault|Matrix)' $(ENUMERATED),true)
# A file of tests that must run, for `make test`; see test/summary.
REQUIRED ?=
# Flags of test/bench, such as -full, -workloads 'random read' or -help.
BENCH ?=
VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo dev)
IMAGE ?= qcow-csi:$(VERSION)

GOLANGCI_LINT := $(GO) run github.com/golangci/golangci-lint/v2/cmd/golangci-lint@v2.15.0
ENSURE := test/prerequisites/ensure

# Version control stamping refuses to work in a tree that another user owns, and root tests those; -X main.version says more.
export GOFLAGS := -buildvcs=false $(GOFLAGS)
# Root's PATH after sudo or su lacks some of these.
export PATH := $(PATH):/usr/local/go/bin:/usr/local/sbin:/usr/sbin:/sbin

.PHONY: help
help: ## List the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: build
build: ## Build the static binary bin/qcow-csi
	CGO_ENABLED=0 $(GO) build -trimpath -ldflags '-s -w -X main.version=$(VERSION)' -o bin/qcow-csi ./cmd/qcow-csi

.PHONY: demo
demo: ## Drive a volume through its whole life over CSI, as kubelet does (root)
	@$(ENSURE) demo >/dev/null
	@$(MAKE) --no-print-directory build
	$(GO) run ./test/demo

.PHONY: test
test: ## Run every test with the race detector; as root with real mounts, QEMU and a virtual machine
	@have=$$($(ENSURE) test); \
	if [ "$$have" = all ] && [ "$$(id -u)" = 0 ]; then export QCOW_CSI_REQUIRE="$${QCOW_CSI_REQUIRE-all}"; fi; \
	{ $(GO) test -race -timeout $(TIMEOUT) -json $(PKG); $(ENUMERATE); } | $(GO) run ./test/summary -required '$(REQUIRED)'

.PHONY: e2e-vm
e2e-vm: ## Run the tests that need another kernel, in User Mode Linux
	@$(ENSURE) test >/dev/null
	QCOW_CSI_REQUIRE=all $(GO) test -count=1 -timeout $(TIMEOUT) -v -run '^TestInGuest$$' ./driver/mount
	QCOW_CSI_REQUIRE=all $(GO) test -count=1 -timeout $(TIMEOUT) -v ./test/vm/...

.PHONY: crash-long
crash-long: ## Run the tests that have a long form, crash states above all: hours instead of seconds
	@$(ENSURE) test >/dev/null
	QCOW_CSI_LONG=1 $(GO) test -count=1 -timeout 12h ./qcow/... ./test/interop ./test/nbdtester

.PHONY: fuzz
fuzz: ## Run every fuzz target for FUZZTIME each
	@grep -rl --include='*_test.go' '^func Fuzz' . | xargs -r -n1 dirname | sort -u | while read -r dir; do \
		for target in $$(sed -nE 's/^func (Fuzz[A-Za-z0-9_]*)\(.*/\1/p' "$$dir"/*_test.go); do \
			echo "$$dir $$target"; \
			$(GO) test -run '^$$' -fuzz "^$$target$$" -fuzztime $(FUZZTIME) "$$dir" </dev/null; \
		done; \
	done

.PHONY: bench
bench: ## Measure against QEMU's and nbdkit's servers in 15 minutes; BENCH has flags
	@$(ENSURE) bench >/dev/null
	$(GO) run ./test/bench $(BENCH)

.PHONY: bench-full
bench-full: ## Measure all that bench can, for hours, and put it into docs/benchmarks.md
	@mkdir -p bin
	@$(MAKE) --no-print-directory bench BENCH='-full -json bin/bench.json -markdown docs/benchmarks.md -svg docs/benchmarks.svg'

.PHONY: lint
lint: ## Check format, imports, style, module files and scripts
	@$(ENSURE) lint >/dev/null
	$(GO) vet $(PKG)
	$(GOLANGCI_LINT) run $(PKG)
	$(GO) vet -tags vmguest $(PKG)
	$(GOLANGCI_LINT) run --build-tags vmguest $(PKG)
	$(GO) mod tidy -diff
	$(GO) mod verify
	shellcheck $$(grep -rlE --exclude-dir=.git --exclude-dir=bin '^#!.*\b(ba)?sh$$' .)

.PHONY: fmt
fmt: ## Format the Go sources
	$(GOLANGCI_LINT) fmt

.PHONY: image
image: ## Build the container image, with Docker or Podman
	@for engine in docker podman; do \
		if "$$engine" info >/dev/null 2>&1; then \
			exec "$$engine" build --build-arg VERSION='$(VERSION)' -t '$(IMAGE)' .; \
		fi; \
	done; \
	echo "make image needs a running container engine, Docker or Podman; there is none here." >&2; exit 1

.PHONY: clean
clean: ## Remove what was built
	rm -rf bin
