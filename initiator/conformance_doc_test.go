package initiator_test

import (
	"flag"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"
)

var conformanceDoc = flag.String("conformance", "", "file to write the table of conformance cases to")

// stimuli says in short what the target does in each case.
var stimuli = map[string]string{
	"LG01": "logs us in; our first request and keys are looked at", "LG02": "stays in the security stage twice", "LG03": "begins StatSN anywhere, also at its wrap",
	"LG04": "ends the login without a session handle", "LG05": "names stages that are not due", "LG06": "is final and continued at once", "LG07": "splits keys over continued responses",
	"LG08": "never ends a stage", "LG09": "asks for keys nobody knows", "LG10": "answers a key twice", "LG11": "picks a digest that was not offered", "LG12": "answers beyond our offers",
	"LG13": "spells numbers in hex, and wrongly", "LG15": "answers every key with Irrelevant, Reject, NotUnderstood", "LG16": "wants markers", "LG17": "takes 512 bytes per PDU",
	"LG19": "redirects", "LG21": "redirects in circles, or nowhere", "LG22": "refuses with each status", "LG23": "falls silent, hangs up or sends half a response", "LG25": "sends other PDUs during login",
	"LG28": "speaks another version", "LG29": "sends malformed text, or announces 16 MiB of it", "FF01": "watches CmdSN under concurrent commands", "FF02": "opens its window late, in a NOP-In",
	"FF09": "skips a StatSN", "DI01": "sends one Data-In with status", "DI02": "sends many Data-Ins and a response", "DI03": "ends sequences early", "DI04": "skips a DataSN", "DI05": "sends data out of order",
	"DI06": "sends data beyond the buffer", "DI07": "announces more than we take", "DI08": "sends data for tasks that do not read", "DI09": "sends status that is not final, or twice", "DI10": "reports residuals",
	"DI11": "sends less than it says", "DI13": "sends empty and odd segments", "WR05": "asks for more than MaxBurstLength", "WR06": "asks for what is not there", "WR07": "skips an R2TSN", "WR09": "asks for data in turns",
	"NP01": "pings", "NP05": "answers pings, the command late", "LO01": "answers the logout", "LO02": "does not answer the logout", "RJ01": "rejects a PDU", "AS01": "asks for a logout", "AS04": "asks for a new negotiation",
	"AS06": "sends events nobody knows", "CH02": "sends bad challenges", "CH03": "sends bad identifiers", "CH04": "picks an algorithm that was not offered", "CH05": "skips CHAP", "HM01": "announces huge segments on every opcode",
	"HM02": "sends opcodes that are not its own", "HM03": "sends byte by byte", "HM04": "announces more sense than it sends", "HM05": "answers an older use of a tag", "HM07": "jumps with StatSN",
	"DG01": "sends right digests", "DG02": "sends a wrong header digest", "DG03": "sends a wrong data digest",
}

// elsewhere are cases that other tests hold.
var elsewhere = map[string]string{
	"LG30": "internal/e2e on tgtd", "LG31": "TestSameTargetNameOnTwoServersIsNoFence, TestLateWritesOnTgtd", "LG26": "TestCrashWithWritesUnderWay", "NP03": "TestHungTargetIsSuspectThenDead", "NP04": "TestHungTargetIsSuspectThenDead",
	"TM01": "TestAHangingCommandIsAborted", "TM02": "TestAHangingCommandIsAborted", "DG04": "TestDigestsAgainstTgtd", "DG05": "TestDigestsAgainstTgtd", "CH06": "TestCHAPAgainstTgtd", "CH08": "TestCHAPAgainstTgtd",
	"CH09": "TestCHAPAgainstTgtd", "SC03": "TestTransitioningIsWaitedOut", "SC05": "TestFlushWaitsForTheServerThatHoldsTheWritesAndNothingElseDoes", "SC01": "TestClassify",
}

// outcomesOf collects the results of TestConformance.
type outcomesOf struct {
	mu sync.Mutex
	m  map[string]bool
}

func (o *outcomesOf) set(id string, passed bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.m[id] = passed
}

func (o *outcomesOf) write(t *testing.T) {
	for id := range o.m {
		require.Contains(t, stimuli, id)
	}
	if *conformanceDoc == "" {
		return
	}
	var b strings.Builder
	fmt.Fprint(&b, "# Conformance\n\n`make conformance` runs these cases against a scripted target and writes this page. What the target does wrong must end the connection\n"+
		"with a reason, and give each command back once; nothing may hang.\n\n| case | the target | result |\n|---|---|---|\n")
	for _, id := range slices.Sorted(maps.Keys(stimuli)) {
		result := "passed"
		if ok, ran := o.m[id]; !ran || !ok {
			result = "**failed**"
		}
		fmt.Fprintf(&b, "| %s | %s | %s |\n", id, stimuli[id], result)
	}
	fmt.Fprint(&b, "\nHeld by other tests:\n\n| case | test |\n|---|---|\n")
	for _, id := range slices.Sorted(maps.Keys(elsewhere)) {
		fmt.Fprintf(&b, "| %s | %s |\n", id, elsewhere[id])
	}
	fmt.Fprint(&b, "\nText that is only NULs is taken as padding, as several targets send it. Not covered yet: discovery (TX), task management escalation in all its\n"+
		"answers, asynchronous messages with waits, rejects of other than protocol errors, hostile SCSI data beyond what `make fuzz` does.\n")
	require.NoError(t, os.WriteFile(*conformanceDoc, []byte(b.String()), 0o644))
}
