package storage

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"path/filepath"
	"testing"
)

// everyFile calls test with an empty file of each kind.
func everyFile(t *testing.T, test func(t *testing.T, f File)) {
	t.Helper()
	for name, create := range map[string]func(t *testing.T) File{
		"file":     func(t *testing.T) File { f, _ := newOSFile(t); return f },
		"direct":   func(t *testing.T) File { f, _ := newDirectFile(t); return f },
		"memory":   func(*testing.T) File { return NewMemory() },
		"recorder": func(*testing.T) File { return NewRecorder(NewMemory()) },
		"faults":   func(*testing.T) File { return NewFaults(NewMemory(), nil) },
	} {
		t.Run(name, func(t *testing.T) {
			f := create(t)
			defer closeFile(t, f)
			test(t, f)
		})
	}
}

func TestFile(t *testing.T) {
	everyFile(t, func(t *testing.T, f File) {
		expectContent(t, f, nil)
		mustWrite(t, f, []byte("abc"), 2)
		expectContent(t, f, []byte("\x00\x00abc"))
		mustDo(t, f.Truncate(4), f.Truncate(6)) // what was cut off does not come back
		expectContent(t, f, []byte("\x00\x00ab\x00\x00"))
		mustDo(t, f.PunchHole(3, 100), f.PunchHole(50, 10), f.PunchHole(2, 0)) // the length stays
		expectContent(t, f, []byte("\x00\x00a\x00\x00\x00"))
		mustDo(t, f.Sync())
		if n, err := f.WriteSync([]byte("xyz"), 7); n != 3 || err != nil {
			t.Fatalf("synchronous write: %d, %v", n, err)
		}
		if n, err := f.WriteSync(nil, 100); n != 0 || err != nil {
			t.Fatalf("synchronous write of nothing: %d, %v", n, err)
		}
		expectContent(t, f, []byte("\x00\x00a\x00\x00\x00\x00xyz"))
		mustDo(t, f.Allocate(1, 5), f.Allocate(8, 4), f.Allocate(100, 0)) // the content stays, the length grows
		expectContent(t, f, []byte("\x00\x00a\x00\x00\x00\x00xyz\x00\x00"))
		if n, err := f.ReadAt(make([]byte, 1), 12); n != 0 || !errors.Is(err, io.EOF) {
			t.Errorf("read behind the end: %d, %v", n, err)
		}
	})
}

// Every file does what a slice of bytes does, whatever the size and alignment of the requests.
func TestFileAgainstModel(t *testing.T) {
	const limit = 200_000
	const seed = 5
	t.Logf("seed %d", seed)
	everyFile(t, func(t *testing.T, f File) {
		rng := rand.New(rand.NewPCG(seed, 0))
		var model []byte
		grow := func(size int64) { model = append(model, make([]byte, max(0, size-int64(len(model))))...) }
		for i := range 400 {
			unit := []int{1, 512, 4096}[rng.IntN(3)]
			off := int64(rng.IntN(limit/unit) * unit)
			n := 1 + rng.IntN(4)*unit + rng.IntN(unit)
			if rng.IntN(2) == 0 {
				n = unit * (1 + rng.IntN(8))
			}
			p := AlignedBuffer(n+1, 4096)
			if rng.IntN(4) == 0 {
				p = p[1:]
			}
			p = p[:n]
			switch op := rng.IntN(8); op {
			case 0, 1, 2:
				for k := range p {
					p[k] = byte(i + k%7 + 1)
				}
				write := f.WriteAt
				if op == 2 {
					write = f.WriteSync
				}
				if n, err := write(p, off); n != len(p) || err != nil {
					t.Fatalf("write %#x+%#x: %d, %v", off, len(p), n, err)
				}
				grow(off + int64(n))
				copy(model[off:], p)
			case 3:
				mustDo(t, f.PunchHole(off, int64(n)))
				clear(model[min(off, int64(len(model))):min(off+int64(n), int64(len(model)))])
			case 4:
				mustDo(t, f.Allocate(off, int64(n)))
				grow(off + int64(n))
			case 5:
				if rng.IntN(4) == 0 {
					mustDo(t, f.Truncate(off))
					grow(off)
					model = model[:off:off]
				}
			case 6, 7:
				got, err := f.ReadAt(p, off)
				want := model[min(off, int64(len(model))):min(off+int64(n), int64(len(model)))]
				if (got < n) != errors.Is(err, io.EOF) || got == n && err != nil || !bytes.Equal(p[:got], want) {
					t.Fatalf("read %#x+%#x of a file of %#x bytes: %d, %v; content equal: %t", off, n, len(model), got, err, bytes.Equal(p[:got], want))
				}
			}
			expectDataFrom(t, f, model, off)
		}
		expectContent(t, f, model)
	})
}

// expectDataFrom expects that what NextData leaves out is zero in content.
func expectDataFrom(t *testing.T, f File, content []byte, off int64) {
	t.Helper()
	start, end, err := f.NextData(off)
	size := int64(len(content))
	if errors.Is(err, io.EOF) {
		start = size
	} else if err != nil || start < off || end <= start || end > size {
		t.Fatalf("data behind %#x of %#x: %#x to %#x, %v", off, size, start, end, err)
	}
	if off < start && !bytes.Equal(content[off:start], make([]byte, start-off)) {
		t.Fatalf("data behind %#x begins at %#x, but there is some before", off, start)
	}
}

func TestNextDataFindsHoles(t *testing.T) {
	const mega = 1 << 20
	everyFile(t, func(t *testing.T, f File) {
		if _, _, err := f.NextData(0); !errors.Is(err, io.EOF) {
			t.Errorf("data in an empty file: %v", err)
		}
		data := bytes.Repeat([]byte{1}, mega)
		mustWrite(t, f, data, mega)
		mustWrite(t, f, data, 3*mega)
		mustDo(t, f.Truncate(6*mega), f.Sync())
		for _, c := range []struct{ off, start, end int64 }{
			{0, mega, 2 * mega},
			{mega + 100, mega + 100, 2 * mega},
			{2 * mega, 3 * mega, 4 * mega},
			{4*mega - 1, 4*mega - 1, 4 * mega},
		} {
			start, end, err := f.NextData(c.off)
			if start != c.start || end != c.end || err != nil {
				t.Errorf("data behind %#x: %#x to %#x, %v; want %#x to %#x", c.off, start, end, err, c.start, c.end)
			}
		}
		for _, off := range []int64{4 * mega, 6*mega - 1, 6 * mega, 7 * mega} {
			if start, end, err := f.NextData(off); !errors.Is(err, io.EOF) {
				t.Errorf("data behind %#x, where there is none: %#x to %#x, %v", off, start, end, err)
			}
		}
		mustDo(t, f.PunchHole(mega, mega))
		if start, _, err := f.NextData(0); start != 3*mega || err != nil {
			t.Errorf("after a punch data begins at %#x, %v", start, err)
		}
	})
}

// Without holes that the file system can find, all of the file may be data.
func TestNextDataWithoutHoles(t *testing.T) {
	f, _ := newOSFile(t)
	defer closeFile(t, f)
	mustDo(t, f.Truncate(100))
	if start, end, err := f.restOf(40); start != 40 || end != 100 || err != nil {
		t.Errorf("%d to %d, %v", start, end, err)
	}
	if _, _, err := f.restOf(100); !errors.Is(err, io.EOF) {
		t.Errorf("behind the end: %v", err)
	}
	if _, _, err := f.NextData(-1); err == nil || errors.Is(err, io.EOF) {
		t.Errorf("before the beginning: %v", err)
	}
}

func TestAllocateReservesSpace(t *testing.T) {
	const size = 4 << 20
	f, _ := newOSFile(t)
	defer closeFile(t, f)
	mustWrite(t, f, []byte("abc"), 0)
	mustDo(t, f.Allocate(0, size))
	if got, err := f.AllocatedBytes(); err != nil || got < size {
		t.Errorf("after an allocation of %d bytes the file takes %d, %v", size, got, err)
	}
	want := make([]byte, size)
	copy(want, "abc")
	expectContent(t, f, want)
	mustDo(t, f.Truncate(3), f.Allocate(3, size)) // again, over what is there
	if err := f.Allocate(0, 1<<62); !errors.Is(err, ErrNoSpace) {
		t.Errorf("allocation of more than there can be: %v", err)
	}
	if err := f.Allocate(0, -1); err == nil || errors.Is(err, ErrUnsupported) {
		t.Errorf("allocation of less than nothing: %v", err)
	}
}

func TestWriteThenSync(t *testing.T) {
	f, path := newOSFile(t)
	if n, err := f.writeThenSync([]byte("abc"), 1); n != 3 || err != nil {
		t.Errorf("%d, %v", n, err)
	}
	expectContent(t, f, []byte("\x00abc"))
	closeFile(t, f)
	f, err := Open(path, ReadOnly)
	mustDo(t, err)
	defer closeFile(t, f)
	if n, err := f.writeThenSync([]byte("x"), 0); n != 0 || err == nil {
		t.Errorf("without permission: %d, %v", n, err)
	}
}

// A file that was created for nothing is removed, one that was there is not.
func TestOpenWithCleansUp(t *testing.T) {
	f, path := newOSFile(t)
	closeFile(t, f)
	if _, err := OpenWith(path, Options{Create: true}); err == nil {
		t.Fatal("created a file that exists")
	}
	f, err := OpenWith(path, Options{Mode: ReadWrite})
	mustDo(t, err)
	closeFile(t, f)
	if _, err := OpenWith(filepath.Join(filepath.Dir(path), "missing"), Options{Mode: ReadWrite}); err == nil {
		t.Error("opened a file that does not exist")
	}
}
