package initiator_test

// departures go onto the page of the cases: where RFC 7143 leaves a choice, or
// says something else than lists of such cases commonly do.
const departures = `
## Where RFC 7143 decides, or leaves a choice

- LG01, LG05: a login always asks for the stages 0, 1 and 3, so that a target can negotiate something in each. An answer that goes to stage 3 at once names a stage that was
  not asked for and drops; a target that is in no hurry answers without T (6.3, 11.13).
- LG12: the results of keys are minimum, maximum, AND or OR, and an answer is checked against our offer by that. DefaultTime2Wait is a maximum (13.15) of which we offer 0: every
  answer from 0 to 3600 is legal, none can be below the offer.
- TX02: a Text Request of ours is immediate, the ones that go on with an answer too: all carry the CmdSN of the next command and consume none (4.2.2.1). They can so be
  sent while the command window is shut.
- TX01 to TX06, HM06: an ExpCmdSN beyond the commands that were sent drops a normal session. In a discovery session it is ignored: istgt counts immediate requests there,
  against 4.2.2.1, and no command's place depends on it.
- WR10: DataSequenceInOrder=Yes is offered, and the result is OR (13.19): a target cannot have it No. An R2T out of order drops.
- FF07: no clause says how long a target may keep its window shut with nothing in flight. We take five times FailoverTime.
- FF11: a ping acknowledges, not a NOP-Out without a tag (11.18 has both): the answer shows that the target is alive.
- NP04: no clause asks for reads that are in flight on a silent connection to be issued a second time elsewhere. Maps do that with the option hedge_reads; without it they move when the session has ended.
- FF12: TASK SET FULL with other commands in flight waits for one of those to end, not for a time (SAM-5 5.3.1).
`
