package qcow_test

import (
	"errors"
	"fmt"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/qcow-csi/qcow-csi/qcow"
	"github.com/qcow-csi/qcow-csi/qcow/storage"
)

const reserveCluster = 4096

// reserveImage opens a new image whose file stops at every sync that gate, once set, does not let pass.
func reserveImage(t *testing.T, mem *storage.Memory, most int64) (*qcow.Image, *hooked) {
	t.Helper()
	if err := qcow.Create(mem, qcow.CreateOptions{Size: 64 << 20, ClusterSize: reserveCluster, RefcountBits: 1}); err != nil {
		t.Fatal(err)
	}
	h := &hooked{File: mem}
	return open(t, h, qcow.Options{ReserveBytes: most * reserveCluster}), h
}

// allocate writes to n clusters from guest cluster first on, one after the other.
func allocate(img *qcow.Image, first, n int64) error {
	for i := first; i < first+n; i++ {
		if _, err := img.WriteAt(repeated(byte(i+1), 512), i*reserveCluster); err != nil {
			return err
		}
	}
	return nil
}

// Writes go on from what is left of the reserve while a sync is under way that fills it again, and nobody waits for that but who finds the
// reserve empty, and Close.
func TestReserveIsFilledInTheBackground(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		mem := storage.NewMemory()
		img, h := reserveImage(t, mem, 64)
		if err := allocate(img, 0, 4); err != nil { // and a table: 11 are left
			t.Fatal(err)
		}
		release := make(chan struct{})
		h.set(func() { h.beforeSync = func() error { <-release; return nil } })
		if err := allocate(img, 4, 11); err != nil {
			t.Fatal(err)
		}
		var err, closeErr error
		written, closed := false, false
		go func() { err, written = allocate(img, 15, 1), true }()
		synctest.Wait()
		if written {
			t.Error("a write found a cluster in an empty reserve")
		}
		go func() { closeErr, closed = img.Close(), true }()
		synctest.Wait()
		if closed {
			t.Error("the image was closed during a request")
		}
		close(release)
		synctest.Wait()
		if err := errors.Join(err, closeErr); err != nil || !written || !closed {
			t.Error(err, written, closed)
		}
		expectClean(t, mem.Bytes())
	})
}

// Who needs few clusters gets few.
func TestReserveStartsSmall(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		mem := storage.NewMemory()
		img, _ := reserveImage(t, mem, 1<<16)
		before := int64(len(mem.Bytes()))
		if err := allocate(img, 0, 3); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		if grown := int64(len(mem.Bytes())) - before; grown > 16*reserveCluster {
			t.Errorf("the file has grown by %d bytes", grown)
		}
		if err := img.Close(); err != nil {
			t.Fatal(err)
		}
	})
}

// A reserve that was needed becomes smaller with flushes when it is not any more, and the file as well.
func TestReserveIsGivenBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		mem := storage.NewMemory()
		img, h := reserveImage(t, mem, 1024)
		h.set(func() { h.beforeSync = func() error { time.Sleep(time.Millisecond); return nil } })
		if err := allocate(img, 0, 3000); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		large := len(mem.Bytes())
		for range 12 {
			time.Sleep(time.Minute)
			if err := img.Flush(); err != nil {
				t.Fatal(err)
			}
		}
		if small := len(mem.Bytes()); large < 3400*reserveCluster || small > 3100*reserveCluster {
			t.Errorf("the file had %d bytes, and has %d", large, small)
		}
		if err := allocate(img, 3000, 100); err != nil {
			t.Fatal(err)
		}
		if err := img.Close(); err != nil {
			t.Fatal(err)
		}
		expectClean(t, mem.Bytes())
	})
}

// When the reserve can't be filled in the background nobody hears of it who has clusters; who finds none tries again and is told.
func TestReserveFailsLater(t *testing.T) {
	full := fmt.Errorf("%w: %w", storage.ErrNoSpace, syscall.ENOSPC)
	synctest.Test(t, func(t *testing.T) {
		mem := storage.NewMemory()
		img, h := reserveImage(t, mem, 64)
		if err := allocate(img, 0, 4); err != nil {
			t.Fatal(err)
		}
		h.set(func() { h.beforePunch = func(int64, int64) error { return full } })
		if err := allocate(img, 4, 11); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		expectClass(t, "a write without a reserve", allocate(img, 15, 1), qcow.ErrNoSpace)
		h.set(func() { h.beforePunch = nil })
		if err := allocate(img, 15, 100); err != nil {
			t.Fatal(err)
		}
		if err := img.Close(); err != nil {
			t.Fatal(err)
		}
		expectClean(t, mem.Bytes())
	})
}

// A sync that fails in the background poisons the image as any other.
func TestReserveFailingSync(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		img, h := reserveImage(t, storage.NewMemory(), 64)
		if err := allocate(img, 0, 4); err != nil {
			t.Fatal(err)
		}
		h.set(func() { h.beforeSync = func() error { return syscall.EIO } })
		if err := allocate(img, 4, 4); err != nil { // the last of them begins the fill
			t.Fatal(err)
		}
		synctest.Wait()
		expectClass(t, "a write after a failed sync", allocate(img, 0, 1), syscall.EIO)
		expectClass(t, "close", img.Close(), syscall.EIO)
	})
}

// What fails to be freed when the reserve is given up is not handed out as if it had a refcount.
func TestReserveThatCannotBeFreed(t *testing.T) {
	mem := storage.NewMemory()
	img, h := reserveImage(t, mem, 64)
	if err := allocate(img, 0, 4); err != nil {
		t.Fatal(err)
	}
	if err := img.Discard(0, reserveCluster); err != nil {
		t.Fatal(err)
	}
	writes := 0
	h.set(func() {
		h.beforeWrite = func([]byte, int64) error {
			if writes++; writes == 2 { // the first is that of the cluster discarded
				return syscall.EIO
			}
			return nil
		}
	})
	_, err := img.Compact(t.Context(), nil)
	expectClass(t, "compact", err, syscall.EIO)
	h.set(func() { h.beforeWrite = nil })
	if err := allocate(img, 0, 40); err != nil {
		t.Fatal(err)
	}
	if err := img.Close(); err != nil {
		t.Fatal(err)
	}
	expectClean(t, mem.Bytes())
}
