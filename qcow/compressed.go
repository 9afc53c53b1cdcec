package qcow

import (
	"fmt"
	"sync"

	"github.com/qcow-csi/qcow-csi/qcow/codec"
	"github.com/qcow-csi/qcow-csi/qcow/format"
)

// unpackedClusters is how many decompressed clusters are kept: a sequential reader asks for each many times.
const unpackedClusters = 4

// unpacked keeps the content of compressed clusters that were read last. The host clusters of an entry are reused only after
// [Image.reclaim], which forgets all.
type unpacked struct {
	mu      sync.Mutex
	entries [unpackedClusters]format.L2Entry // 0: none
	content [unpackedClusters][]byte
	next    int
	epoch   uint64 // counts forget
}

// copyTo copies from the content of e, if it is here.
func (u *unpacked) copyTo(p []byte, e format.L2Entry, skip uint64) bool {
	u.mu.Lock()
	defer u.mu.Unlock()
	for i, have := range u.entries {
		if have == e {
			copy(p, u.content[i][skip:])
			return true
		}
	}
	return false
}

// began returns what add wants, to be asked before the content is read.
func (u *unpacked) began() uint64 {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.epoch
}

// add keeps b, which becomes the cache's, unless something was forgotten since began.
func (u *unpacked) add(e format.L2Entry, b []byte, began uint64) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.epoch != began {
		return
	}
	u.entries[u.next], u.content[u.next] = e, b
	u.next = (u.next + 1) % unpackedClusters
}

func (u *unpacked) forget() {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.epoch++
	clear(u.entries[:])
	clear(u.content[:])
}

// readCompressed reads from the compressed cluster that m describes.
func (img *Image) readCompressed(p []byte, off format.GuestOffset, m *mapping) error {
	g := img.geometry
	e, skip := m.entry.L2Entry, g.InCluster(off)
	if img.unpacked.copyTo(p, e, skip) {
		return nil
	}
	began := img.unpacked.began()
	host, n := e.CompressedRange(g)
	src := buffers.get(int(n))
	defer buffers.put(src)
	if err := readPadded(img.file, src, host); err != nil {
		return err
	}
	b := make([]byte, g.ClusterSize())
	if err := codec.Decompress(img.compression, b, src); err != nil {
		return fmt.Errorf("guest cluster at %#x, compressed at %#x: %w", uint64(off)-skip, uint64(host), err)
	}
	copy(p, b[skip:])
	img.unpacked.add(e, b, began)
	return nil
}
