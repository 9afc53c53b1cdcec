package qcow

import (
	"fmt"

	"github.com/qcow-csi/qcow-csi/qcow/format"
)

// maxCopy is how many bytes a write is made longer for copied ones at its ends to go with it. The ends of a longer one are written by themselves.
const maxCopy = 1 << 20

// writeNew writes the start of p, for which the mapping at off has to change.
func (img *Image) writeNew(p []byte, off format.GuestOffset) (int, error) {
	g := img.geometry
	p = p[:min(uint64(len(p)), img.sliceSpan(off))]
	claim := img.claims.acquire(uint64(off)>>g.ClusterBits, (uint64(off)+uint64(len(p))-1)>>g.ClusterBits+1)
	defer img.claims.release(claim)
	return img.writeClaimed(p, off)
}

// writeClaimed is writeNew for whoever has claimed the clusters.
func (img *Image) writeClaimed(p []byte, off format.GuestOffset) (int, error) {
	p = p[:min(uint64(len(p)), img.sliceSpan(off))]
	// Another request may have mapped the clusters before the claim was granted.
	m, err := img.lookup(off, uint64(len(p)))
	if err != nil {
		return 0, err
	}
	if m.kind == format.Data {
		owned, err := img.ownedRun(&m)
		if err != nil {
			return 0, err
		}
		if owned > 0 {
			return img.writeInPlace(p[:owned], off, &m)
		}
	}
	w := remap{img: img, m: m, off: off, p: p[:m.length]}
	err = w.store()
	if err == nil {
		err = w.publish()
	}
	if err != nil {
		w.undo()
		return 0, fmt.Errorf("write %d bytes to guest clusters at %#x: %w", len(w.p), uint64(off), err)
	}
	return len(w.p), nil
}

// remap is a write that changes the L2 entries of neighbouring guest clusters, which are claimed and mapped alike and lie in one slice.
// Their data goes to new clusters; with subclusters, where the clusters have a place of their own already that is not in use yet for those
// which are written, it goes there. What the request does not cover of a cluster or subcluster, and of data that has to move, is copied
// with it, in one write. Then the clusters are linked. A crash between leaks them, nothing else.
//
// Where the guest reads zeroes so far and the new cluster holds zeroes durably, the link needs no sync before it. Elsewhere the data has to be
// durable first (rule 3): a link without its data would show neither what was there before nor what was written. With a journal the link is
// held back until a flush (heldLinks); without one a sync makes the data durable, which requests at the same time share.
type remap struct {
	img   *Image
	m     mapping // of off
	off   format.GuestOffset
	p     []byte // is cut to what can be written at once
	stays bool   // the clusters stay where they are

	table   format.HostOffset
	placed  bool
	first   format.Cluster // where the guest clusters will be
	before  uint64         // bytes to copy before p
	behind  uint64         // and behind it
	durable bool           // no sync is needed before the link
}

func (w *remap) end() format.GuestOffset { return w.off + format.GuestOffset(len(w.p)) }

// clusters returns how many guest clusters p touches.
func (w *remap) clusters() uint64 {
	g := w.img.geometry
	return g.ClustersFor(g.InCluster(w.off) + uint64(len(w.p)))
}

// store writes the data, cut to what can be written at once. Nothing refers to it before link; without that, undo is called.
func (w *remap) store() error {
	img, g := w.img, w.img.geometry
	if w.m.hosted() {
		owned, err := img.ownedRun(&w.m)
		if err != nil {
			return err
		}
		if owned > 0 {
			w.p = w.p[:owned]
			w.stays = g.ExtendedL2
		}
	}
	if err := img.mayUnlink(&w.m, w.clusters()); err != nil {
		return err
	}
	var err error
	if w.table, err = img.ownL2Table(w.off); err != nil {
		return err
	}
	fresh, err := w.cutToFresh()
	if err != nil {
		return err
	}
	clean, err := w.place(fresh)
	if err != nil {
		return err
	}
	kept, err := w.extend()
	if err != nil {
		return err
	}
	if w.durable = fresh && !kept && clean; fresh && !kept {
		_, err = img.data.WriteAt(w.p, w.host())
		return err
	}
	return w.copying()
}

// publish makes the guest clusters refer to what was stored, for good as far as the process goes.
func (w *remap) publish() error {
	if !w.durable {
		if held, err := w.hold(); held || err != nil {
			return err
		}
		if err := w.img.syncData(); err != nil {
			return err
		}
	}
	return w.link()
}

// link makes the guest clusters refer to what was stored, which is durable unless it may be lost.
func (w *remap) link() error {
	if err := w.img.setEntries(w.table, w.off, w.clusters(), w.entry); err != nil {
		return err
	}
	w.placed = false
	if !w.stays {
		w.img.quarantine.add(w.img.hostRun(&w.m, w.clusters()))
	}
	return nil
}

// undo gives back clusters that were not linked.
func (w *remap) undo() {
	if w.placed {
		w.img.alloc.giveBack(run{w.first, w.clusters()})
	}
}

// cutToFresh tells whether what p touches of the first clusters reads as zeroes so far, and cuts p to those clusters.
func (w *remap) cutToFresh() (bool, error) {
	img, g := w.img, w.img.geometry
	if w.stays || !img.freshReadsZero() || !w.m.zero() && !w.m.absent() {
		return false, nil
	}
	if w.m.zero() || img.under() == nil {
		return true, nil
	}
	sub := format.GuestOffset(g.SubclusterSize())
	start, end := w.off&^(sub-1), min((w.end()+sub-1)&^(sub-1), format.GuestOffset(img.Size()))
	if start >= end {
		return true, nil // the disk grows
	}
	n, zero, err := img.under().zeroRun(int64(start), int64(end-start))
	if err != nil || !zero {
		return false, err
	}
	if start+format.GuestOffset(n) < end {
		cut := (start + format.GuestOffset(n)) &^ format.GuestOffset(g.ClusterSize()-1)
		if cut <= w.off {
			return false, nil
		}
		w.p = w.p[:cut-w.off]
	}
	return true, nil
}

// place finds a place for the clusters, and cuts p to those that have one. New ones are zeroes unless the data file is external: there the place
// is given. Whether they are clean (reserve) matters where the guest reads zeroes so far.
func (w *remap) place(fresh bool) (clean bool, err error) {
	img, g := w.img, w.img.geometry
	if w.stays {
		w.first = g.ClusterOf(w.m.host)
		return true, nil
	}
	x := run{format.Cluster(uint64(w.off) >> g.ClusterBits), w.clusters()}
	if clean = true; !img.external() {
		if img.links == nil {
			x, err = img.alloc.take(x.n)
		} else {
			x, clean, err = img.alloc.takeSoon(x.n, fresh)
		}
		if err != nil {
			return false, err
		}
		if err := img.mustBeData(g.OffsetOf(x.first), x.n<<g.ClusterBits); err != nil {
			img.alloc.giveBack(x)
			return false, err
		}
		w.placed = true
	}
	w.first = x.first
	w.p = w.p[:min(uint64(len(w.p)), x.n<<g.ClusterBits-g.InCluster(w.off))]
	return clean, nil
}

// host returns where p goes.
func (w *remap) host() int64 {
	g := w.img.geometry
	return int64(g.OffsetOf(w.first)) + int64(g.InCluster(w.off))
}

// extend finds out what has to be copied with p: the rest of the clusters or subclusters that it touches, and data that would lose its
// place. It tells whether there is any of the latter.
func (w *remap) extend() (kept bool, err error) {
	g := w.img.geometry
	first, last := w.m.entry, w.m.entry
	lastOff := w.end() - 1
	if g.ExtendedL2 && w.clusters() > 1 {
		m, err := w.img.lookup(lastOff, 1)
		if err != nil {
			return false, err
		}
		last = m.entry
	}
	from, to := g.SubclusterIndex(w.off), g.SubclusterIndex(lastOff)+1
	for i := range g.Subclusters() {
		if i < from && w.keeps(first, i) {
			from, kept = i, true
		}
		if i >= to && w.keeps(last, i) {
			to, kept = i+1, true
		}
	}
	w.before = g.InCluster(w.off) - from<<g.SubclusterBits()
	w.behind = to<<g.SubclusterBits() - g.InCluster(lastOff) - 1
	if w.img.external() && w.img.cipher == nil { // the file ends with the disk; what comes behind when that grows reads as zeroes
		w.behind = min(w.behind, uint64(max(w.img.Size()-int64(w.end()), 0)))
	}
	return kept, nil
}

// keeps reports whether subcluster i of an entry has data that moves with its cluster.
func (w *remap) keeps(e format.MappingEntry, i uint64) bool {
	kind := w.img.geometry.Kind(e, i)
	return !w.stays && (kind == format.Data || kind == format.Compressed)
}

// entry returns the L2 entry of the cluster with index i among those that are written.
func (w *remap) entry(i uint64, old format.MappingEntry) format.MappingEntry {
	img, g := w.img, w.img.geometry
	e := format.MappingEntry{L2Entry: old.L2Entry}
	if !w.stays {
		e.L2Entry = format.NewL2Entry(g.OffsetOf(w.first+format.Cluster(i)), true)
	}
	if !g.ExtendedL2 {
		return e
	}
	e.Subclusters = old.Subclusters
	if old.L2Entry.Kind() == format.Compressed {
		e.Subclusters = format.AllData
	}
	e.Subclusters = e.Subclusters.WithData(img.subclusters(w.off, w.end(), i))
	return e
}

// subclusters returns which subclusters the bytes from off to end touch in the i-th cluster that they touch, from 0.
func (img *Image) subclusters(off, end format.GuestOffset, i uint64) (first, n uint64) {
	g := img.geometry
	start := off&^format.GuestOffset(g.ClusterSize()-1) + format.GuestOffset(i<<g.ClusterBits)
	last := g.Subclusters() - 1
	if off > start {
		first = g.SubclusterIndex(off)
	}
	if end-start < format.GuestOffset(g.ClusterSize()) {
		last = g.SubclusterIndex(end - 1)
	}
	return first, last - first + 1
}

// copying writes p and what is to be copied with it.
func (w *remap) copying() error {
	img, g := w.img, w.img.geometry
	p, off, before, behind := w.p, w.off, w.before, w.behind
	host := format.HostOffset(w.host())
	if whole := before + uint64(len(p)) + behind; whole > max(maxCopy, g.ClusterSize()) { // and so more than one cluster
		if before > 0 {
			n := g.ClusterSize() - g.InCluster(off)
			if err := img.writeBetween(p[:n], off, host, before, 0); err != nil {
				return err
			}
			p, off, host, before = p[n:], off+format.GuestOffset(n), host+format.HostOffset(n), 0
		}
		if n := uint64(len(p)) - g.InCluster(w.end()); behind > 0 && n > 0 {
			if _, err := img.writeHost(p[:n], host, off); err != nil {
				return err
			}
			p, off, host = p[n:], off+format.GuestOffset(n), host+format.HostOffset(n)
		}
	}
	return img.writeBetween(p, off, host, before, behind)
}

// writeBetween writes p, which belongs to the guest offset off, to host, together with so many bytes before and behind it as the guest reads
// them now.
func (img *Image) writeBetween(p []byte, off format.GuestOffset, host format.HostOffset, before, behind uint64) error {
	b := p
	if before > 0 || behind > 0 {
		b = buffers.get(int(before + uint64(len(p)) + behind))
		defer buffers.put(b)
		if err := img.readOrZero(b[:before], off-format.GuestOffset(before)); err != nil {
			return err
		}
		copy(b[before:], p)
		if err := img.readOrZero(b[before+uint64(len(p)):], off+format.GuestOffset(len(p))); err != nil {
			return err
		}
	}
	_, err := img.writeHost(b, host-format.HostOffset(before), off-format.GuestOffset(before))
	return err
}

// readOrZero reads what the guest reads at off, and zeroes behind the end of the disk.
func (img *Image) readOrZero(p []byte, off format.GuestOffset) error {
	n := min(uint64(len(p)), uint64(max(img.Size()-int64(off), 0)))
	clear(p[n:])
	_, err := img.readGuest(p[:n], off)
	return err
}
