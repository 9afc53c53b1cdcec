package mount

import (
	"context"
	"fmt"

	"k8s.io/klog/v2"
)

// EnsureFilesystem makes sure that the device of a volume holds a filesystem of fs.Type, ready to be mounted: it
// makes one if and only if all witnesses say that the volume never held anything, or that an earlier mkfs of ours did
// not end. In every other case the device is left as it is, bit by bit, and what is there is either what was asked
// for or an error: ErrUnreadable, ErrNotBlank, ErrWrongFilesystem, ErrInconsistent, ErrReadOnly. Calls for one volume
// must not overlap.
func EnsureFilesystem(ctx context.Context, m Mounter, device string, fs Filesystem, g Guard) error {
	if err := ensureFilesystem(ctx, m, device, fs, g); err != nil {
		return fmt.Errorf("filesystem of %s: %w", device, err)
	}
	return nil
}

func ensureFilesystem(ctx context.Context, m Mounter, device string, fs Filesystem, g Guard) error {
	if err := fs.Validate(); err != nil {
		return err
	}
	record, err := g.Record(ctx)
	if err != nil {
		return fmt.Errorf("record: %w", err)
	}
	allocated, err := g.EverAllocated(ctx)
	if err != nil {
		return fmt.Errorf("allocation: %w", err)
	}
	found, err := m.Probe(ctx, device)
	if err != nil {
		return fmt.Errorf("%w. Nothing was written to it; look at the image (qcow-csi image check) and at what serves it, "+
			"then stage the volume again", err)
	}
	choice, err := decide(record, allocated, found, fs)
	if err != nil {
		return err
	}
	log := klog.FromContext(ctx).WithValues("device", device, "type", fs.Type, "record", record.Phase)
	switch choice {
	case adopt:
		log.Info("Found a filesystem that was not recorded")
		return setRecord(ctx, g, FormatState{Formatted, fs.Type})
	case makeNew, remake:
		log.Info("Making a filesystem", "fresh", choice == makeNew)
		return format(ctx, m, device, fs, g, choice == makeNew)
	default:
		return nil
	}
}

// format makes the filesystem between two records.
func format(ctx context.Context, m Mounter, device string, fs Filesystem, g Guard, fresh bool) error {
	if err := setRecord(ctx, g, FormatState{Formatting, fs.Type}); err != nil {
		return err
	}
	if err := m.Format(ctx, device, fs, fresh); err != nil {
		return err
	}
	found, err := m.Probe(ctx, device)
	if err != nil {
		return err
	}
	if found.Type != fs.Type {
		return fmt.Errorf("%w: mkfs of %s succeeded, but the device shows %s", ErrInconsistent, fs.Type, found)
	}
	return setRecord(ctx, g, FormatState{Formatted, fs.Type})
}

// EnsureRawBlock records, before the volume is published as a raw block device, that it is. From then on nothing is
// known of its content, and no filesystem is ever made on it.
func EnsureRawBlock(ctx context.Context, g Guard) error {
	record, err := g.Record(ctx)
	if err != nil {
		return fmt.Errorf("record: %w", err)
	}
	if record.Phase == RawBlock {
		return nil
	}
	return setRecord(ctx, g, FormatState{Phase: RawBlock})
}

func setRecord(ctx context.Context, g Guard, s FormatState) error {
	if err := g.SetRecord(ctx, s); err != nil {
		return fmt.Errorf("record %s: %w", s.Phase, err)
	}
	return nil
}
