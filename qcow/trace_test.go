package qcow_test

import (
	"context"
	"flag"
	"os"
	"testing"

	"github.com/qcow-csi/qcow-csi/qcow"
	"github.com/qcow-csi/qcow-csi/qcow/storage"
)

var update = flag.Bool("update", false, "write the golden traces anew")

// TestTrace fixes the order of writes and syncs of each kind of request. A change here is a change of what a crash leaves: read it
// against the rules of the design before running with -update.
func TestTrace(t *testing.T) {
	mem := storage.NewMemory()
	// A table of 64 entries for blocks of 64 refcounts; an L1 table of one cluster for 2 MiB.
	if err := qcow.Create(mem, qcow.CreateOptions{Size: 2<<20 - 512, ClusterSize: 512, RefcountBits: 64}); err != nil {
		t.Fatal(err)
	}
	rec := storage.NewRecorder(mem)
	img, err := qcow.Open(rec, qcow.FilledByTakers(qcow.Options{ReserveBytes: 16 * 512}))
	if err != nil {
		t.Fatal(err)
	}
	p := make([]byte, 4096)
	for i := range p {
		p[i] = 1
	}
	steps := []struct {
		what string
		do   func() error
	}{
		{"first write: fill the reserve, make an L2 table, data, link", func() error { _, err := img.WriteAt(p[:512], 0); return err }},
		{"overwrite: data only", func() error { _, err := img.WriteAt(p[:512], 0); return err }},
		{"write across two clusters, one of them new", func() error { _, err := img.WriteAt(p[:1024], 256); return err }},
		{"flush: one sync", img.Flush},
		{"discard: unlink", func() error { return img.Discard(0, 1024) }},
		{"flush after discard: sync, punch, lower the refcounts", img.Flush},
		{"write that empties the reserve and fills it again", func() error { _, err := img.WriteAt(p, 4096); _, err2 := img.WriteAt(p, 8192); return first(err, err2) }},
		{"write zeroes without unmap: in place", func() error { return img.WriteZeroes(4096, 700, false) }},
		{"write that needs a new refcount block", func() error {
			for off := int64(16384); off < 32768; off += 4096 {
				if _, err := img.WriteAt(p, off); err != nil {
					return err
				}
			}
			return nil
		}},
		{"grow within the L1 table: switch the header", func() error { return img.Resize(context.Background(), 2<<20) }},
		{"grow beyond the L1 table: build it aside, switch the header", func() error { return img.Resize(context.Background(), 3<<20) }},
		{"close: free the old L1 table, then the reserve, cut the file", img.Close},
	}
	for _, s := range steps {
		rec.Mark(s.what)
		if err := s.do(); err != nil {
			t.Fatalf("%s: %v", s.what, err)
		}
	}
	got := storage.Trace(rec.Ops())
	const golden = "testdata/trace.txt"
	if *update {
		if err := os.WriteFile(golden, []byte(got), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	if got != string(want) {
		t.Fatalf("the order of operations differs from %s:\n%s", golden, got)
	}
}

func first(errs ...error) error {
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}
