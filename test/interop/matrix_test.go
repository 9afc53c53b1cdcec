package interop_test

import (
	"fmt"
	"math/rand/v2"
	"sync/atomic"
	"testing"
	"time"

	"github.com/qcow-csi/qcow-csi/test/require"
)

// A direction says who makes an image, and who goes on with it.
type direction struct {
	name          string
	matrix        func() *matrix
	first, second func(s *subject) author
	more          []string // combinations that have found something, besides those of the covering set
}

var directions = []direction{
	{"QEMU", matrixOfQEMU, byQEMU, byEngine, []string{
		"cluster=8K,refcount=1,lazy=on,encryption=luks,data=file,preallocation=falloc,zeroes=kept,discard=yes,size=ragged,change=grow,then=grow",
		"cluster=16K,refcount=8,extended=on,compression=zlib,backing=short,preallocation=falloc,discard=yes,size=ragged,change=amend,then=stream",
	}},
	{"engine", matrixOfEngine, byEngine, byQEMU, []string{
		"cluster=2K,refcount=64,encryption=luks,backing=qcow2,data=file,discard=yes,size=ragged,then=grow",
		"cluster=8K,refcount=2,compression=zstd,backing=short,bitmaps=3,zeroes=kept,size=ragged,change=shrink,then=grow",
	}},
}

func byQEMU(s *subject) author   { return theirs{s} }
func byEngine(s *subject) author { return &ours{s: s} }

// TestMatrixOfQEMU has QEMU make an image of each combination of a covering set. The engine reads it, checks and maps it, writes on
// and changes it as a whole; QEMU checks and reads that, snapshots included, and writes on; and the engine reads once more.
func TestMatrixOfQEMU(t *testing.T) {
	testMatrix(t, directions[0], func(s *subject) []func() error {
		list := []func() error{s.make, s.checksThere, s.readsHere, s.mapsAlike}
		if !s.c.is(byEncryption, "aes") {
			list = append(list, s.goOn, s.readsThere, s.readsHere)
		}
		return append(list, s.goBack, s.readsHere)
	})
}

// TestMatrixOfEngine has the engine make the images. QEMU checks, maps and reads them, writes on and changes them as a whole; the engine
// checks and reads that, and writes on; and QEMU checks and reads once more.
func TestMatrixOfEngine(t *testing.T) {
	testMatrix(t, directions[1], func(s *subject) []func() error {
		return []func() error{s.make, s.readsThere, s.readsHere, s.mapsAlike, s.goOn, s.checksThere, s.readsHere, s.goBack, s.readsThere, s.readsHere}
	})
}

// testMatrix does, side by side, with each image what story tells.
func testMatrix(t *testing.T, d direction, story func(s *subject) []func() error) {
	require.Tool(t, "qemu-img", "qemu-io", "qemu-nbd", "nbdinfo")
	b := newBench(t, d)
	list := coveringSets()[d.name]
	for _, values := range d.more {
		list = append(list, b.matrix.parse(t, values))
	}
	if long() {
		list = append(list, b.randomCombinations(3000)...)
	}
	var passed atomic.Int64
	began := time.Now()
	t.Run("images", func(t *testing.T) {
		for i, c := range list {
			if i%stride != 0 {
				continue
			}
			t.Run(fmt.Sprintf("%04d", i), func(t *testing.T) {
				t.Parallel()
				s := b.newSubject(t, i, c)
				do := story(s)
				if !c.is(byBitmaps, "0") && i%4 == 0 {
					do = append(do, s.bitmapsReadAlike)
				}
				if err := steps(do...); err != nil {
					t.Fatal(err)
				}
				passed.Add(1)
			})
		}
	})
	t.Logf("%d of %d images in %v", passed.Load(), (len(list)+stride-1)/stride, time.Since(began).Round(time.Second))
}

func (b *bench) randomCombinations(n int) []combination {
	rng := rand.New(rand.NewPCG(b.seed, 0))
	list := make([]combination, n)
	for i := range list {
		list[i], _ = b.matrix.undecided().complete(rng)
	}
	return list
}
