package nbdtest

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"sync"
	"testing"

	"github.com/qcow-csi/qcow-csi/nbdexport"
)

// BackendSize is the size in bytes that TestBackend wants a backend to have.
const BackendSize = 8 << 20

// TestBackend makes sure that what open returns keeps the promises of [nbdexport.Backend]. Each call returns a
// writable backend of BackendSize zero bytes, which open itself closes at the end of the test that it gets.
func TestBackend(t *testing.T, open func(*testing.T) nbdexport.Backend) {
	for name, test := range map[string]func(*testing.T, nbdexport.Backend){
		"Empty":       testEmpty,
		"Edges":       testEdges,
		"WriteZeroes": testWriteZeroes,
		"Discard":     testDiscard,
		"Model":       testModel,
		"Concurrent":  testConcurrent,
	} {
		t.Run(name, func(t *testing.T) { test(t, open(t)) })
	}
}

func testEmpty(t *testing.T, b nbdexport.Backend) {
	if i := b.Info(); i.Size != BackendSize || i.ReadOnly {
		t.Fatalf("Info() = %+v", i)
	}
	want(t, b, 0, make([]byte, BackendSize))
	if err := b.Flush(); err != nil {
		t.Errorf("Flush: %v", err)
	}
}

// testEdges writes single bytes and more around places where something may begin or end.
func testEdges(t *testing.T, b nbdexport.Backend) {
	model := make([]byte, BackendSize)
	for _, at := range []int{0, 512, 4096, 64 << 10, 512 << 10, 1 << 20, 2 << 20, BackendSize} {
		for _, n := range []int{1, 2, 511, 513, 5000} {
			for _, off := range []int{at - n, at - n/2, at} {
				if off < 0 || off+n > BackendSize {
					continue
				}
				p := model[off:][:n]
				copy(p, bytes.Repeat([]byte{byte(off), byte(n), 1}, n))
				put(t, b, off, p)
			}
		}
	}
	want(t, b, 0, model)
}

func testWriteZeroes(t *testing.T, b nbdexport.Backend) {
	model := fill(t, b)
	for _, r := range []struct {
		off, n   int
		mayUnmap bool
	}{
		{0, 1, true},
		{1000, 5000, false},
		{128 << 10, 256 << 10, true},
		{512 << 10, 256 << 10, false},
		{1<<20 + 7, 3<<20 + 11, true},
		{5<<20 - 7, 1 << 20, false},
		{BackendSize - 1, 1, true},
	} {
		if err := b.WriteZeroes(int64(r.off), int64(r.n), nbdexport.Zeroing{MayUnmap: r.mayUnmap}); err != nil {
			t.Errorf("WriteZeroes(%d, %d, %t): %v", r.off, r.n, r.mayUnmap, err)
		}
		clear(model[r.off:][:r.n])
	}
	want(t, b, 0, model)
	// What has become zero can be written to again.
	put(t, b, 1<<20+7, model[2<<20:][:100])
	put(t, b, 600<<10, []byte("again"))
	copy(model[1<<20+7:], model[2<<20:][:100])
	copy(model[600<<10:], "again")
	want(t, b, 0, model)
}

// testDiscard wants what lies outside of a discarded range untouched, and what lies inside to be zeroes or what it was.
func testDiscard(t *testing.T, b nbdexport.Backend) {
	model := fill(t, b)
	const off, n = 1<<20 + 300, 2 << 20
	if err := b.Discard(off, n); err != nil {
		t.Errorf("Discard: %v", err)
	}
	want(t, b, 0, model[:off])
	want(t, b, off+n, model[off+n:])
	for i, c := range get(t, b, off, n) {
		if c != 0 && c != model[off+i] {
			t.Fatalf("byte %d in a discarded range is %#x", i, c)
		}
	}
}

// testModel carries out random operations and compares with a model.
func testModel(t *testing.T, b nbdexport.Backend) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	model := make([]byte, BackendSize)
	for range 300 {
		n := 1 + rng.IntN(300<<10)
		off := rng.IntN(BackendSize - n + 1)
		p := model[off:][:n]
		switch rng.IntN(6) {
		case 0, 1, 2:
			copy(p, bytes.Repeat([]byte{byte(rng.Uint32()), byte(rng.Uint32())}, n))
			put(t, b, off, p)
		case 3:
			clear(p)
			if err := b.WriteZeroes(int64(off), int64(n), nbdexport.Zeroing{MayUnmap: rng.IntN(2) == 0}); err != nil {
				t.Errorf("WriteZeroes: %v", err)
			}
		case 4:
			want(t, b, off, p)
		case 5:
			if err := b.Flush(); err != nil {
				t.Errorf("Flush: %v", err)
			}
		}
	}
	want(t, b, 0, model)
}

// testConcurrent lets goroutines use neighboring ranges.
func testConcurrent(t *testing.T, b nbdexport.Backend) {
	const goroutines, stride = 8, 100_000 // no multiple of anything that a backend might like
	var all sync.WaitGroup
	for i := range goroutines {
		all.Go(func() {
			for round := range 20 {
				off := i*stride + round*1000
				p := bytes.Repeat([]byte{byte(i + 1), byte(round)}, stride/4)
				put(t, b, off, p)
				if got := get(t, b, off, len(p)); !bytes.Equal(got, p) {
					t.Errorf("goroutine %d, round %d: read something else than it wrote", i, round)
				}
				if round%5 == 0 {
					if err := b.Flush(); err != nil {
						t.Errorf("Flush: %v", err)
					}
				}
			}
		})
	}
	all.Wait()
}

// fill writes bytes other than zero everywhere and returns them.
func fill(t *testing.T, b nbdexport.Backend) []byte {
	t.Helper()
	p := bytes.Repeat([]byte("0123456789abcde"), BackendSize/15+1)[:BackendSize]
	put(t, b, 0, p)
	return p
}

func put(t *testing.T, b nbdexport.Backend, off int, p []byte) {
	t.Helper()
	if n, err := b.WriteAt(p, int64(off)); err != nil || n != len(p) {
		t.Errorf("WriteAt(%d bytes, %d): %d, %v", len(p), off, n, err)
	}
}

func get(t *testing.T, b nbdexport.Backend, off, n int) []byte {
	t.Helper()
	p := bytes.Repeat([]byte{0xee}, n)
	if got, err := b.ReadAt(p, int64(off)); got != n || err != nil && !errors.Is(err, io.EOF) {
		t.Errorf("ReadAt(%d bytes, %d): %d, %v", n, off, got, err)
	}
	return p
}

func want(t *testing.T, b nbdexport.Backend, off int, p []byte) {
	t.Helper()
	got := get(t, b, off, len(p))
	for i := range p {
		if got[i] != p[i] {
			t.Fatalf("byte %d is %#x, want %#x", off+i, got[i], p[i])
		}
	}
}
