GO ?= go
PACKAGES = ./...

.PHONY: race soak-kernel bench-kernel bench-scale bench-idle bench-fence interop deb build demo test bench lab fuzz ghost ghost-lab sim conformance lint deps

build:
	CGO_ENABLED=0 $(GO) build -o mpathd ./cmd/mpathd

demo: build
	./mpathd demo

deps:
	bash internal/deps/install.sh

# Two packages at once: most of the time tests wait, for a timer to run out, for a
# target to come back, or for an emulated machine, which has one processor busy.
test: deps build
	$(GO) test -count=1 -p 2 -timeout 900s $(PACKAGES)

# The race detector, where there is concurrency to look at. One package at once:
# it makes them slow, and some compare times.
race: deps
	$(GO) test -race -count=1 -p 1 -timeout 900s ./block ./scsi ./initiator/... ./paths ./selector ./checker ./nbd/... ./daemon ./drill ./internal/target ./internal/faultnet

lint:
	$(GO) vet $(PACKAGES)
	test -z "$$(gofmt -l .)"

# Every fuzz target there is, FUZZTIME each; what one finds lands in testdata/fuzz
# of its package: keep it there, it is a test from then on.
FUZZTIME ?= 60s
fuzz:
	@set -e; for p in $$(grep -rl --include='*_test.go' '^func Fuzz' . | xargs -n1 dirname | sort -u); do \
		for f in $$($(GO) test -list '^Fuzz' $$p | grep '^Fuzz' || true); do \
			echo "$$p $$f"; $(GO) test -run '^$$' -fuzz "^$$f\$$" -fuzztime $(FUZZTIME) -fuzzminimizetime 10x $$p; \
		done; done

bench: deps build
	$(GO) run ./bench -mpathd ./mpathd | tee bench.md

# 256 maps of 4 paths on one host: time, memory, idle cost, answers. Exits with 1
# when a limit is missed.
bench-scale: build
	$(GO) run ./bench/scale -mpathd ./mpathd

# What idle sessions cost, without their target.
bench-idle: build
	$(GO) run ./bench -mpathd ./mpathd -idle 1024

# Late writes on real targets: 20 rounds of each way to be late, and the same
# rounds without protection, which must revert; ghost-lab does LIO. Both write
# the tables of docs/write-safety.md, with the commit (+: changed since) and the
# date. GHOST_RUN=LateWritesOnTgtd/hold does a part.
GHOST_ROUNDS ?= 20
GHOST_RUN ?= LateWrites|Crash|StoppedServer|Gotgt|ISID
GHOST_BUILD = $$(git rev-parse --short HEAD)$$(git diff --quiet HEAD -- . ':!docs' || echo +),_$$(date +%F)
GHOST = -v -count=1 -timeout 5400s -ghost-rounds $(GHOST_ROUNDS) -ghost-build "$(GHOST_BUILD)" -ghost-table $(CURDIR)/docs/write-safety.md
ghost: deps
	$(GO) test -parallel 60 -run '$(GHOST_RUN)' ./internal/e2e $(GHOST)

ghost-lab: deps
	$(GO) test -run '$(if $(filter command line,$(origin GHOST_RUN)),$(GHOST_RUN),LateWrites)' ./internal/lab $(GHOST)

# How long fences take: failovers on tgtd and on `mpathd target`. They run at a
# real-time priority, so that other work of the machine is not measured. Fails if
# an overlapping write takes FENCE_MOST longer than its failover. With that load:
# FENCE_AS= FENCE_MOST=1h.
FENCE_ROUNDS ?= 200
FENCE_AS ?= chrt --fifo 5
FENCE_MOST ?= 50ms
bench-fence: deps
	$(GO) test -v -count=1 -timeout 3600s -exec '$(FENCE_AS)' -run FenceTime ./internal/e2e -fence-rounds $(FENCE_ROUNDS) -fence-most $(FENCE_MOST)

# Random scripts of faults in fake time: over simulated sessions, then the whole
# stack over simulated targets and a simulated network for SIM_TIME of real time
# from SIM_SEED on. Prints runs, failovers, fences and the verdict.
SIM_SCRIPTS ?= 300
SIM_TIME ?= 60s
SIM_SEED ?= 1
sim:
	$(GO) test -v -count=1 -timeout 3600s -run 'LateWrites|ScriptsFind|Simulation' ./paths -scripts $(SIM_SCRIPTS)
	$(GO) test -v -count=1 -timeout 0 -cpu 1 ./internal/simulate -sim-time $(SIM_TIME) -sim-seed $(SIM_SEED)

# Cases of RFC 7143 that a scripted target plays; writes docs/conformance.md.
conformance:
	$(GO) test -count=1 -run Conformance ./initiator -conformance $(CURDIR)/docs/conformance.md

lab: deps
	$(GO) test -v -count=1 -timeout 2700s ./internal/lab -all

# Five minutes of verified writes on /dev/nbd0, on ext4 and xfs, with the daemon
# killed every few seconds.
SOAK ?= 300
soak-kernel: deps
	$(GO) test -v -count=1 -timeout 0 -run TestSoak ./internal/lab -soak $(SOAK)

# /dev/nbd0 in turns with dm-multipath on the same LIO targets in one boot.
# Then what other settings of the queue would give.
bench-kernel: deps
	$(GO) test -v -count=1 -timeout 900s -run "TestKernelSpeed|TestKernelSettings" ./internal/lab -speed

# A Debian package, in out/.
VERSION ?= 0.1.0
deb:
	CGO_ENABLED=0 $(GO) build -trimpath -ldflags '-s -w' -o out/mpathd ./cmd/mpathd
	bash dist/deb.sh out/mpathd $(VERSION) out

# Targets of others, each in its own time: writes the table of docs/interop.md.
interop: deps
	@failed=; for t in Tgtd Istgt Gotgt; do \
		$(GO) test -v -count=1 -timeout 600s -run "Interop$$t" ./internal/interop -complete -table $(CURDIR)/docs/interop.md || failed="$$failed $$t"; done; \
	$(GO) test -v -count=1 -timeout 1800s -run InteropOnLIO ./internal/lab -complete -interop-table $(CURDIR)/docs/interop.md || failed="$$failed LIO"; \
	test -z "$$failed" || { echo "failed:$$failed"; exit 1; }
