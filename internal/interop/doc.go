// Package interop runs the initiator against targets that others wrote, one
// suite for all of them: tgtd, istgt, gotgt, and LIO in the lab's machine.
package interop
