package qcow

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"

	"github.com/qcow-csi/qcow-csi/qcow/codec"
	"github.com/qcow-csi/qcow-csi/qcow/format"
	"github.com/qcow-csi/qcow-csi/qcow/storage"
)

// Image is an open image. All methods may be called concurrently.
type Image struct {
	file     storage.File
	data     storage.File // where guest data is: file, or an external data file
	readOnly bool
	geometry format.Geometry
	// What the header said when the image was opened, and does not change.
	version     uint32
	cryptMethod uint32
	compression codec.Type

	backing atomic.Pointer[backing] // nil: none; see under
	cipher  sectorCipher            // nil: not encrypted

	detectZeroes bool

	size    atomic.Int64 // virtual size in bytes
	closing atomic.Bool
	// maintenance is read-locked by what waits for requests, as Flush and Resize do, and so can't run inside an epoch.
	maintenance sync.RWMutex
	poisonedBy  atomic.Pointer[error]

	tablesDurable durability

	epochs     *epochs
	freezer    freezer
	splices    splices
	claims     claims
	moving     ranges // guest clusters that are written under a claim only
	syncs      *groupSync
	dataSyncs  *groupSync
	quarantine quarantine
	metadata   metadataMap
	tables     *tableCache
	unpacked   unpacked
	packing    packing
	alloc      allocator
	links      *heldLinks // nil: none is held back
	journal    Journal    // nil: there is none
	restored   Restored
	bitmaps    bitmaps

	headerMu      sync.Mutex // held while the header is switched
	header        format.Header
	snapshots     []format.Snapshot // changed under maintaining as well
	snapshotBytes uint64            // length of the snapshot table

	maintaining sync.Mutex // one resize, snapshot or the like at a time
	newTable    sync.Mutex // held while an L2 table is made, or the L1 table replaced
	l1mu        sync.RWMutex
	l1          []byte // the active L1 table, as on disk
	l1offset    format.HostOffset
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
	img.alloc.finishFill()
	if img.links != nil {
		img.links.leave()
	}
	switch {
	case img.journal == nil:
	case err == nil && !img.readOnly:
		err = img.journal.Remove()
	default:
		err = errors.Join(err, img.journal.Close())
	}
	img.tables.share.leave(img.tables)
	if img.external() {
		err = errors.Join(err, img.data.Close())
	}
	return errors.Join(err, img.file.Close(), img.under().close())
}

// settle leaves on disk an image without leaks.
func (img *Image) settle() error {
	if img.readOnly {
		return nil
	}
	if err := img.poisoned(); err != nil {
		return err
	}
	img.packing.finish(img)
	reclaimErr, err := img.flush()
	if err := errors.Join(reclaimErr, err); err != nil {
		return err
	}
	if err := img.alloc.trim(); err != nil {
		return err
	}
	if err := img.saveBitmaps(); err != nil {
		return errors.Join(err, img.sync())
	}
	if img.links != nil {
		if err := img.links.mark(false); err != nil {
			return err
		}
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

// maintain begins an operation that changes the image as a whole, of which there is one at a time. end finishes it.
func (img *Image) maintain(ctx context.Context) (end func(), err error) {
	img.maintenance.RLock()
	img.maintaining.Lock()
	end = func() {
		img.maintaining.Unlock()
		img.maintenance.RUnlock()
	}
	for _, obstacle := range []error{img.usable(), img.writable(), ctx.Err()} {
		if obstacle != nil {
			end()
			return nil, obstacle
		}
	}
	return end, nil
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
	for write && img.freezer.frozen() {
		img.epochs.leave(epoch)
		img.freezer.wait()
		epoch = img.epochs.enter()
	}
	if err := img.usable(); err != nil {
		img.epochs.leave(epoch)
		return 0, err
	}
	if size := img.size.Load(); off < 0 || n < 0 || off > size || n > size-off {
		img.epochs.leave(epoch)
		return 0, format.Invalidf("%d bytes at %d are outside the virtual disk of %d", n, off, size)
	}
	if write {
		if err := img.record(off, n); err != nil {
			img.epochs.leave(epoch)
			return 0, err
		}
	}
	return epoch, nil
}

// overwrite replaces the metadata old at off by b. When the file refuses that, old is there as before; where even that is
// not certain the image is poisoned, so that nothing is ever based on what may be there.
func (img *Image) overwrite(off format.HostOffset, old, b []byte) error {
	if err := img.poisoned(); err != nil {
		return err
	}
	_, err := img.file.WriteAt(b, int64(off))
	img.tablesDurable.changed.Add(1) // before anybody can look the change up
	if err == nil {
		return nil
	}
	err = fmt.Errorf("write metadata at %#x: %w", uint64(off), err)
	if _, again := img.file.WriteAt(old, int64(off)); again != nil {
		return img.poison(err)
	}
	return err
}
