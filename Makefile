GO ?= go
PACKAGES = ./...

.PHONY: build demo test bench lab fuzz lint deps

build:
	$(GO) build -o mpathd ./cmd/mpathd

demo: build
	./mpathd demo

deps:
	bash internal/deps/install.sh

test: deps build
	$(GO) test -count=1 -p 1 -timeout 540s $(PACKAGES)

lint:
	$(GO) vet $(PACKAGES)
	test -z "$$(gofmt -l .)"

fuzz:
	for f in FuzzSense FuzzVPD83; do $(GO) test -run '^$$' -fuzz "^$$f$$" -fuzztime 60s ./scsi || exit 1; done
	$(GO) test -run '^$$' -fuzz '^FuzzKeys$$' -fuzztime 60s ./initiator/pdu

bench: deps build
	$(GO) run ./bench -mpathd ./mpathd | tee bench.md

lab: deps
	$(GO) test -v -count=1 -timeout 540s ./internal/lab
