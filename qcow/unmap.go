package qcow

import "github.com/qcow-csi/qcow-csi/qcow/format"

// Discard says that the guest no longer needs n bytes at off. Clusters that lie in the range as a whole read as zeroes from then
// on, and their space goes back to the file system with the next Flush; other bytes keep their value.
func (img *Image) Discard(off, n int64) error {
	epoch, err := img.begin(off, n, true)
	if err != nil {
		return err
	}
	first, end := img.wholeClusters(off, n)
	err = img.unmap(first, end)
	img.epochs.leave(epoch)
	if err != nil {
		return err
	}
	if img.quarantine.length() >= quarantineLimit {
		return img.Flush()
	}
	return nil
}

// WriteZeroes makes n bytes at off read as zeroes. With mayUnmap the space of whole clusters goes back to the file system
// with the next Flush; without, every cluster that is allocated stays so.
func (img *Image) WriteZeroes(off, n int64, mayUnmap bool) error {
	epoch, err := img.begin(off, n, true)
	if err != nil {
		return err
	}
	defer img.epochs.leave(epoch)
	first, end := img.wholeClusters(off, n)
	if !mayUnmap || first >= end {
		return img.zeroInPlace(off, off+n)
	}
	if err := img.zeroInPlace(off, first); err != nil {
		return err
	}
	if err := img.unmap(first, end); err != nil {
		return err
	}
	return img.zeroInPlace(end, off+n)
}

// wholeClusters returns the guest clusters that lie in the range as a whole. The last cluster of the disk may be a part of one.
func (img *Image) wholeClusters(off, n int64) (first, end int64) {
	size := int64(img.geometry.ClusterSize())
	first, end = (off+size-1)/size*size, off+n
	if end != img.Size() {
		end = end / size * size
	}
	return first, end
}

// zeroInPlace writes zeroes to the data clusters between off and end; what has none reads as zeroes already.
func (img *Image) zeroInPlace(off, end int64) error {
	for off < end {
		m, err := img.lookup(format.GuestOffset(off), uint64(end-off))
		if err != nil {
			return err
		}
		for done := uint64(0); m.kind == format.Data && done < m.length; {
			part := zeroes[:min(m.length-done, uint64(len(zeroes)))]
			at := m
			at.host += format.HostOffset(done)
			if _, err := img.writeInPlace(part, &at); err != nil {
				return err
			}
			done += uint64(len(part))
		}
		off += int64(m.length)
	}
	return nil
}

// zeroes is never written to.
var zeroes = make([]byte, 1<<20)

// unmap unlinks the clusters between two cluster boundaries, or the end of the disk, and puts them into quarantine.
func (img *Image) unmap(off, end int64) error {
	for off < end {
		m, err := img.lookup(format.GuestOffset(off), uint64(end-off))
		if err != nil {
			return err
		}
		if m.kind == format.Data || m.kind == format.ZeroAllocated {
			if m.length, err = img.unlink(format.GuestOffset(off), m.length); err != nil {
				return err
			}
		}
		off += int64(m.length)
	}
	return nil
}

// unlink unmaps the first of n guest bytes that are mapped alike, and returns how many.
func (img *Image) unlink(off format.GuestOffset, n uint64) (uint64, error) {
	g := img.geometry
	claim := img.claims.acquire(uint64(off)>>g.ClusterBits, (uint64(off)+n-1)>>g.ClusterBits+1)
	defer img.claims.release(claim)
	m, err := img.lookup(off, n) // again: only the claim keeps it so
	if err != nil || (m.kind != format.Data && m.kind != format.ZeroAllocated) {
		return m.length, err
	}
	if end := uint64(off) + m.length; end%g.ClusterSize() != 0 && end != uint64(img.Size()) {
		// The disk has grown into what was its last cluster, and somebody may have written there since.
		whole := (uint64(off) + m.length) / g.ClusterSize() * g.ClusterSize()
		if whole <= uint64(off) {
			return m.length, img.zeroInPlace(int64(off), int64(end))
		}
		m.length = whole - uint64(off)
	}
	if err := img.mayUnlink(&m); err != nil {
		return 0, err
	}
	clusters := g.ClustersFor(m.length)
	if err := img.setEntries(m.table, off, clusters, func(uint64) format.L2Entry { return 0 }); err != nil {
		return 0, err
	}
	img.quarantine.add(run{g.ClusterOf(m.host), clusters})
	return m.length, nil
}

// mayUnlink checks that the clusters of m, whole ones, are the guest's to give up: in a corrupt image they may be metadata, or
// somebody else's too.
func (img *Image) mayUnlink(m *mapping) error {
	start := m.host &^ format.HostOffset(img.geometry.ClusterSize()-1)
	n := uint64(m.host-start) + m.length
	if err := img.metadata.mustBeData(start, n); err != nil {
		return err
	}
	return img.mustBeSole(start, n)
}
