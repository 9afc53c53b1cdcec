package qcow

import (
	"context"
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/qcow-csi/qcow-csi/qcow/format"
)

// Snapshots returns the internal snapshots, oldest first.
func (img *Image) Snapshots() []format.Snapshot {
	img.headerMu.Lock()
	defer img.headerMu.Unlock()
	return slices.Clone(img.snapshots)
}

// findSnapshot returns the index of the snapshot with the ID or, failing that, of the oldest with the name.
func findSnapshot(list []format.Snapshot, idOrName string) (int, error) {
	i := slices.IndexFunc(list, func(s format.Snapshot) bool { return s.ID == idOrName })
	if i < 0 {
		i = slices.IndexFunc(list, func(s format.Snapshot) bool { return s.Name == idOrName })
	}
	if i < 0 {
		return 0, fmt.Errorf("snapshot %q: %w", idOrName, ErrNotFound)
	}
	return i, nil
}

// CreateSnapshot keeps the present content of the disk as an internal snapshot (specification, "Snapshots") of that name, at most 65535
// bytes; others may have it too, the ID is the snapshot's alone. It is durable when CreateSnapshot returns nil; a crash leaves it
// made or not. Requests that change the image, and Flush, wait meanwhile, for a time that depends on how much is allocated; reads go
// on. It fails with ErrInvalid where refcounts of the image's width can't count one more reference, and with ErrUnsupported
// for an image with an external data file.
func (img *Image) CreateSnapshot(ctx context.Context, name string, now time.Time) (format.Snapshot, error) {
	end, err := img.maintain(ctx)
	if err != nil {
		return format.Snapshot{}, err
	}
	defer end()
	made := format.Snapshot{ID: nextID(img.snapshots), Name: name, Seconds: uint32(now.Unix()), Nanoseconds: uint32(now.Nanosecond()), ICount: ^uint64(0)}
	switch {
	case img.external():
		return format.Snapshot{}, img.externalSnapshots()
	case len(name) > math.MaxUint16 || strings.ContainsRune(name, 0):
		return format.Snapshot{}, format.Invalidf("a snapshot's name of %d bytes, or with a NUL in it", len(name))
	case now.Unix() != int64(made.Seconds):
		return format.Snapshot{}, format.Invalidf("a snapshot of %v, which the format can't express", now)
	case len(img.snapshots) >= format.MaxSnapshots:
		return format.Snapshot{}, format.Invalidf("the image has %d snapshots, as many as it can", len(img.snapshots))
	}
	err = img.underShadow(func(s *shadow) (func(*format.Header), func(), error) {
		s.stop = ctx.Err
		// The snapshot takes the L2 tables over, and the guest gets the copies.
		l1, err := s.shareTree(img.l1, img.l1offset)
		if err != nil {
			return nil, nil, err
		}
		kept, err := s.write(withoutCopied(img.l1))
		if err != nil {
			return nil, nil, err
		}
		made.L1Offset, made.L1Entries = img.geometry.OffsetOf(kept.first), uint32(len(img.l1)/format.EntrySize)
		made.DiskSize = uint64(img.Size())
		return s.replaceL1(l1, uint64(img.Size()), append(slices.Clone(img.snapshots), made))
	})
	if err != nil {
		return format.Snapshot{}, err
	}
	return made, nil
}

func (img *Image) externalSnapshots() error {
	return format.Unsupportedf("header", format.IncompatibleOffset, "snapshots of an image with an external data file")
}

// nextID returns a number above every ID that is one.
func nextID(list []format.Snapshot) string {
	next := uint64(1)
	for _, s := range list {
		if n, err := strconv.ParseUint(s.ID, 10, 63); err == nil {
			next = max(next, n+1)
		}
	}
	return strconv.FormatUint(next, 10)
}

// withoutCopied returns an L1 table in which COPIED is set nowhere, as it is for a table that is not active.
func withoutCopied(l1 []byte) []byte {
	kept := make([]byte, len(l1))
	for i := range uint64(len(l1)) / format.EntrySize {
		format.PutEntry(kept, i, uint64(format.L1Entry(format.Entry(l1, i)).WithCopied(false)))
	}
	return kept
}

// DeleteSnapshot removes an internal snapshot, given by ID or name, and gives the space back that only it needed. It is durable when
// DeleteSnapshot returns nil; a crash leaves the snapshot as it was or gone. Requests wait as for CreateSnapshot. It fails with
// ErrNotFound. It needs some space itself before it gives any back, for tables.
func (img *Image) DeleteSnapshot(ctx context.Context, idOrName string) error {
	end, n, err := img.maintainSnapshot(ctx, idOrName)
	if err != nil {
		return err
	}
	defer end()
	return img.underShadow(func(s *shadow) (func(*format.Header), func(), error) {
		s.stop = ctx.Err
		victim := img.snapshots[n]
		l1, err := img.readSnapshotL1(&victim)
		if err != nil {
			return nil, nil, err
		}
		if err := s.dropTree(l1, victim.L1Offset); err != nil {
			return nil, nil, err
		}
		rest := slices.Delete(slices.Clone(img.snapshots), n, n+1)
		active, changed, err := s.flagActive()
		switch {
		case err != nil:
			return nil, nil, err
		case changed:
			return s.replaceL1(active, uint64(img.Size()), rest)
		}
		return s.replaceSnapshots(rest)
	})
}

// ApplySnapshot makes the content of the disk, and its size, what an internal snapshot, given by ID or name, keeps. What
// was written since is lost. It is durable when ApplySnapshot returns nil; a crash leaves the one content or the other. Requests wait as
// for CreateSnapshot; reads under way may see both contents. It fails with ErrNotFound, and with ErrInvalid as CreateSnapshot does.
func (img *Image) ApplySnapshot(ctx context.Context, idOrName string) error {
	end, n, err := img.maintainSnapshot(ctx, idOrName)
	if err != nil {
		return err
	}
	defer end()
	if err := img.completeSnapshots(); err != nil {
		return err
	}
	return img.underShadow(func(s *shadow) (func(*format.Header), func(), error) {
		s.stop = ctx.Err
		chosen := img.snapshots[n]
		if err := img.checkSnapshot(&chosen); err != nil {
			return nil, nil, err
		}
		kept, err := img.readSnapshotL1(&chosen)
		if err != nil {
			return nil, nil, err
		}
		// The state of a virtual machine, which lies behind the disk, stays in the snapshot.
		kept = kept[:img.geometry.L1EntriesFor(chosen.DiskSize)*format.EntrySize]
		// The snapshot keeps what both need from becoming free in between, and a refcount may have no room for three.
		if err := s.dropTables(img.l1, img.l1offset); err != nil {
			return nil, nil, err
		}
		l1, err := s.shareTree(kept, chosen.L1Offset)
		if err != nil {
			return nil, nil, err
		}
		change, done, err := s.replaceL1(l1, chosen.DiskSize, img.snapshots)
		return s.carryBitmaps(chosen.DiskSize, s.differing(kept, chosen.DiskSize), change, done, err)
	})
}

// maintainSnapshot is maintain for an operation on the snapshot of index n.
func (img *Image) maintainSnapshot(ctx context.Context, idOrName string) (end func(), n int, err error) {
	end, err = img.maintain(ctx)
	if err != nil {
		return nil, 0, err
	}
	if n, err = findSnapshot(img.snapshots, idOrName); err == nil && img.external() {
		err = img.externalSnapshots()
	}
	if err != nil {
		end()
		return nil, 0, err
	}
	return end, n, nil
}

// completeSnapshots writes the size of the disk into the snapshots that lack it, as those of version 2 may: it is the image's,
// and so must be written down before that changes.
func (img *Image) completeSnapshots() error {
	if !slices.ContainsFunc(img.snapshots, func(s format.Snapshot) bool { return s.Incomplete }) {
		return nil
	}
	return img.underShadow(func(s *shadow) (func(*format.Header), func(), error) {
		return s.replaceSnapshots(slices.Clone(img.snapshots))
	})
}

// replaceL1 writes l1, which becomes the active L1 table, retires the present one, and prepares the switch to it, to the size of the
// disk and to a list of snapshots, if that has become longer or shorter.
func (s *shadow) replaceL1(l1 []byte, size uint64, list []format.Snapshot) (func(*format.Header), func(), error) {
	img := s.img
	if err := s.retire(img.l1offset, uint64(len(img.l1))); err != nil {
		return nil, nil, err
	}
	x, err := s.write(l1)
	if err != nil {
		return nil, nil, err
	}
	change, done := func(*format.Header) {}, func() {}
	if len(list) != len(img.snapshots) {
		if change, done, err = s.replaceSnapshots(list); err != nil {
			return nil, nil, err
		}
	}
	return func(h *format.Header) {
			change(h)
			h.Size, h.L1Entries, h.L1Offset = size, uint32(len(l1)/format.EntrySize), img.geometry.OffsetOf(x.first)
		}, func() {
			done()
			img.activate(l1, x)
			img.size.Store(int64(size))
		}, nil
}

// replaceSnapshots writes the list of snapshots, retires the present one, and prepares the switch.
func (s *shadow) replaceSnapshots(list []format.Snapshot) (func(*format.Header), func(), error) {
	img := s.img
	if err := s.retire(img.header.SnapshotsOffset, img.snapshotBytes); err != nil {
		return nil, nil, err
	}
	for i := range list {
		list[i].Incomplete = false
	}
	b := format.EncodeSnapshots(list)
	if len(b) > format.MaxSnapshotTableBytes {
		return nil, nil, format.Invalidf("a snapshot table of %d bytes exceeds the limit of %d", len(b), format.MaxSnapshotTableBytes)
	}
	x, err := s.write(b)
	if err != nil {
		return nil, nil, err
	}
	return func(h *format.Header) {
			h.Snapshots, h.SnapshotsOffset = uint32(len(list)), img.geometry.OffsetOf(x.first)
		}, func() {
			img.headerMu.Lock()
			defer img.headerMu.Unlock()
			img.snapshots, img.snapshotBytes = list, uint64(len(b))
		}, nil
}

// readSnapshotL1 reads the L1 table of a snapshot.
func (img *Image) readSnapshotL1(s *format.Snapshot) ([]byte, error) {
	b := make([]byte, uint64(s.L1Entries)*format.EntrySize)
	if err := readFull(img.file, b, s.L1Offset); err != nil {
		return nil, fmt.Errorf("read the L1 table of snapshot %q: %w", s.Name, err)
	}
	return b, nil
}

// checkSnapshot checks that a snapshot's L1 table covers its disk.
func (img *Image) checkSnapshot(s *format.Snapshot) error {
	if s.DiskSize > img.geometry.MaxVirtualSize() || img.geometry.L1EntriesFor(s.DiskSize) > uint64(s.L1Entries) {
		return format.Corruptf("snapshot table", img.header.SnapshotsOffset, "snapshot %q: an L1 table of %d entries is too small for %d bytes", s.Name, s.L1Entries, s.DiskSize)
	}
	return nil
}

// lookBack makes the image, open for reading, show a snapshot.
func (img *Image) lookBack(idOrName string) error {
	n, err := findSnapshot(img.snapshots, idOrName)
	if err != nil {
		return err
	}
	s := &img.snapshots[n]
	if err := img.checkSnapshot(s); err != nil {
		return err
	}
	img.bitmaps.loaded = true // they speak of the present content
	if img.l1, err = img.readSnapshotL1(s); err != nil {
		return err
	}
	img.l1offset = s.L1Offset
	img.size.Store(int64(s.DiskSize))
	return nil
}
