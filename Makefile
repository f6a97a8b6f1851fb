GO ?= go
PACKAGES = ./...

.PHONY: build demo test bench lab fuzz ghost sim conformance lint deps

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
	for f in FuzzHandshake FuzzTransmission; do $(GO) test -run '^$$' -fuzz "^$$f$$" -fuzztime 60s ./nbd || exit 1; done
	$(GO) test -run '^$$' -fuzz '^FuzzParse$$' -fuzztime 60s ./config

bench: deps build
	$(GO) run ./bench -mpathd ./mpathd | tee bench.md

# Late writes on a real target: 20 rounds of each way to be late, and the same
# rounds without protection, which must revert.
ghost: deps
	$(GO) test -v -count=1 -timeout 1500s -run 'LateWrites|Crash' ./internal/e2e -ghost-rounds 20 -ghost-table $(CURDIR)/ghost.md

# Random scripts of faults over simulated sessions in fake time.
SIM_SCRIPTS ?= 20000
sim:
	$(GO) test -v -count=1 -timeout 3600s -run 'LateWrites|ScriptsFind|Simulation' ./paths -scripts $(SIM_SCRIPTS)

# Cases of RFC 7143 that a scripted target plays; writes docs/conformance.md.
conformance:
	$(GO) test -count=1 -run Conformance ./initiator -conformance $(CURDIR)/docs/conformance.md

lab: deps
	$(GO) test -v -count=1 -timeout 540s ./internal/lab
