package qcow

import (
	"github.com/qcow-csi/qcow-csi/qcow/format"
)

// WriteAt writes p to the virtual disk at off. Once it has returned nil the data is in the file and outlives the process, where it needed a new
// place together with [Options].Journal, if there is one;
// Flush makes it outlive the machine. A write that reaches past the end of the disk is ErrInvalid and writes nothing; so does one to an
// encrypted image that is not whole sectors. After another error some of the bytes before n+1 may be written, those behind are not
// mapped anew.
func (img *Image) WriteAt(p []byte, off int64) (n int, err error) {
	if img.detectZeroes && isZero(p) {
		if err := img.WriteZeroes(off, int64(len(p)), true); err != nil {
			return 0, err
		}
		return len(p), nil
	}
	epoch, err := img.begin(off, int64(len(p)), true)
	if err != nil {
		return 0, err
	}
	defer img.epochs.leave(epoch)
	if err := img.wholeSectors(off, int64(len(p))); err != nil {
		return 0, err
	}
	return img.writeGuest(p, format.GuestOffset(off))
}

// wholeSectors refuses ranges that can't be encrypted.
func (img *Image) wholeSectors(off, n int64) error {
	if img.cipher != nil && (off|n)%format.SectorSize != 0 {
		return format.Invalidf("%d bytes at %d: an encrypted image is written in whole sectors of %d bytes", n, off, format.SectorSize)
	}
	return nil
}

// writeGuest writes to the virtual disk, inside an epoch. It returns how many bytes it wrote before an error.
func (img *Image) writeGuest(p []byte, off format.GuestOffset) (n int, err error) {
	for n < len(p) {
		k, err := img.writeSome(p[n:], off+format.GuestOffset(n))
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
	if m.kind == format.Data && !img.moving.overlaps(uint64(off), m.length) {
		if owned, err := img.ownedRun(&m); err != nil {
			return 0, err
		} else if owned > 0 {
			return img.writeInPlace(p[:owned], off, &m)
		}
	}
	return img.writeNew(p, off)
}

// writeInPlace writes into clusters that the active tables alone refer to.
func (img *Image) writeInPlace(p []byte, off format.GuestOffset, m *mapping) (int, error) {
	if err := img.mustBeData(m.host, uint64(len(p))); err != nil {
		return 0, err
	}
	return img.writeHost(p, m.host, off)
}

// ownedRun returns how many bytes at the start of m lie in clusters that may be written in place: COPIED says so (rule 7), or the
// refcount does.
func (img *Image) ownedRun(m *mapping) (uint64, error) {
	if m.copied || img.external() {
		return m.length, nil
	}
	g := img.geometry
	first := g.ClusterOf(m.host)
	clusters := uint64(g.ClusterOf(m.host+format.HostOffset(m.length-1))-first) + 1
	sole, next, err := img.alloc.soleRun(run{first, clusters})
	switch {
	case err != nil:
		return 0, err
	case sole == clusters:
		return m.length, nil
	case sole == 0 && next == 0:
		return 0, img.markCorrupt(format.Corruptf("refcount block", g.OffsetOf(first), "a data cluster in use has the refcount 0"))
	case sole == 0:
		return 0, nil
	}
	return uint64(g.OffsetOf(first+format.Cluster(sole)) - m.host), nil
}

// mustBeData checks that guest data may be written to n bytes at host (rule 11). An image in which that is not so is marked corrupt.
func (img *Image) mustBeData(host format.HostOffset, n uint64) error {
	if img.external() {
		return nil
	}
	if err := img.metadata.mustBeData(host, n); err != nil {
		return img.markCorrupt(err)
	}
	return nil
}
