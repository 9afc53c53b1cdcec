package qcow

import (
	"errors"
	"io"
	"sync"

	"github.com/qcow-csi/qcow-csi/qcow/format"
)

// sectorCipher is what encrypts the guest's data: 512-byte sectors, numbered by their place in the file, or by the guest's with the
// legacy method.
type sectorCipher interface {
	Encrypt(p []byte, sector uint64)
	Decrypt(p []byte, sector uint64)
}

// external reports whether guest data is in a file of its own, at the guest's offsets.
func (img *Image) external() bool { return img.data != img.file }

// freshReadsZero reports whether a cluster from the reserve reads as zeroes to the guest before anything is written to it.
func (img *Image) freshReadsZero() bool { return img.cipher == nil && !img.external() }

// readHost reads guest data at host, which belongs to the guest offset off. The file may end inside its last cluster; the rest of
// that reads as zeroes.
func (img *Image) readHost(p []byte, host format.HostOffset, off format.GuestOffset) error {
	if img.cipher == nil {
		return readPadded(img.data, p, host)
	}
	before := uint64(host) % format.SectorSize
	whole := (before + uint64(len(p)) + format.SectorSize - 1) &^ (format.SectorSize - 1)
	b := p
	if whole != uint64(len(p)) {
		b = buffers.get(int(whole))
		defer buffers.put(b)
	}
	if err := readPadded(img.data, b, host-format.HostOffset(before)); err != nil {
		return err
	}
	img.cipher.Decrypt(b, img.sector(host, off))
	if whole != uint64(len(p)) {
		copy(p, b[before:])
	}
	return nil
}

// writeHost writes guest data, which is whole sectors where it is encrypted, to host, which belongs to the guest offset off.
func (img *Image) writeHost(p []byte, host format.HostOffset, off format.GuestOffset) (int, error) {
	if img.cipher == nil {
		return img.data.WriteAt(p, int64(host))
	}
	for n := 0; n < len(p); {
		part := p[n:min(len(p), n+maxCipherBuffer)]
		b := buffers.get(len(part))
		copy(b, part)
		img.cipher.Encrypt(b, img.sector(host+format.HostOffset(n), off+format.GuestOffset(n)))
		k, err := img.data.WriteAt(b, int64(host)+int64(n))
		buffers.put(b)
		if n += k; err != nil {
			return n, err
		}
	}
	return len(p), nil
}

const maxCipherBuffer = 1 << 20

// sector returns the number that the cipher knows a sector by.
func (img *Image) sector(host format.HostOffset, off format.GuestOffset) uint64 {
	if img.cryptMethod == cryptAES {
		return uint64(off) / format.SectorSize
	}
	return uint64(host) / format.SectorSize
}

// readPadded fills p with the bytes at off, and with zeroes behind the end of the file.
func readPadded(f io.ReaderAt, p []byte, off format.HostOffset) error {
	n, err := f.ReadAt(p, int64(off))
	if err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	clear(p[n:])
	return nil
}

// bufferPool lends byte slices of any length up to a few MiB.
type bufferPool struct{ pool sync.Pool }

var buffers bufferPool

func (b *bufferPool) get(n int) []byte {
	if p, ok := b.pool.Get().(*[]byte); ok && cap(*p) >= n {
		return (*p)[:n]
	}
	return make([]byte, n, max(n, 64<<10))
}

func (b *bufferPool) put(p []byte) {
	p = p[:0]
	b.pool.Put(&p)
}
