package storage

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"slices"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	// JournalBytes is how long the file of a [Journal] is.
	JournalBytes  = 1 << 20
	journalHeader = 4096
	journalMagic  = "qcow-csi journal 1\n"
)

// Journal is a piece of memory that outlives the process and not the machine: a mapped file, in a file system that lives in memory (tmpfs).
// It belongs to one image file, as long as the machine runs.
type Journal struct {
	f     *os.File // holds the lock
	words []uint64 // the mapped file
	b     []byte   // the same memory, without the header
}

// OpenJournal opens the journal at path, of the image in the file image, and makes it if there is none. What is in it stays only if it was written
// for the same file and since the machine was booted; else the journal is empty then. Its memory is all allocated. It fails with ErrBusy
// where another process has the journal open, and with ErrNoSpace.
func OpenJournal(path string, image *OSFile) (_ *Journal, err error) {
	f, _, err := openRegular(path, os.O_RDWR|os.O_CREATE, false)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("journal %s: %w", path, err), f.Close())
		}
	}()
	lock := func(fd int) error { return unix.Flock(fd, unix.LOCK_EX|unix.LOCK_NB) }
	if err := control(f, lock); errors.Is(err, unix.EWOULDBLOCK) {
		return nil, fmt.Errorf("%w: %w", ErrBusy, err)
	} else if err != nil {
		return nil, err
	}
	want, err := journalHeaderFor(image.id)
	if err != nil {
		return nil, err
	}
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	have := make([]byte, journalHeader)
	if _, err := f.ReadAt(have, 0); err != nil || info.Size() != JournalBytes || !bytes.Equal(have, want) {
		if err := f.Truncate(0); err != nil {
			return nil, err
		}
	}
	var b []byte
	if err := control(f, func(fd int) (err error) {
		if err := unix.Fallocate(fd, 0, 0, JournalBytes); err != nil { // a page that can't be had later would be a SIGBUS
			return err
		}
		b, err = unix.Mmap(fd, 0, JournalBytes, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
		return err
	}); err != nil {
		return nil, classify(err)
	}
	copy(b, want)
	return &Journal{f: f, words: unsafe.Slice((*uint64)(unsafe.Pointer(unsafe.SliceData(b))), len(b)/8), b: b[journalHeader:]}, nil
}

// journalHeaderFor returns what a journal that is valid for an image begins with.
func journalHeaderFor(id identity) ([]byte, error) {
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return nil, err
	}
	h := make([]byte, 0, journalHeader)
	h = append(h, journalMagic...)
	h = append(h, boot...)
	h = binary.LittleEndian.AppendUint64(h, id.dev)
	h = binary.LittleEndian.AppendUint64(h, id.ino)
	return append(h, make([]byte, journalHeader-len(h))...), nil
}

// Load returns a copy of the memory.
func (j *Journal) Load() []byte { return slices.Clone(j.b) }

// Store copies p to off. Stores are there in their order, whenever the process dies; one of 8 bytes at a multiple of 8 is there as a whole or not
// at all.
func (j *Journal) Store(off int, p []byte) {
	if len(p) == 8 && off%8 == 0 {
		atomic.StoreUint64(&j.words[(journalHeader+off)/8], binary.NativeEndian.Uint64(p))
		return
	}
	copy(j.b[off:][:len(p)], p)
}

// Close unmaps the memory. What is in it stays.
func (j *Journal) Close() error {
	b := unsafe.Slice((*byte)(unsafe.Pointer(unsafe.SliceData(j.words))), len(j.words)*8)
	return errors.Join(unix.Munmap(b), j.f.Close())
}

// Remove removes the journal, and unmaps its memory. Its image is still locked: who opens that next makes a new journal.
func (j *Journal) Remove() error { return errors.Join(os.Remove(j.f.Name()), j.Close()) }
