package qcow

import (
	"errors"
	"fmt"
	"sync"
	"sync/atomic"

	"github.com/qcow-csi/qcow-csi/qcow/format"
	"github.com/qcow-csi/qcow-csi/qcow/storage"
)

// Image is an open image. All methods may be called concurrently.
type Image struct {
	file     storage.File
	readOnly bool
	geometry format.Geometry

	size    atomic.Int64 // virtual size in bytes
	closing atomic.Bool
	// maintenance is read-locked by Flush and Resize, which wait for requests and so can't run inside an epoch.
	maintenance sync.RWMutex
	poisonedBy  atomic.Pointer[error]

	epochs     *epochs
	claims     claims
	syncs      *groupSync
	quarantine quarantine
	metadata   metadataMap
	tables     *tableCache
	alloc      allocator

	headerMu sync.Mutex // held while the header is switched
	header   format.Header

	resizing sync.Mutex // one resize at a time
	newTable sync.Mutex // held while an L2 table is made, or the L1 table replaced
	l1mu     sync.RWMutex
	l1       []byte // the active L1 table, as on disk
	l1offset format.HostOffset
}

// Size returns the virtual size in bytes.
func (img *Image) Size() int64 { return img.size.Load() }

// ReadOnly reports whether the image was opened read-only.
func (img *Image) ReadOnly() bool { return img.readOnly }

// Close waits for the requests under way, makes everything durable, gives what it held in reserve back and closes the file. A
// request that begins after Close fails with ErrClosed. An error means that something of this did not happen; what had been flushed
// before is safe, and the file is closed in any case. The second Close is ErrClosed.
func (img *Image) Close() error {
	if img.closing.Swap(true) {
		return ErrClosed
	}
	img.maintenance.Lock()
	defer img.maintenance.Unlock()
	img.epochs.wait()
	err := img.settle()
	return errors.Join(err, img.file.Close())
}

// settle leaves on disk an image without leaks.
func (img *Image) settle() error {
	if img.readOnly {
		return nil
	}
	if err := img.poisoned(); err != nil {
		return err
	}
	reclaimErr, err := img.flush()
	if err := errors.Join(reclaimErr, err); err != nil {
		return err
	}
	if err := img.alloc.close(); err != nil {
		return err
	}
	return img.sync()
}

// usable returns why no request can be served, or nil.
func (img *Image) usable() error {
	if img.closing.Load() {
		return ErrClosed
	}
	return nil
}

// writable returns why no request that changes the image can be served, or nil.
func (img *Image) writable() error {
	if img.readOnly {
		return ErrReadOnly
	}
	return img.poisoned()
}

// begin enters the image for a request on n bytes at off, which end calls leave for.
func (img *Image) begin(off, n int64, write bool) (epoch uint32, err error) {
	if write {
		if err := img.writable(); err != nil {
			return 0, err
		}
	}
	epoch = img.epochs.enter()
	if err := img.usable(); err != nil {
		img.epochs.leave(epoch)
		return 0, err
	}
	if size := img.size.Load(); off < 0 || n < 0 || off > size || n > size-off {
		img.epochs.leave(epoch)
		return 0, format.Invalidf("%d bytes at %d are outside the virtual disk of %d", n, off, size)
	}
	return epoch, nil
}

// switchHeader changes the header's table pointers and size with one write within one sector, so that the image has either
// the old ones or the new ones whatever happens, and makes that durable. Everything that the new header points to is made
// durable first.
func (img *Image) switchHeader(change func(*format.Header)) error {
	img.headerMu.Lock()
	defer img.headerMu.Unlock()
	h := img.header
	change(&h)
	if err := img.sync(); err != nil {
		return err
	}
	if err := img.overwrite(format.SwitchOffset, img.header.EncodeSwitch(), h.EncodeSwitch()); err != nil {
		return fmt.Errorf("write header: %w", err)
	}
	if err := img.sync(); err != nil {
		return err
	}
	img.header = h
	return nil
}

// overwrite replaces the metadata old at off by b. When the file refuses that, old is there as before; where even that is
// not certain the image is poisoned, so that nothing is ever based on what may be there.
func (img *Image) overwrite(off format.HostOffset, old, b []byte) error {
	if err := img.poisoned(); err != nil {
		return err
	}
	_, err := img.file.WriteAt(b, int64(off))
	if err == nil {
		return nil
	}
	err = fmt.Errorf("write metadata at %#x: %w", uint64(off), err)
	if _, again := img.file.WriteAt(old, int64(off)); again != nil {
		return img.poison(err)
	}
	return err
}
