package qcow

import (
	"fmt"

	"github.com/qcow-csi/qcow-csi/qcow/format"
)

// ownL2Table returns the L2 table for off, which the active L1 table alone refers to: it makes one where there is none, and a
// copy where a snapshot has the table too.
func (img *Image) ownL2Table(off format.GuestOffset) (format.HostOffset, error) {
	i := img.geometry.L1Index(off)
	if e := img.l1Entry(i); e.Copied() && e.Offset() != 0 {
		return e.Offset(), nil
	}
	img.newTable.Lock()
	defer img.newTable.Unlock()
	e := img.l1Entry(i)
	if e.Offset() == 0 {
		return img.makeL2Table(i)
	}
	if e.Copied() {
		return e.Offset(), nil
	}
	count, err := img.alloc.refcount(img.geometry.ClusterOf(e.Offset()))
	if err != nil || count == 1 {
		return e.Offset(), err
	}
	if count == 0 {
		return 0, format.Corruptf("refcount block", e.Offset(), "the refcount of an L2 table in use is 0")
	}
	return img.copyL2Table(i, e.Offset())
}

// makeL2Table makes the L2 table for L1 entry i, which has none. Clusters of the reserve read as zeroes durably, so the table is
// valid the moment the L1 entry is (rule 4); it is written out all the same, so that a full disk is met here and not when a
// data cluster is to be linked.
func (img *Image) makeL2Table(i uint64) (format.HostOffset, error) {
	x, err := img.alloc.take(1)
	if err != nil {
		return 0, err
	}
	table := img.geometry.OffsetOf(x.first)
	if _, err := img.file.WriteAt(make([]byte, img.geometry.ClusterSize()), int64(table)); err != nil {
		img.alloc.giveBack(x)
		return 0, fmt.Errorf("write L2 table at %#x: %w", uint64(table), err)
	}
	return table, img.linkL2Table(i, x)
}

// copyL2Table replaces the table of L1 entry i, which a snapshot refers to as well, by a copy. The clusters that it maps
// have been counted for both before, so their refcounts stay. The copy is durable before the L1 entry is (rule 4).
func (img *Image) copyL2Table(i uint64, shared format.HostOffset) (format.HostOffset, error) {
	g := img.geometry
	b := make([]byte, g.ClusterSize())
	if err := readFull(img.file, b, shared); err != nil {
		return 0, fmt.Errorf("read L2 table at %#x: %w", uint64(shared), err)
	}
	if err := img.flagSole(b, shared); err != nil {
		return 0, err
	}
	x, err := img.alloc.take(1)
	if err != nil {
		return 0, err
	}
	table := g.OffsetOf(x.first)
	if _, err = img.file.WriteAt(b, int64(table)); err == nil {
		err = img.sync()
	}
	if err != nil {
		img.alloc.giveBack(x)
		return 0, fmt.Errorf("write L2 table at %#x: %w", uint64(table), err)
	}
	if err := img.linkL2Table(i, x); err != nil {
		return 0, err
	}
	img.quarantine.add(run{g.ClusterOf(shared), 1})
	return table, nil
}

// flagSole sets COPIED in the entries of a table that refer to clusters of which they are the only owner, and clears it in the others.
func (img *Image) flagSole(table []byte, at format.HostOffset) error {
	g := img.geometry
	for i := range g.L2Entries() {
		e, err := img.entryAt(table, i, at, i)
		if err != nil {
			return err
		}
		if e.L2Entry.Kind() == format.Compressed || e.Offset() == 0 || img.external() {
			continue
		}
		count, err := img.alloc.refcount(g.ClusterOf(e.Offset()))
		if err != nil {
			return err
		}
		e.L2Entry = e.WithCopied(count == 1)
		g.PutMappingEntry(table, i, e)
	}
	return nil
}

// linkL2Table makes the active L1 table refer to the new table in x. When it fails x is given back.
func (img *Image) linkL2Table(i uint64, x run) error {
	img.metadata.add(x)
	entry := make([]byte, format.EntrySize)
	format.PutEntry(entry, 0, uint64(format.NewL1Entry(img.geometry.OffsetOf(x.first), true)))
	at := img.l1offset + format.HostOffset(i*format.EntrySize)
	if err := img.overwrite(at, img.l1[i*format.EntrySize:][:format.EntrySize], entry); err != nil {
		img.metadata.remove(x)
		img.alloc.giveBack(x)
		return fmt.Errorf("write L1 entry %d: %w", i, err)
	}
	img.l1mu.Lock()
	defer img.l1mu.Unlock()
	copy(img.l1[i*format.EntrySize:], entry)
	return nil
}
