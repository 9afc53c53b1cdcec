package qcow_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"syscall"
	"testing"

	"github.com/qcow-csi/qcow-csi/qcow"
	"github.com/qcow-csi/qcow-csi/qcow/check"
	"github.com/qcow-csi/qcow-csi/qcow/storage"
)

// faultRun writes to an image whose file fails at some point, and keeps for every sector the values that it may have: one, unless the
// last request that touched it failed.
type faultRun struct {
	img      *qcow.Image
	cluster  int64
	rng      *rand.Rand
	serial   uint64
	possible [][]uint64
	failures []error
}

func (r *faultRun) result(off, n int64, value uint64, err error) {
	if err != nil {
		r.failures = append(r.failures, err)
	}
	for s := off / sector; s < (off+n)/sector; s++ {
		if err == nil {
			r.possible[s] = []uint64{value}
		} else {
			r.possible[s] = append(r.possible[s], value)
		}
	}
}

func (r *faultRun) step() {
	size := int64(len(r.possible)) * sector
	n := (r.rng.Int64N(4*r.cluster) + sector) / sector * sector
	off := r.rng.Int64N(size-n) / sector * sector
	switch r.rng.IntN(10) {
	case 0:
		r.result(off, n, 0, r.img.WriteZeroes(off, n, r.rng.IntN(2) == 0))
	case 1, 2:
		first, end := (off+r.cluster-1)/r.cluster*r.cluster, (off+n)/r.cluster*r.cluster
		r.result(first, max(end-first, 0), 0, r.img.Discard(off, n))
	case 3:
		r.result(0, 0, 0, r.img.Flush())
	case 4:
		r.result(0, 0, 0, r.img.Resize(context.Background(), r.img.Size()+r.cluster))
	default:
		r.serial++
		_, err := r.img.WriteAt(sectorsOf(r.serial, n), off)
		r.result(off, n, r.serial, err)
	}
}

// verify reads every sector that step may write.
func (r *faultRun) verify(img *qcow.Image) error {
	for s, values := range r.possible {
		got := make([]byte, sector)
		if _, err := img.ReadAt(got, int64(s)*sector); err != nil {
			return fmt.Errorf("sector %d: %w", s, err)
		}
		ok := slices.ContainsFunc(values, func(v uint64) bool { return bytes.Equal(got, sectorsOf(v, sector)) })
		if !ok && len(values) == 1 { // a failed write may have torn the sector, an acknowledged one must be there
			return fmt.Errorf("sector %d begins with % x, want one of %v", s, got[:8], values)
		}
	}
	return nil
}

// TestFault lets the k-th change of the file fail, for every k: whatever was acknowledged stays readable, also after opening the image
// again, and the tables stay valid.
func TestFault(t *testing.T) {
	kinds := []struct {
		name  string
		fault storage.Fault
	}{
		{"EIO once", storage.Fault{Err: syscall.EIO}},
		{"EIO for ever", storage.Fault{Err: syscall.EIO, Forever: true}},
		{"ENOSPC once", storage.Fault{Err: fmt.Errorf("%w: %w", storage.ErrNoSpace, syscall.ENOSPC)}},
		{"ENOSPC for ever", storage.Fault{Err: fmt.Errorf("%w: %w", storage.ErrNoSpace, syscall.ENOSPC), Forever: true}},
		{"short write once", storage.Fault{Err: syscall.EIO, Short: true}},
		{"short write for ever", storage.Fault{Err: syscall.ENOSPC, Short: true, Forever: true}},
	}
	o := qcow.CreateOptions{Size: 64 << 10, ClusterSize: 512, RefcountBits: 32}
	for _, kind := range kinds {
		for _, filled := range []string{"by takers", "in the background"} {
			t.Run(kind.name+"/"+filled, func(t *testing.T) {
				open := qcow.Options{ReserveBytes: 8 * int64(o.ClusterSize)}
				if filled == "by takers" {
					open = qcow.FilledByTakers(open)
				}
				injected := 0
				for at := 0; ; at += stride {
					fault := kind.fault
					fault.At = at
					n := faultCase(t, o, open, fault)
					if n == 0 {
						break
					}
					injected += n
				}
				t.Logf("%d faults", injected)
			})
		}
	}
}

// faultCase runs one workload with one fault and returns how many operations it failed.
func faultCase(t *testing.T, o qcow.CreateOptions, open qcow.Options, fault storage.Fault) (injected int) {
	mem := storage.NewMemory()
	if err := qcow.Create(mem, o); err != nil {
		t.Fatal(err)
	}
	faults := storage.NewFaults(mem, &fault)
	img, err := qcow.Open(faults, open)
	if err != nil {
		t.Fatal(err)
	}
	r := &faultRun{img: img, cluster: int64(o.ClusterSize), rng: rand.New(rand.NewPCG(1, 1)), possible: make([][]uint64, o.Size/sector)}
	for s := range r.possible {
		r.possible[s] = []uint64{0}
	}
	for range 300 {
		r.step()
	}
	if err := r.verify(img); err != nil {
		t.Fatalf("fault at %d: %v", fault.At, err)
	}
	closeErr := img.Close()
	_, injected = faults.Count()
	for _, err := range append(r.failures, closeErr) {
		if err != nil && !errors.Is(err, fault.Err) {
			t.Fatalf("fault at %d surfaced as %v", fault.At, err)
		}
	}
	report, err := check.Check(t.Context(), mem, check.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if report.Corruptions > 0 {
		t.Fatalf("fault at %d: %v", fault.At, report.Findings)
	}
	again, err := qcow.Open(mem, qcow.Options{})
	if err != nil {
		t.Fatalf("fault at %d: open again: %v", fault.At, err)
	}
	if err := r.verify(again); err != nil {
		t.Fatalf("fault at %d, after opening again: %v", fault.At, err)
	}
	if err := again.Close(); err != nil {
		t.Fatal(err)
	}
	return injected
}
