package driver

import (
	"context"
	"errors"
	"fmt"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/qcow-csi/qcow-csi/driver/attach"
	"github.com/qcow-csi/qcow-csi/driver/mount"
	"github.com/qcow-csi/qcow-csi/driver/pool"
)

// Error classes of the services; the packages below have theirs.
var (
	errArgument     = errors.New("invalid request")
	errPending      = errors.New("an operation on the volume is running, try again later")
	errToken        = errors.New("invalid starting_token")
	errPrecondition = errors.New("not possible now")
	errIncompatible = errors.New("exists with other properties")
	errNotThere     = errors.New("volume not found at that path")
	errElsewhere    = errors.New("cannot be provided in the requested topology")
)

// codeOf is the one place where error classes become gRPC codes, as the error tables of the CSI specification want
// them. The first class that matches decides; what has none is Internal.
var codeOf = []struct {
	class error
	code  codes.Code
}{
	{context.Canceled, codes.Canceled},
	{context.DeadlineExceeded, codes.DeadlineExceeded},
	{errArgument, codes.InvalidArgument},
	{errPending, codes.Aborted},
	{errToken, codes.Aborted},
	{errPrecondition, codes.FailedPrecondition},
	{errIncompatible, codes.AlreadyExists},
	{errNotThere, codes.NotFound},
	{errElsewhere, codes.ResourceExhausted},
	{pool.ErrNotFound, codes.NotFound},
	{pool.ErrExists, codes.AlreadyExists},
	{pool.ErrOutOfRange, codes.OutOfRange},
	{pool.ErrNoSpace, codes.ResourceExhausted},
	{pool.ErrBusy, codes.FailedPrecondition},
	{pool.ErrClosed, codes.Unavailable},
	{pool.ErrCorrupt, codes.DataLoss},
	{pool.ErrUnsupported, codes.FailedPrecondition},
	{pool.ErrInvalid, codes.InvalidArgument},
	{attach.ErrBusy, codes.FailedPrecondition},
	{attach.ErrNotAttached, codes.FailedPrecondition},
	{attach.ErrUnavailable, codes.FailedPrecondition},
	{attach.ErrInvalid, codes.InvalidArgument},
	{attach.ErrClosed, codes.Unavailable},
	{mount.ErrInvalid, codes.InvalidArgument},
	{mount.ErrBusy, codes.FailedPrecondition},
	{mount.ErrNotMounted, codes.FailedPrecondition},
	{mount.ErrReadOnly, codes.FailedPrecondition},
	{mount.ErrNotBlank, codes.FailedPrecondition},
	{mount.ErrWrongFilesystem, codes.FailedPrecondition},
	{mount.ErrUnreadable, codes.Unavailable},
	{mount.ErrInconsistent, codes.DataLoss},
}

// statusOf returns err as a gRPC status.
func statusOf(err error) *status.Status {
	if err == nil {
		return status.New(codes.OK, "")
	}
	for _, c := range codeOf {
		if errors.Is(err, c.class) {
			return status.New(c.code, err.Error())
		}
	}
	return status.New(codes.Internal, err.Error())
}

// argumentf makes an error of class errArgument.
func argumentf(msg string, args ...any) error {
	return fmt.Errorf("%w: "+msg, append([]any{errArgument}, args...)...)
}
