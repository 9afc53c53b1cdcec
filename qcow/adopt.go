package qcow

import "github.com/qcow-csi/qcow-csi/qcow/format"

// An adoption makes the image's own what it reads from its backing file so far. Requests go on meanwhile; one that wants to write to what is
// being adopted waits for the end. All data is stored first, then made durable with one sync, then linked: a crash in between leaves the
// image reading from the backing file.
type adoption struct {
	img    *Image
	claims []claim
	stored []*remap
}

// add takes b over, which the backing file holds at off: whole subclusters, the last one perhaps cut off by the end of the disk. Where the image
// has got a mapping meanwhile it keeps that. Ranges come in ascending order. After an error too finish has to be called.
func (a *adoption) add(b []byte, off int64) error {
	img, g := a.img, a.img.geometry
	first, end := uint64(off)>>g.ClusterBits, (uint64(off)+uint64(len(b))-1)>>g.ClusterBits+1
	if n := len(a.claims); n > 0 && a.claims[n-1].end > first { // two ranges in one cluster
		first++
	}
	if first < end {
		a.claims = append(a.claims, img.claims.acquire(first, end))
	}
	epoch := img.epochs.enter()
	defer img.epochs.leave(epoch)
	for at := format.GuestOffset(off); len(b) > 0; {
		m, err := img.lookup(at, min(uint64(len(b)), img.sliceSpan(at)))
		if err != nil {
			return err
		}
		n := int(m.length)
		if m.absent() {
			if n, err = a.take(b[:n], at, &m); err != nil {
				return err
			}
		}
		b, at = b[n:], at+format.GuestOffset(n)
	}
	return nil
}

// take stores, or marks, the first subclusters of b that are zeroes, or are not, and returns how many bytes these are.
func (a *adoption) take(b []byte, off format.GuestOffset, m *mapping) (int, error) {
	unit := int(a.img.geometry.SubclusterSize())
	n := min(unit, len(b))
	zero := isZero(b[:n])
	for n < len(b) && isZero(b[n:min(n+unit, len(b))]) == zero {
		n = min(n+unit, len(b))
	}
	if zero && a.img.version >= 3 {
		return n, a.img.markZeroes(off, uint64(n))
	}
	if last := len(a.stored) - 1; last >= 0 && (a.stored[last].end()-1)>>a.img.geometry.ClusterBits == off>>a.img.geometry.ClusterBits {
		// The cluster gets its place only now; what follows goes there too.
		if err := a.link(); err != nil {
			return 0, err
		}
		now, err := a.img.lookup(off, uint64(n))
		if err != nil {
			return 0, err
		}
		m, n = &now, int(now.length)
	}
	w := &remap{img: a.img, m: *m, off: off, p: b[:n]}
	a.stored = append(a.stored, w)
	if err := w.store(); err != nil {
		return 0, err
	}
	return len(w.p), nil
}

// link makes what was stored durable and links it.
func (a *adoption) link() error {
	if len(a.stored) == 0 {
		return nil
	}
	if err := a.img.syncData(); err != nil {
		return err
	}
	for len(a.stored) > 0 {
		if err := a.stored[0].link(); err != nil {
			return err
		}
		a.stored = a.stored[1:]
	}
	return nil
}

// finish ends the adoption: what was added is linked, unless that failed.
func (a *adoption) finish(err error) error {
	if err == nil {
		err = a.link()
	}
	for _, w := range a.stored {
		w.undo()
	}
	for _, c := range a.claims {
		a.img.claims.release(c)
	}
	return err
}

// markZeroes marks n bytes at off, whole subclusters in one slice which the image does not have itself and that are claimed, as zeroes.
func (img *Image) markZeroes(off format.GuestOffset, n uint64) error {
	g := img.geometry
	table, err := img.ownL2Table(off)
	if err != nil {
		return err
	}
	end := off + format.GuestOffset(n)
	return img.setEntries(table, off, g.ClustersFor(g.InCluster(off)+n), func(i uint64, old format.MappingEntry) format.MappingEntry {
		if !g.ExtendedL2 {
			return format.MappingEntry{L2Entry: format.ZeroPlain}
		}
		old.Subclusters = old.Subclusters.WithZero(img.subclusters(off, end, i))
		return old
	})
}
