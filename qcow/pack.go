package qcow

import (
	"fmt"
	"runtime"
	"sync"
	"sync/atomic"

	"github.com/qcow-csi/qcow-csi/qcow/codec"
	"github.com/qcow-csi/qcow-csi/qcow/format"
)

// packBatch is how many bytes of the disk are compressed and linked together, if eight clusters are not more: each batch
// costs one sync.
const packBatch = 4 << 20

// packing is where compressed data goes, one cluster's right behind another's. The cluster that is being filled has one reference of
// the packing's own, so that it stays when all that is in it is discarded.
type packing struct {
	mu      sync.Mutex
	open    bool
	cluster format.Cluster
	used    uint64 // bytes of it
}

// A piece is a guest cluster that is to be stored compressed.
type piece struct {
	off  format.GuestOffset
	data []byte
	host format.HostOffset // where it was placed
	done bool              // linked
}

// hostRun returns the clusters that a placed piece lies in.
func (p *piece) hostRun(g format.Geometry) run {
	first, last := g.ClusterOf(p.host), g.ClusterOf(p.host+format.HostOffset(len(p.data)-1))
	return run{first, uint64(last-first) + 1}
}

// WriteCompressed writes p to the virtual disk at off, compressed, on all processors: whole clusters, the last one perhaps
// cut off by the end of the disk. Clusters of zeroes become unallocated, and those that do not get smaller are stored as WriteAt would. Once it
// has returned nil the data is in the file and outlives the process; Flush makes it outlive the machine.
//
// Compressed data is for what is written once: writing to it again allocates a cluster. It fails with ErrInvalid for a
// range that is not whole clusters, with ErrUnsupported for images with encryption or an external data file, which have none.
func (img *Image) WriteCompressed(p []byte, off int64) error {
	g := img.geometry
	n, size := int64(len(p)), int64(g.ClusterSize())
	if off%size != 0 || n%size != 0 && off+n != img.Size() {
		return format.Invalidf("%d bytes at %d are not whole clusters of %d", n, off, size)
	}
	if img.cipher != nil || img.external() {
		return format.Unsupportedf("header", format.IncompatibleOffset, "compressed clusters in an image with encryption or an external data file")
	}
	for len(p) > 0 {
		batch := p[:min(len(p), max(packBatch, 8*int(size)))]
		if err := img.writeBatch(batch, off); err != nil {
			return err
		}
		p, off = p[len(batch):], off+int64(len(batch))
	}
	return nil
}

func (img *Image) writeBatch(p []byte, off int64) error {
	pieces, plain, err := img.compress(p, format.GuestOffset(off))
	if err != nil {
		return err
	}
	epoch, err := img.begin(off, int64(len(p)), true)
	if err != nil {
		return err
	}
	defer img.epochs.leave(epoch)
	for _, c := range plain {
		if c.data == nil {
			err = img.zeroGuest(int64(c.off), min(int64(c.off)+int64(img.geometry.ClusterSize()), img.Size()), true)
		} else {
			_, err = img.writeGuest(c.data, c.off)
		}
		if err != nil {
			return err
		}
	}
	if len(pieces) == 0 {
		return nil
	}
	bits := img.geometry.ClusterBits
	claim := img.claims.acquire(uint64(off)>>bits, (uint64(off)+uint64(len(p))-1)>>bits+1)
	defer img.claims.release(claim)
	return img.pack(pieces)
}

// compress compresses the clusters of p. Plain are those that are stored otherwise: with their data, or with none where they are zeroes.
func (img *Image) compress(p []byte, off format.GuestOffset) (pieces, plain []piece, err error) {
	size := int(img.geometry.ClusterSize())
	all := make([]piece, (len(p)+size-1)/size)
	compressed := make([]bool, len(all))
	errs := make([]error, len(all))
	var next atomic.Int64
	var wg sync.WaitGroup
	for range min(runtime.GOMAXPROCS(0), len(all)) {
		wg.Go(func() {
			for i := int(next.Add(1)) - 1; i < len(all); i = int(next.Add(1)) - 1 {
				b := p[i*size : min((i+1)*size, len(p))]
				all[i] = piece{off: off + format.GuestOffset(i*size)}
				if isZero(b) {
					continue
				}
				all[i].data, compressed[i], errs[i] = img.compressCluster(b)
			}
		})
	}
	wg.Wait()
	for i := range all {
		switch {
		case errs[i] != nil:
			return nil, nil, errs[i]
		case compressed[i]:
			pieces = append(pieces, all[i])
		default:
			plain = append(plain, all[i])
		}
	}
	return pieces, plain, nil
}

// compressCluster returns b compressed, or b where that is not shorter. The last cluster of the disk is filled up with zeroes.
func (img *Image) compressCluster(b []byte) ([]byte, bool, error) {
	whole := b
	if size := int(img.geometry.ClusterSize()); len(b) < size {
		whole = make([]byte, size)
		copy(whole, b)
	}
	// A cluster that is shared by one piece and the packing has two references.
	if img.geometry.MaxRefcount() < 3 {
		return b, false, nil
	}
	out, ok, err := codec.Compress(img.compression, make([]byte, 0, len(whole)), whole)
	if err != nil || !ok {
		return b, false, err
	}
	return out, true, nil
}

// pack stores the pieces and links them. The order is: data and refcounts, sync, L2 entries. What was stored and could not be
// linked goes to quarantine.
func (img *Image) pack(pieces []piece) (err error) {
	g := img.geometry
	img.packing.mu.Lock()
	defer img.packing.mu.Unlock()
	placed := 0
	defer func() {
		for i := range pieces[:placed] {
			if !pieces[i].done {
				img.quarantine.add(pieces[i].hostRun(g))
			}
		}
	}()
	for i := range pieces {
		if err := img.packing.place(img, &pieces[i]); err != nil {
			return err
		}
		placed++
	}
	if err := img.writePieces(pieces); err != nil {
		return err
	}
	if err := img.sync(); err != nil {
		return err
	}
	for rest := pieces; len(rest) > 0; {
		n := 1
		for n < len(rest) && rest[n].off == rest[n-1].off+format.GuestOffset(g.ClusterSize()) {
			n++
		}
		if err := img.linkPieces(rest[:n]); err != nil {
			return err
		}
		rest = rest[n:]
	}
	return nil
}

// place finds a place for p and counts its references, which the caller makes durable.
func (k *packing) place(img *Image, p *piece) error {
	g := img.geometry
	n := uint64(len(p.data))
	if k.open {
		count, err := img.alloc.refcount(k.cluster)
		if err != nil {
			return err
		}
		if count >= g.MaxRefcount() {
			k.finish(img)
		}
	}
	if k.open && n <= g.ClusterSize()-k.used {
		p.host = g.OffsetOf(k.cluster) + format.HostOffset(k.used)
		k.used += n
		return img.alloc.raise(run{k.cluster, 1})
	}
	x, err := img.alloc.take(1)
	if err != nil {
		return err
	}
	if err := img.mustBeData(g.OffsetOf(x.first), g.ClusterSize()); err != nil {
		img.alloc.giveBack(x)
		return err
	}
	if g.OffsetOf(x.end()) > g.MaxCompressedOffset() {
		img.alloc.giveBack(x)
		return fmt.Errorf("%w: compressed data can't lie behind %#x", ErrNoSpace, uint64(g.MaxCompressedOffset()))
	}
	p.host = g.OffsetOf(x.first)
	rest := uint64(0)
	if k.open && x.first == k.cluster+1 { // it begins in the rest of the cluster before
		rest = g.ClusterSize() - k.used
		p.host -= format.HostOffset(rest)
	}
	k.finish(img)
	k.open, k.cluster, k.used = true, x.first, n-rest
	return img.alloc.raise(p.hostRun(g))
}

// finish gives the packing's own reference up.
func (k *packing) finish(img *Image) {
	if k.open {
		img.quarantine.add(run{k.cluster, 1})
		k.open = false
	}
}

// writePieces writes pieces, those that are neighbours in the file with one write.
func (img *Image) writePieces(pieces []piece) error {
	var b []byte
	for i := range pieces {
		b = append(b, pieces[i].data...)
		end := pieces[i].host + format.HostOffset(len(pieces[i].data))
		if i+1 < len(pieces) && pieces[i+1].host == end {
			continue
		}
		if _, err := img.file.WriteAt(b, int64(end)-int64(len(b))); err != nil {
			return fmt.Errorf("write compressed clusters: %w", err)
		}
		b = b[:0]
	}
	return nil
}

// linkPieces links pieces of neighbouring guest clusters, which are claimed.
func (img *Image) linkPieces(pieces []piece) error {
	g := img.geometry
	for len(pieces) > 0 {
		off := pieces[0].off
		m, err := img.lookup(off, min(uint64(len(pieces))<<g.ClusterBits, uint64(img.Size())-uint64(off), img.sliceSpan(off)))
		if err != nil {
			return err
		}
		if g.ExtendedL2 {
			m.length = min(m.length, g.ClusterSize())
		}
		n := min(g.ClustersFor(m.length), uint64(len(pieces)))
		if err := img.mayUnlink(&m, n); err != nil {
			return err
		}
		table, err := img.ownL2Table(off)
		if err != nil {
			return err
		}
		err = img.setEntries(table, off, n, func(i uint64, _ format.MappingEntry) format.MappingEntry {
			p := &pieces[i]
			return format.MappingEntry{L2Entry: format.NewCompressedEntry(g, p.host, uint64(len(p.data)))}
		})
		if err != nil {
			return err
		}
		img.quarantine.add(img.hostRun(&m, n))
		for i := range n {
			pieces[i].done = true
		}
		pieces = pieces[n:]
	}
	return nil
}
