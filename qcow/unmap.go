package qcow

import (
	"bytes"

	"github.com/qcow-csi/qcow-csi/qcow/format"
)

// Discard says that the guest no longer needs n bytes at off. Clusters that lie in the range as a whole read as zeroes from then
// on, and their space goes back to the file system with the next Flush; other bytes keep their value. In an image of version 2 with a
// backing file, where a cluster can't be marked as zeroes, it does nothing.
func (img *Image) Discard(off, n int64) error {
	epoch, err := img.begin(off, n, true)
	if err != nil {
		return err
	}
	if first, end := img.wholeClusters(off, n); img.canMarkZero() {
		err = img.unmap(first, end)
	}
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
	if err := img.wholeSectors(off, n); err != nil {
		return err
	}
	return img.zeroGuest(off, off+n, mayUnmap)
}

// zeroGuest makes the bytes between off and end read as zeroes, inside an epoch.
func (img *Image) zeroGuest(off, end int64, mayUnmap bool) error {
	first, last := img.wholeClusters(off, end-off)
	if first >= last || !img.canMarkZero() {
		return img.overwriteWithZeroes(off, end)
	}
	if err := img.overwriteWithZeroes(off, first); err != nil {
		return err
	}
	if mayUnmap {
		if err := img.unmap(first, last); err != nil {
			return err
		}
	} else if err := img.zeroKeeping(first, last); err != nil {
		return err
	}
	return img.overwriteWithZeroes(last, end)
}

// canMarkZero reports whether a cluster that is unlinked can read as zeroes.
func (img *Image) canMarkZero() bool { return img.version >= 3 || img.under() == nil }

// wholeClusters returns the guest clusters that lie in the range as a whole. The last cluster of the disk may be a part of one.
func (img *Image) wholeClusters(off, n int64) (first, end int64) {
	size := int64(img.geometry.ClusterSize())
	first, end = (off+size-1)/size*size, off+n
	if end != img.Size() {
		end = end / size * size
	}
	return first, end
}

// overwriteWithZeroes writes zeroes between off and end wherever something else may be read. Whole subclusters are marked.
func (img *Image) overwriteWithZeroes(off, end int64) error {
	return img.eachNonZero(off, end, func(off, n int64, absent bool) (int64, error) {
		return img.zeroSome(off, n, end, absent)
	})
}

// eachNonZero calls zero for the ranges between off and end that may read as something else than zeroes, each as long as zeroes at the most. It
// is told whether the image does not have them itself, and returns how many bytes at the start it has dealt with.
func (img *Image) eachNonZero(off, end int64, zero func(off, n int64, absent bool) (int64, error)) error {
	for off < end {
		m, err := img.lookup(format.GuestOffset(off), uint64(end-off))
		if err != nil {
			return err
		}
		n, isZero, err := img.zeroAtStart(&m, off)
		if err != nil {
			return err
		}
		for done := int64(0); !isZero && done < n; {
			k, err := zero(off+done, min(n-done, int64(len(zeroes))), m.absent())
			if err != nil {
				return err
			}
			done += k
		}
		off += n
	}
	return nil
}

// zeroAtStart returns how many bytes at the start of m are alike in that they read as zeroes, or may not, as far as the tables tell.
func (img *Image) zeroAtStart(m *mapping, off int64) (n int64, zero bool, err error) {
	if m.absent() {
		return img.under().zeroRun(off, int64(m.length))
	}
	return int64(m.length), m.zero(), nil
}

// zeroSome zeroes the first of n bytes at off, which the image perhaps does not have itself, and returns how many. All up to end is to be zeroed
// in the end.
func (img *Image) zeroSome(off, n, end int64, absent bool) (int64, error) {
	g := img.geometry
	if sub := int64(g.SubclusterSize()); g.ExtendedL2 && off%sub == 0 && n >= sub {
		n = min(n, int64(g.ClusterSize()-g.InCluster(format.GuestOffset(off)))) / sub * sub
		marked, err := img.markSubclusters(off, n)
		if err != nil || marked {
			return n, err
		}
	}
	if absent && img.canMarkZero() {
		unit := int64(g.SubclusterSize() - g.InSubcluster(format.GuestOffset(off)))
		n = min(n, unit)
		if marked, err := img.markAround(off, min(end-off, unit)); err != nil || marked {
			return n, err
		}
	}
	k, err := img.writeSome(zeroes[:n], format.GuestOffset(off))
	return int64(k), err
}

// markAround marks a subcluster as zeroes, of which n bytes at off are to be zeroed, where the image has nothing itself and the rest of it
// reads as zeroes as far as the tables tell.
func (img *Image) markAround(off, n int64) (bool, error) {
	g, b := img.geometry, img.under()
	unit := int64(g.SubclusterSize())
	start := off / unit * unit
	end := min(start+unit, img.Size())
	cluster := uint64(start) >> g.ClusterBits
	claim := img.claims.acquire(cluster, cluster+1)
	defer img.claims.release(claim)
	m, err := img.lookup(format.GuestOffset(start), uint64(max(end-start, 1)))
	if err != nil || !m.absent() {
		return false, err
	}
	if m.hosted() {
		if owned, err := img.ownedRun(&mapping{host: m.host, length: 1, copied: m.copied}); err != nil || owned == 0 {
			return false, err
		}
	}
	for _, rest := range [][2]int64{{start, off}, {off + n, end}} {
		if rest[0] >= rest[1] {
			continue
		}
		k, zero, err := b.zeroRun(rest[0], rest[1]-rest[0])
		if err != nil || !zero || k < rest[1]-rest[0] {
			return false, err
		}
	}
	return true, img.markZeroes(format.GuestOffset(start), uint64(unit))
}

// markSubclusters marks whole subclusters of one cluster as zeroes, unless the cluster is compressed or shared.
func (img *Image) markSubclusters(off, n int64) (bool, error) {
	g := img.geometry
	cluster := uint64(off) >> g.ClusterBits
	claim := img.claims.acquire(cluster, cluster+1)
	defer img.claims.release(claim)
	m, err := img.lookup(format.GuestOffset(off), uint64(n))
	if err != nil || m.kind == format.Compressed {
		return false, err
	}
	if m.hosted() {
		if owned, err := img.ownedRun(&mapping{host: m.host, length: 1, copied: m.copied}); err != nil || owned == 0 {
			return false, err
		}
	}
	table, err := img.ownL2Table(format.GuestOffset(off))
	if err != nil {
		return false, err
	}
	first := g.SubclusterIndex(format.GuestOffset(off))
	err = img.setEntries(table, format.GuestOffset(off), 1, func(_ uint64, old format.MappingEntry) format.MappingEntry {
		old.Subclusters = old.Subclusters.WithZero(first, uint64(n)>>g.SubclusterBits())
		return old
	})
	if err == nil && img.external() {
		err = img.punchExternal(format.GuestOffset(off), uint64(n))
	}
	return true, err
}

// zeroKeeping makes whole clusters read as zeroes. Those with a data cluster keep it; the others need none.
func (img *Image) zeroKeeping(off, end int64) error {
	for off < end {
		m, err := img.lookup(format.GuestOffset(off), uint64(end-off))
		if err != nil {
			return err
		}
		if m.kind == format.Data || img.geometry.ExtendedL2 && m.kind == format.UnallocatedHost {
			err = img.overwriteWithZeroes(off, off+int64(m.length))
		} else if !m.zero() { // no subcluster of the first and the last cluster has a place
			size := int64(img.geometry.ClusterSize())
			err = img.unmap(off/size*size, min((off+int64(m.length)+size-1)/size*size, end))
		}
		if err != nil {
			return err
		}
		off += int64(m.length)
	}
	return nil
}

// zeroes is never written to.
var zeroes = make([]byte, 1<<20)

// isZero reports whether p holds nothing but zeroes.
func isZero(p []byte) bool {
	for len(p) > 0 {
		n := min(len(p), len(zeroes))
		if !bytes.Equal(p[:n], zeroes[:n]) {
			return false
		}
		p = p[n:]
	}
	return true
}

// unmap unlinks the clusters between two cluster boundaries, or the end of the disk, and puts them into quarantine. They read as
// zeroes then.
func (img *Image) unmap(off, end int64) error {
	for off < end {
		m, err := img.lookup(format.GuestOffset(off), uint64(end-off))
		if err != nil {
			return err
		}
		n, unlinked := min(int64(img.geometry.ClusterSize()), end-off), false
		if int64(m.length) >= n { // else the subclusters of one cluster differ
			n, unlinked, err = img.withoutCluster(&m, off, end)
		}
		if err == nil && !unlinked {
			n, err = img.unlink(off, n)
		}
		if err != nil {
			return err
		}
		off += n
	}
	return nil
}

// withoutCluster tells whether the first n bytes of m, whole clusters, have none and read as zeroes; else unlink is for them.
func (img *Image) withoutCluster(m *mapping, off, end int64) (n int64, yes bool, err error) {
	size := int64(img.geometry.ClusterSize())
	n = int64(m.length)
	if off+n < end {
		n = n / size * size
	}
	if m.kind != format.ZeroedPlain && m.kind != format.Unallocated {
		return n, false, nil
	}
	k, zero, err := img.zeroAtStart(m, off)
	if err != nil || !zero {
		return n, false, err
	}
	if off+k < end {
		k = k / size * size
	}
	if k == 0 { // the backing file has something in the cluster
		return min(size, end-off), false, nil
	}
	return k, true, nil
}

// unlink unmaps the first of n guest bytes that are mapped alike, and returns how many. They begin at a cluster boundary and end at
// one, or where the disk does.
func (img *Image) unlink(off, n int64) (int64, error) {
	n, part, err := img.unlinkWhole(format.GuestOffset(off), uint64(n))
	if err == nil && part {
		err = img.overwriteWithZeroes(off, off+n)
	}
	return n, err
}

// unlinkWhole is unlink for whole clusters. part says that it was asked for less than one and did nothing: what was the end of the
// disk is no more, the disk has grown.
func (img *Image) unlinkWhole(off format.GuestOffset, length uint64) (n int64, part bool, err error) {
	g := img.geometry
	length = min(length, img.sliceSpan(off))
	claim := img.claims.acquire(uint64(off)>>g.ClusterBits, (uint64(off)+length-1)>>g.ClusterBits+1)
	defer img.claims.release(claim)
	m, err := img.lookup(off, length) // again: only the claim keeps it so
	if err != nil {
		return 0, false, err
	}
	if g.ExtendedL2 {
		m.length = min(length, g.ClusterSize()) // one entry, whatever its subclusters are
	}
	if end := uint64(off) + m.length; end%g.ClusterSize() != 0 && end != uint64(img.Size()) {
		if m.length < g.ClusterSize() {
			return int64(m.length), true, nil
		}
		m.length &^= g.ClusterSize() - 1
	}
	clusters := g.ClustersFor(m.length)
	if err := img.mayUnlink(&m, clusters); err != nil {
		return 0, false, err
	}
	table, err := img.ownL2Table(off)
	if err != nil {
		return 0, false, err
	}
	if err := img.setEntries(table, off, clusters, func(uint64, format.MappingEntry) format.MappingEntry { return img.erased() }); err != nil {
		return 0, false, err
	}
	img.quarantine.add(img.hostRun(&m, clusters))
	if img.external() {
		err = img.punchExternal(off, m.length)
	}
	return int64(m.length), false, err
}

// erased returns the entry of a cluster that reads as zeroes and has no place in the file.
func (img *Image) erased() format.MappingEntry {
	switch {
	case img.under() == nil:
		return format.MappingEntry{}
	case img.geometry.ExtendedL2:
		return format.MappingEntry{Subclusters: format.AllZero}
	}
	return format.MappingEntry{L2Entry: format.ZeroPlain}
}

// mayUnlink checks that the first n clusters of m are the guest's to give up: in a corrupt image they may be metadata.
func (img *Image) mayUnlink(m *mapping, n uint64) error {
	x := img.hostRun(m, n)
	if x.n == 0 {
		return nil
	}
	return img.mustBeData(img.geometry.OffsetOf(x.first), x.n<<img.geometry.ClusterBits)
}

// hostRun returns the clusters of the image file that the first n guest clusters of m are mapped to; none where guest data is
// elsewhere.
func (img *Image) hostRun(m *mapping, n uint64) run {
	g := img.geometry
	switch {
	case img.external():
		return run{}
	case m.kind == format.Compressed:
		off, length := m.entry.CompressedRange(g)
		first, last := g.ClusterOf(off), g.ClusterOf(off+format.HostOffset(length-1))
		return run{first, uint64(last-first) + 1}
	case m.hosted():
		return run{g.ClusterOf(m.host), n}
	}
	return run{}
}

// punchExternal makes the bytes of the data file that belong to the guest offset off read as zeroes, as the entries say already: who reads
// the file as a raw image sees the same.
func (img *Image) punchExternal(off format.GuestOffset, n uint64) error {
	return img.data.PunchHole(int64(off), int64(n))
}
