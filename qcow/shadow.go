package qcow

import (
	"errors"
	"fmt"
	"slices"

	"github.com/qcow-csi/qcow-csi/qcow/format"
)

// shadow is how an operation changes many tables at once: it builds what the image is to have beside what it has, and commit
// switches from one to the other with the one write of the header (rule 8). That includes the refcounts: the blocks that change are
// copied, and a new refcount table points to the copies. So before the switch nothing that is in use has changed, what was built
// lies in clusters which are free, and a crash leaves no trace; after it everything is as intended, and no cluster leaks.
//
// While there is a shadow the image is frozen, the quarantine empty, and the allocator locked.
type shadow struct {
	img    *Image
	stop   func() error              // unless nil, says why the operation is to be given up
	blocks map[uint64][]byte         // changed refcount blocks, by their index in the refcount table
	places map[uint64]format.Cluster // where these will be
	next   format.Cluster            // no cluster before it is taken for the shadow any more
	end    format.Cluster            // unless 0, none from it on is taken: then the operation is given up with errNoPlace
	taken  []run                     // free before, used by the shadow
	tables []run                     // of these what holds tables
	freed  []run                     // the refcount becomes 0

	unknown bool // the header on disk may be the new one
}

// underShadow freezes the image and lets build fill a shadow. Where build returns a change of the header, the shadow is committed;
// then done changes what is in memory accordingly. When underShadow fails the image is as before, or poisoned.
func (img *Image) underShadow(build func(s *shadow) (change func(*format.Header), done func(), err error)) error {
	if _, err := img.flush(); err != nil { // what takes time is done before requests have to wait
		return err
	}
	thaw := img.freeze()
	defer thaw()
	release, err := img.emptyQuarantine()
	if err != nil {
		return err
	}
	defer release()
	img.alloc.mu.Lock()
	defer img.alloc.mu.Unlock()
	s := &shadow{img: img, blocks: map[uint64][]byte{}, places: map[uint64]format.Cluster{}, next: img.alloc.hint}
	end := img.alloc.end.Load()
	change, done, err := build(s)
	if err == nil && change != nil {
		err = s.commit(change, done)
	}
	if err != nil {
		s.abandon(end)
	}
	return err
}

var errNoPlace = errors.New("no free place before the given end")

// allocate returns n neighbouring clusters that are free now, and not only after the commit. They have one reference then.
func (s *shadow) allocate(n uint64) (run, error) {
	counts, g := &s.img.alloc.counts, s.img.geometry
	x := run{first: s.next}
	for x.n < n {
		c := x.end()
		free, err := counts.freeRun(c, n-x.n)
		if err != nil {
			return run{}, err
		}
		if free.first != c {
			x = run{first: free.first}
		}
		x.n += free.n
		if uint64(x.end())<<g.ClusterBits > uint64(format.MaxHostOffset) {
			return run{}, fmt.Errorf("%w: the image file has reached the limit of its format", ErrNoSpace)
		}
	}
	if s.end > 0 && x.end() > s.end {
		return run{}, errNoPlace
	}
	if err := s.img.metadata.mustBeFree(x); err != nil {
		return run{}, s.img.markCorrupt(err)
	}
	s.next = x.end()
	if err := s.img.alloc.extend(x.end()); err != nil {
		return run{}, err
	}
	s.taken = appendRun(s.taken, x)
	return x, s.recount(x, func(format.Cluster, uint64) (uint64, error) { return 1, nil })
}

// write stores a table, which becomes metadata, in new clusters. An empty one has none, and begins at 0.
func (s *shadow) write(table []byte) (run, error) {
	if len(table) == 0 {
		return run{}, nil
	}
	x, err := s.allocate(s.img.geometry.ClustersFor(uint64(len(table))))
	if err != nil {
		return run{}, err
	}
	return x, s.writeAt(x, table)
}

func (s *shadow) writeAt(x run, table []byte) error {
	at := s.img.geometry.OffsetOf(x.first)
	if rest := x.n<<s.img.geometry.ClusterBits - uint64(len(table)); rest > 0 {
		table = append(slices.Clip(table), make([]byte, rest)...)
	}
	if _, err := s.img.file.WriteAt(table, int64(at)); err != nil {
		return fmt.Errorf("write table at %#x: %w", uint64(at), err)
	}
	s.tables = append(s.tables, x)
	return nil
}

// commit writes the refcounts, switches the header, and puts the memory in accordance.
func (s *shadow) commit(change func(*format.Header), done func()) error {
	img, g := s.img, s.img.geometry
	table, place, err := s.placeRefcounts()
	if err != nil {
		return err
	}
	for i, c := range s.places {
		if err := s.writeAt(run{c, 1}, s.blocks[i]); err != nil {
			return err
		}
	}
	if err := s.writeAt(place, table); err != nil {
		return err
	}
	err = img.changeHeader(func(h *format.Header) {
		h.RefcountTableOffset, h.RefcountTableClusters = g.OffsetOf(place.first), uint32(place.n)
		change(h)
	})
	if err != nil {
		if img.poisoned() == nil { // the header in the file is the old one, but perhaps not yet on disk
			err = errors.Join(err, img.sync())
		}
		s.unknown = img.poisoned() != nil
		return err
	}
	img.alloc.counts.table, img.alloc.counts.offset = table, g.OffsetOf(place.first)
	done()
	s.release()
	return nil
}

// release makes what the switch has freed available, once nobody reads it any more.
func (s *shadow) release() {
	img, g := s.img, s.img.geometry
	img.epochs.wait()
	img.unpacked.forget()
	for _, x := range s.tables {
		img.metadata.add(x)
	}
	for _, x := range sortRuns(s.freed) {
		img.metadata.remove(x)
		img.tables.drop(x)
		img.alloc.hint = min(img.alloc.hint, x.first)
		// Whoever takes the cluster next punches it again: all that may be missed here is that its space is free until then.
		_ = img.file.PunchHole(int64(g.OffsetOf(x.first)), int64(x.n<<g.ClusterBits))
	}
	_ = img.alloc.cut() // the same: it costs length, and Close tries again
}

// abandon gives back what a shadow that is not committed has taken of the file, which had end clusters before. Whatever fails here
// costs space only.
func (s *shadow) abandon(end uint64) {
	img, g := s.img, s.img.geometry
	if s.unknown {
		return
	}
	for _, x := range s.taken {
		if x.first < format.Cluster(end) {
			_ = img.file.PunchHole(int64(g.OffsetOf(x.first)), int64(min(x.n, end-uint64(x.first))<<g.ClusterBits))
		}
	}
	if img.alloc.end.Load() > end && img.file.Truncate(int64(end<<g.ClusterBits)) == nil {
		img.alloc.end.Store(end)
	}
}
