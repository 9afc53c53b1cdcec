package qcow_test

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"syscall"
	"testing"

	"github.com/qcow-csi/qcow-csi/qcow"
	"github.com/qcow-csi/qcow-csi/qcow/check"
	"github.com/qcow-csi/qcow-csi/qcow/format"
	"github.com/qcow-csi/qcow-csi/qcow/storage"
)

// expectNoneOrWhole demands that a file which Create may not have finished is no image at all, or the whole one. data is the data file.
func (r recipe) expectNoneOrWhole(content, data []byte) error {
	if len(content) < 4 || binary.BigEndian.Uint32(content) != format.Magic {
		return nil
	}
	report, err := check.Check(context.Background(), storage.NewMemoryFrom(content), check.Options{})
	if err != nil {
		return err
	}
	if !report.Clean() {
		return fmt.Errorf("%v", report)
	}
	h, err := format.DecodeHeader(content)
	if err != nil {
		return err
	}
	if h.BackingFile != r.o.BackingFile || h.BackingFormat() != r.o.BackingFormat {
		return fmt.Errorf("the backing file is %q, %q", h.BackingFile, h.BackingFormat())
	}
	base := storage.NewMemory()
	if err := qcow.Create(base, qcow.CreateOptions{Size: 1 << 20}); err != nil {
		return err
	}
	img, err := qcow.Open(storage.NewMemoryFrom(content), qcow.Options{Passphrase: []byte(secret), Gate: func(ref qcow.Reference) (qcow.Opened, error) {
		if ref.Role == qcow.DataFile && ref.Name == "data" {
			return qcow.Opened{File: storage.NewMemoryFrom(data)}, nil
		}
		return qcow.Opened{File: base, Format: ref.Format}, nil
	}})
	if err != nil {
		return err
	}
	disk := make([]byte, r.o.Size)
	if _, err := img.ReadAt(disk, 0); err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	if i := firstDifference(disk, make([]byte, r.o.Size)); i >= 0 {
		return fmt.Errorf("byte %d of the disk is %#x", i, disk[i])
	}
	if r.external && int64(len(data)) != r.o.Size {
		return fmt.Errorf("the data file has %d bytes", len(data))
	}
	return img.Close()
}

// createRecorded makes an image in memory over recorders of the image and its data file.
func (r recipe) createRecorded(wrap func(f storage.File, index int) storage.File) error {
	img := wrap(storage.NewMemory(), 0)
	data := wrap(storage.NewMemory(), 1)
	if r.external {
		r.o.DataFile, r.o.DataFileName = data, "data"
	}
	return qcow.Create(img, r.o)
}

// crashRecipes are recipes of disks that fit into many states.
func crashRecipes() []recipe {
	var small []recipe
	for _, r := range recipes(96 << 10) {
		if r.o.ClusterSize <= 64<<10 {
			small = append(small, r)
		}
	}
	return small
}

// TestCreateCrash enumerates what a crash leaves of a Create: nothing that could be taken for an image, or the whole.
func TestCreateCrash(t *testing.T) {
	o := storage.CrashOptions{Exhaustive: 5, Random: 8}
	if long() {
		o = storage.CrashOptions{}
	}
	states, whole := 0, 0
	for _, r := range crashRecipes() {
		t.Run(r.name, func(t *testing.T) {
			var group storage.RecorderGroup
			var files [2]*storage.Recorder
			err := r.createRecorded(func(f storage.File, i int) storage.File {
				files[i] = group.Record(f)
				return files[i]
			})
			if err != nil {
				t.Fatal(err)
			}
			for s := range storage.GroupCrashStates([][]byte{nil, nil}, group.Ops(), o) {
				states++
				if len(s.Contents[0]) >= 4 && binary.BigEndian.Uint32(s.Contents[0]) == format.Magic {
					whole++
				}
				if err := r.expectNoneOrWhole(s.Contents[0], s.Contents[1]); err != nil {
					t.Fatalf("%s: %v\n%s", s.Name, err, storage.Trace(group.Ops()))
				}
			}
		})
	}
	t.Logf("%d states, %d of them images", states, whole)
}

// TestCreateFault lets the k-th change of the files fail, for every k: Create says so, and leaves nothing that could be taken for an image, or the
// whole one.
func TestCreateFault(t *testing.T) {
	kinds := []storage.Fault{
		{Err: syscall.EIO},
		{Err: syscall.EIO, Forever: true},
		{Err: fmt.Errorf("%w: %w", storage.ErrNoSpace, syscall.ENOSPC), Short: true},
		{Err: fmt.Errorf("%w: %w", storage.ErrNoSpace, syscall.ENOSPC), Short: true, Forever: true},
	}
	injected := 0
	for _, r := range crashRecipes() {
		for _, kind := range kinds {
			for file := range 2 {
				if file == 1 && !r.external {
					continue
				}
				for at := 0; ; at++ {
					kind.At = at
					var files [2]storage.File
					var faults *storage.Faults
					err := r.createRecorded(func(f storage.File, i int) storage.File {
						files[i] = f
						if i == file {
							faults = storage.NewFaults(f, &kind)
							return faults
						}
						return f
					})
					_, n := faults.Count()
					if n == 0 {
						if err != nil {
							t.Fatal(err)
						}
						break
					}
					injected++
					if !errors.Is(err, kind.Err) {
						t.Fatalf("%s: fault %d of file %d: %v", r.name, at, file, err)
					}
					if err := r.expectNoneOrWhole(files[0].(*storage.Memory).Bytes(), files[1].(*storage.Memory).Bytes()); err != nil {
						t.Fatalf("%s: fault %d of file %d, %+v: %v", r.name, at, file, kind, err)
					}
				}
			}
		}
	}
	t.Logf("%d faults", injected)
}

// A ledger is a file that keeps nothing but its first megabytes, and notes what else was written.
type ledger struct {
	storage.Memory
	kept, length, written, largest int64
	onWrite                        func(p []byte, off int64)
}

func (l *ledger) Truncate(size int64) error { l.length = size; return nil }
func (l *ledger) Size() (int64, error)      { return l.length, nil }

func (l *ledger) WriteAt(p []byte, off int64) (int, error) {
	l.length = max(l.length, off+int64(len(p)))
	l.written += int64(len(p))
	l.largest = max(l.largest, int64(len(p)))
	if l.onWrite != nil {
		l.onWrite(p, off)
	}
	if off < l.kept {
		return l.Memory.WriteAt(p, off)
	}
	return len(p), nil
}

// TestCreateStreams makes an image of which the tables are larger than any write, and than what is worth holding in memory. It ends when its
// context does.
func TestCreateStreams(t *testing.T) {
	const size = 1 << 40
	l := &ledger{kept: 1 << 20}
	var last, calls int64
	o := qcow.CreateOptions{Size: size, Preallocation: qcow.PreallocationMetadata, Progress: func(done, total int64) {
		if done < last || done > total {
			t.Fatalf("progress: %d of %d after %d", done, total, last)
		}
		last = done
		calls++
	}}
	if err := qcow.Create(l, o); err != nil {
		t.Fatal(err)
	}
	const tables = size / (8 << 10) // an entry of 8 bytes for a cluster of 64 KiB
	if l.largest > 1<<20 || l.written < tables || l.written > tables*3/2 {
		t.Errorf("%d bytes were written, at most %d at once", l.written, l.largest)
	}
	if l.length < size || l.length > size+size/1000 {
		t.Errorf("the file has %d bytes", l.length)
	}
	if calls < tables>>20 {
		t.Errorf("%d calls of Progress", calls)
	}

	ctx, cancel := context.WithCancelCause(t.Context())
	l = &ledger{kept: 1 << 20, onWrite: func(_ []byte, off int64) {
		if off > 64<<20 {
			cancel(nil)
		}
	}}
	o.Progress = nil
	if err := qcow.CreateContext(ctx, l, o); !errors.Is(err, context.Canceled) {
		t.Fatalf("cancelled: %v", err)
	}
	if b := l.Bytes(); len(b) < 4 || binary.BigEndian.Uint32(b) == format.Magic {
		t.Fatal("a cancelled Create has left a header")
	}
}
