package initiator

import (
	"context"

	"github.com/mpathd/mpathd/scsi"
)

const portGroupsAlloc = 4096 // bytes; more than 100 groups of 4 ports

// TargetPortGroups asks for the asymmetric access states (SPC-4 6.37), with the
// plain header if the unit refuses the extended one. Groups beyond 4096 bytes of
// answer are left out. Errors as Doer says, or of an answer that makes no sense.
func TargetPortGroups(ctx context.Context, d Doer, lun [8]byte) ([]scsi.PortGroup, error) {
	b, err := run(ctx, d, "REPORT TARGET PORT GROUPS", lun, scsi.ReportTargetPortGroups(portGroupsAlloc, true), portGroupsAlloc)
	if refusedByLU(err) {
		b, err = run(ctx, d, "REPORT TARGET PORT GROUPS", lun, scsi.ReportTargetPortGroups(portGroupsAlloc, false), portGroupsAlloc)
	}
	if err != nil {
		return nil, err
	}
	groups, _, err := scsi.ParsePortGroups(b)
	return groups, err
}

// ActivatePortGroup asks the target to make a port group active/optimized (SPC-4
// 6.45). It returns when the target says that it did, or with a *StatusError when
// it refuses, as one does whose access states are implicit only.
func ActivatePortGroup(ctx context.Context, d Doer, lun [8]byte, group uint16) error {
	cdb, list := scsi.SetTargetPortGroups(group, scsi.ActiveOptimized)
	_, err := one(ctx, d, lun, &question{op: "SET TARGET PORT GROUPS", cdb: cdb, out: list})
	return err
}

// InquiryData is the standard INQUIRY data (SPC-4 6.6.2) as the unit gives it, up to
// 255 bytes, which are the caller's. Errors as Doer says.
func InquiryData(ctx context.Context, d Doer, lun [8]byte) ([]byte, error) {
	return one(ctx, d, lun, inquiry())
}
