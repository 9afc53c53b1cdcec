package qcow

import (
	"fmt"

	"github.com/qcow-csi/qcow-csi/qcow/format"
)

// WriteAt writes p to the virtual disk at off. Once it has returned nil the data is in the file and outlives the process;
// Flush makes it outlive the machine. A write that reaches past the end of the disk is ErrInvalid and writes nothing. After another
// error some of the bytes before n+1 may be written, those behind are not mapped anew.
func (img *Image) WriteAt(p []byte, off int64) (n int, err error) {
	epoch, err := img.begin(off, int64(len(p)), true)
	if err != nil {
		return 0, err
	}
	defer img.epochs.leave(epoch)
	for n < len(p) {
		k, err := img.writeSome(p[n:], format.GuestOffset(off)+format.GuestOffset(n))
		n += k
		if err != nil {
			return n, err
		}
	}
	return n, nil
}

// writeSome writes a part of p that is mapped alike.
func (img *Image) writeSome(p []byte, off format.GuestOffset) (int, error) {
	m, err := img.lookup(off, uint64(len(p)))
	if err != nil {
		return 0, err
	}
	if m.kind == format.Data {
		return img.writeInPlace(p[:m.length], &m)
	}
	return img.writeNew(p[:m.length], off)
}

// writeInPlace writes into clusters that the guest owns already.
func (img *Image) writeInPlace(p []byte, m *mapping) (int, error) {
	if err := img.metadata.mustBeData(m.host, uint64(len(p))); err != nil {
		return 0, err
	}
	if !m.copied {
		if err := img.mustBeSole(m.host, uint64(len(p))); err != nil {
			return 0, err
		}
	}
	return img.file.WriteAt(p, int64(m.host))
}

// mustBeSole checks, for clusters without the COPIED flag, that they have one owner all the same. Without internal snapshots nothing
// else is valid.
func (img *Image) mustBeSole(host format.HostOffset, n uint64) error {
	g := img.geometry
	for c := g.ClusterOf(host); c <= g.ClusterOf(host+format.HostOffset(n-1)); c++ {
		count, err := img.alloc.refcount(c)
		if err != nil {
			return err
		}
		if count != 1 {
			return format.Corruptf("refcount block", g.OffsetOf(c), "a data cluster in use has the refcount %d", count)
		}
	}
	return nil
}

// writeNew writes p, which begins in a guest cluster that has no data cluster, to a new one, and as many as follow without a gap. The
// order is: data, then the L2 entries. A crash between leaks the clusters, nothing else.
func (img *Image) writeNew(p []byte, off format.GuestOffset) (int, error) {
	g := img.geometry
	first := uint64(off) >> g.ClusterBits
	end := (uint64(off)+uint64(len(p))-1)>>g.ClusterBits + 1
	claim := img.claims.acquire(first, end)
	defer img.claims.release(claim)

	// Another request may have mapped the clusters before the claim was granted.
	m, err := img.lookup(off, uint64(len(p)))
	if err != nil {
		return 0, err
	}
	p = p[:m.length]
	if m.kind == format.Data {
		return img.writeInPlace(p, &m)
	}
	if m.kind == format.ZeroAllocated {
		if err := img.mayUnlink(&m); err != nil {
			return 0, err
		}
	}
	table := m.table
	if table == 0 {
		if table, err = img.makeL2Table(off); err != nil {
			return 0, err
		}
	}
	skip := g.InCluster(off)
	p = p[:min(uint64(len(p)), img.sliceSpan(off))]
	x, err := img.alloc.take(g.ClustersFor(skip + uint64(len(p))))
	if err != nil {
		return 0, err
	}
	p = p[:min(uint64(len(p)), x.n<<g.ClusterBits-skip)]
	host := g.OffsetOf(x.first)
	if err := img.metadata.mustBeData(host, x.n<<g.ClusterBits); err != nil {
		img.alloc.giveBack(x)
		return 0, err
	}
	if _, err := img.file.WriteAt(p, int64(host)+int64(skip)); err != nil {
		img.alloc.giveBack(x)
		return 0, fmt.Errorf("write %d bytes to new clusters at %#x: %w", len(p), uint64(host), err)
	}
	err = img.setEntries(table, off, x.n, func(i uint64) format.L2Entry {
		return format.NewL2Entry(host+format.HostOffset(i<<g.ClusterBits), true)
	})
	if err != nil {
		img.alloc.giveBack(x)
		return 0, err
	}
	if m.kind == format.ZeroAllocated {
		img.quarantine.add(run{g.ClusterOf(m.host), x.n})
	}
	return len(p), nil
}

// sliceSpan returns how many guest bytes from off on have their L2 entries in one slice.
func (img *Image) sliceSpan(off format.GuestOffset) uint64 {
	g := img.geometry
	perSlice := img.tables.sliceSize / format.EntrySize
	return (perSlice-g.L2Index(off)%perSlice)<<g.ClusterBits - g.InCluster(off)
}
