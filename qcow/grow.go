package qcow

import (
	"context"
	"fmt"

	"github.com/qcow-csi/qcow-csi/qcow/format"
)

// ResizeOptions say more about a resize than the size.
type ResizeOptions struct {
	Preallocation Preallocation // of what the disk gains

	// Progress, unless nil, is called now and then with how many bytes of the gain of how many are preallocated.
	Progress func(done, total int64)
}

// maxPreallocated is how many bytes of the disk are preallocated between two syncs, if a cluster is not larger.
const maxPreallocated = 1 << 30

// ResizeWith is Resize with preallocation of what the disk gains. When it fails, or ctx ends, the disk has its old size, and what was
// allocated for the new one goes back to the file system. A crash may leave clusters allocated behind the end of the disk, which
// the next resize gives back. To shrink with preallocation is ErrInvalid. A disk whose data file is a raw image gets
// PreallocationMetadata at least.
func (img *Image) ResizeWith(ctx context.Context, size int64, o ResizeOptions) error {
	if o.Preallocation > PreallocationFull {
		return format.Invalidf("%v is not known", o.Preallocation)
	}
	if o.Preallocation == PreallocationOff {
		if size <= img.Size() || !img.rawDataFile() {
			return img.Resize(ctx, size)
		}
		o.Preallocation = PreallocationMetadata
	}
	end, err := img.maintain(ctx)
	if err != nil {
		return err
	}
	defer end()
	old := img.Size()
	switch {
	case size == old:
		return nil
	case size < old:
		return format.Invalidf("preallocation when the disk shrinks from %d to %d bytes", old, size)
	case size%format.SectorSize != 0 || uint64(size) > img.geometry.MaxVirtualSize():
		return format.Invalidf("size %d is not a multiple of %d or exceeds the limit of %d for clusters of %d bytes", size, format.SectorSize, img.geometry.MaxVirtualSize(), img.geometry.ClusterSize())
	}
	if err := img.completeSnapshots(); err != nil {
		return err
	}
	if err := img.bitmaps.mayResize(uint64(size)); err != nil {
		return err
	}
	return (&growth{img: img, ctx: ctx, old: old, size: size, o: o}).run()
}

// rawDataFile reports whether the data file is at any time a raw image of the disk.
func (img *Image) rawDataFile() bool {
	img.headerMu.Lock()
	defer img.headerMu.Unlock()
	return img.external() && img.header.Autoclear&format.AutoclearRawDataFile != 0
}

// growth makes a disk larger and allocates what it gains: behind its end at first, where no request reaches, so that the
// gain appears as a whole when the header has the new size.
type growth struct {
	img       *Image
	ctx       context.Context
	old, size int64
	o         ResizeOptions
}

func (w *growth) run() error {
	img := w.img
	release := w.claimLast()
	undo, err := w.prepare()
	if len(img.bitmaps.list) > 0 && err == nil {
		// They switch together with the size, for which nobody may wait for a claim held here; nor may anybody unlink the last cluster
		// between the two.
		release()
		release = img.freeze()
	}
	defer release()
	if err == nil {
		err = img.switchSize(w.old, w.size)
	}
	if err != nil {
		if img.poisoned() == nil {
			w.forget()
			undo()
		}
		return err
	}
	img.size.Store(w.size)
	return nil
}

// claimLast claims the cluster in which the disk ends, if it ends within one: so long nobody unlinks it believing that there is nothing of
// the disk behind.
func (w *growth) claimLast() (release func()) {
	img, g := w.img, w.img.geometry
	if g.InCluster(format.GuestOffset(w.old)) == 0 {
		return func() {}
	}
	last := uint64(w.old) >> g.ClusterBits
	claim := img.claims.acquire(last, last+1)
	return func() { img.claims.release(claim) }
}

// prepare does all but switch to the new size. undo is for when that can't be done.
func (w *growth) prepare() (undo func(), err error) {
	img := w.img
	if entries := img.geometry.L1EntriesFor(uint64(w.size)); entries > uint64(len(img.l1))/format.EntrySize {
		if err := img.growL1(entries, w.old); err != nil {
			return func() {}, err
		}
	}
	undo, err = w.lengthen()
	if err == nil {
		err = img.clearBehind(w.old, w.size)
	}
	if err == nil {
		err = w.allocate()
	}
	return undo, err
}

// boundary returns the end of the disk's last cluster.
func (w *growth) boundary() int64 {
	return w.old + (-w.old & int64(w.img.geometry.ClusterSize()-1))
}

// end returns the end of the last cluster that the disk will have.
func (w *growth) end() int64 {
	return w.size + (-w.size & int64(w.img.geometry.ClusterSize()-1))
}

// lengthen makes room in a data file. What is in it where the disk grows is no part of the disk, and becomes zeroes.
func (w *growth) lengthen() (undo func(), err error) {
	img := w.img
	undo = func() {}
	if !img.external() {
		return undo, nil
	}
	length, err := img.data.Size()
	if err != nil {
		return undo, err
	}
	if length > w.old {
		if err := img.data.PunchHole(w.old, length-w.old); err != nil {
			return undo, err
		}
	}
	if length >= w.size {
		return undo, nil
	}
	// A data file that stays too long is only that.
	return func() { _ = img.data.Truncate(length) }, img.data.Truncate(w.size)
}

// allocate gives every cluster from the last one of the disk on a place, unless it has one.
func (w *growth) allocate() error {
	g := w.img.geometry
	if err := w.completeLast(); err != nil {
		return err
	}
	// A run that is not much shorter than what a refcount block covers finds no place between two blocks.
	most := int64(min(maxPreallocated>>g.ClusterBits, g.BlockEntries()/2) << g.ClusterBits)
	for off := w.boundary(); off < w.end(); {
		if err := w.ctx.Err(); err != nil {
			return err
		}
		m, err := w.lookup(off, min(w.end()-off, most))
		if err != nil {
			return err
		}
		n := max(m.length&^(g.ClusterSize()-1), g.ClusterSize())
		if !m.hosted() {
			if err := w.allocateRun(off, n>>g.ClusterBits); err != nil {
				return err
			}
		}
		off += int64(n)
		if w.o.Progress != nil {
			w.o.Progress(min(off, w.size)-w.old, w.size-w.old)
		}
	}
	return nil
}

func (w *growth) lookup(off, n int64) (mapping, error) {
	epoch := w.img.epochs.enter()
	defer w.img.epochs.leave(epoch)
	return w.img.lookup(format.GuestOffset(off), uint64(n))
}

// completeLast allocates the cluster in which the disk ends so far, and which the guest sees.
func (w *growth) completeLast() error {
	img := w.img
	epoch := img.epochs.enter()
	defer img.epochs.leave(epoch)
	for off, end := w.old, min(w.boundary(), w.size); off < end; {
		m, err := img.lookup(format.GuestOffset(off), uint64(end-off))
		if err != nil {
			return err
		}
		n := int(min(m.length, uint64(len(zeroes))))
		if !m.hosted() {
			if n, err = img.writeClaimed(zeroes[:n], format.GuestOffset(off)); err != nil {
				return err
			}
		}
		off += int64(n)
	}
	return nil
}

// allocateRun allocates n guest clusters from off on: first the clusters, which durably hold zeroes when the entries are
// written that lead to them (rule 3).
func (w *growth) allocateRun(off int64, n uint64) error {
	img, g := w.img, w.img.geometry
	x := run{format.Cluster(uint64(off) >> g.ClusterBits), n}
	area := dataArea{to: img.data, at: format.HostOffset(off), n: uint64(min(w.size, off+int64(n<<g.ClusterBits)) - off), cipher: img.cipher}
	if !img.external() {
		var err error
		if x, err = img.alloc.contiguous(n); err != nil {
			return fmt.Errorf("allocate %d clusters: %w", n, err)
		}
		area.at, area.n = g.OffsetOf(x.first), n<<g.ClusterBits
		if err := img.file.PunchHole(int64(area.at), int64(area.n)); err != nil {
			img.alloc.giveBack(x)
			return err
		}
	}
	err := makeParts(w.ctx, area.appendTo(nil, w.o.Preallocation), nil)
	if err == nil {
		err = img.syncData()
	}
	linked := uint64(0)
	if err == nil {
		linked, err = w.link(format.GuestOffset(off), x)
	}
	if err != nil && !img.external() {
		img.alloc.giveBack(run{x.first + format.Cluster(linked), n - linked})
	}
	return err
}

// link makes the guest clusters from off on refer to those of x. When it fails, the first done do.
func (w *growth) link(off format.GuestOffset, x run) (done uint64, err error) {
	img, g := w.img, w.img.geometry
	epoch := img.epochs.enter()
	defer img.epochs.leave(epoch)
	for done < x.n {
		table, err := img.ownL2Table(off)
		if err != nil {
			return done, err
		}
		n := min(x.n-done, img.sliceSpan(off)>>g.ClusterBits)
		err = img.setEntries(table, off, n, func(i uint64, _ format.MappingEntry) format.MappingEntry {
			return preallocatedEntry(g, g.OffsetOf(x.first+format.Cluster(done+i)))
		})
		if err != nil {
			return done, err
		}
		done += n
		off += format.GuestOffset(n << g.ClusterBits)
	}
	return done, nil
}

// forget unlinks what was allocated behind the end of the disk. What it fails to unlink the next resize does.
func (w *growth) forget() {
	img, g := w.img, w.img.geometry
	epoch := img.epochs.enter()
	for off := w.boundary(); off < w.end(); {
		at := format.GuestOffset(off)
		m, err := img.lookup(at, min(uint64(w.end()-off), img.sliceSpan(at)))
		if err != nil {
			break
		}
		n := max(m.length>>g.ClusterBits, 1)
		off += int64(n << g.ClusterBits)
		if !m.hosted() {
			continue
		}
		table, err := img.ownL2Table(at)
		if err == nil {
			err = img.setEntries(table, at, n, func(uint64, format.MappingEntry) format.MappingEntry { return format.MappingEntry{} })
		}
		if err != nil {
			break
		}
		img.quarantine.add(img.hostRun(&m, n))
	}
	img.epochs.leave(epoch)
	_, _ = img.flush() // what stays in quarantine is tried again with the next one
}
