package generator_test

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/qcow-csi/qcow-csi/nbdexport"
	"github.com/qcow-csi/qcow-csi/nbdexport/nbdtest"
	"github.com/qcow-csi/qcow-csi/test/load/generator"
	"github.com/qcow-csi/qcow-csi/test/require"
)

const diskSize = 8 << 20

// serve serves b and returns the URI of its only export.
func serve(t *testing.T, b nbdexport.Backend) string {
	t.Helper()
	server, err := nbdexport.NewServer(nbdexport.Config{Exports: []nbdexport.Export{{Name: "disk", Backend: b}}})
	if err != nil {
		t.Fatal(err)
	}
	socket := filepath.Join(t.TempDir(), "s")
	listener, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- server.Serve(context.Background(), listener) }()
	t.Cleanup(func() {
		if err := errors.Join(server.Shutdown(context.Background()), <-served); err != nil {
			t.Error(err)
		}
	})
	return "nbd+unix:///disk?socket=" + socket
}

func newMemory() *nbdtest.Memory {
	return nbdtest.NewMemory(nbdexport.Info{Size: diskSize, MultiConn: true})
}

// TestVerify runs every pattern on the server, and finds what was written.
func TestVerify(t *testing.T) {
	uri := serve(t, newMemory())
	for _, rw := range []string{"read", "write", "randread", "randwrite", "randrw"} {
		for _, shape := range []struct {
			connections, depth int
			block, align       int64
		}{
			{1, 1, 4096, 0},
			{1, 64, 4096, 0},
			{4, 16, 512, 64 << 10},
			{2, 4, 64 << 10, 4096}, // overlapping
			{1, 8, 1 << 20, 0},     // more than the sockets hold
		} {
			r, err := generator.Job{
				URI:     uri,
				Pattern: generator.Pattern{RW: rw, Mix: 50, Block: shape.block, Align: shape.align, Seed: 7},
				Depth:   shape.depth, Connections: shape.connections, Runtime: 40 * time.Millisecond, Verify: true,
			}.Run(t.Context())
			switch {
			case err != nil:
				t.Fatalf("%s, %+v: %v", rw, shape, err)
			case r.Errors+r.Mismatches > 0:
				t.Errorf("%s, %+v: %+v", rw, shape, r)
			case strings.HasSuffix(rw, "read") && (r.Reads == 0 || r.Writes > 0):
				t.Errorf("%s, %+v: %d reads, %d writes", rw, shape, r.Reads, r.Writes)
			case strings.HasSuffix(rw, "write") && (r.Writes == 0 || r.Reads > 0):
				t.Errorf("%s, %+v: %d reads, %d writes", rw, shape, r.Reads, r.Writes)
			case r.IOPS <= 0 || r.MBs <= 0 || r.Seconds <= 0 || r.Latency.P50 <= 0 || r.Latency.P99 > r.Latency.Max:
				t.Errorf("%s, %+v: %+v", rw, shape, r)
			}
		}
	}
}

// swapped is a backend that mixes up two places.
type swapped struct{ *nbdtest.Memory }

func (s swapped) ReadAt(p []byte, off int64) (int, error) { return s.Memory.ReadAt(p, off^4096) }

// lossy is a backend that acknowledges writes without doing all of them.
type lossy struct{ *nbdtest.Memory }

func (l lossy) WriteAt(p []byte, off int64) (int, error) {
	if off&4096 != 0 {
		return len(p), nil
	}
	return l.Memory.WriteAt(p, off)
}

func TestVerifyFinds(t *testing.T) {
	for name, b := range map[string]nbdexport.Backend{"swapped": swapped{newMemory()}, "lossy": lossy{newMemory()}} {
		r, err := job(serve(t, b), "randrw").Run(t.Context())
		if err != nil || r.Mismatches == 0 || r.First == "" || r.Errors != 0 {
			t.Errorf("%s: %+v, %v", name, r, err)
		}
	}
}

func job(uri, rw string) generator.Job {
	return generator.Job{
		URI: uri, Pattern: generator.Pattern{RW: rw, Mix: 50, Block: 4096},
		Depth: 8, Connections: 2, Runtime: 50 * time.Millisecond, Verify: true,
	}
}

func TestErrorsAreCounted(t *testing.T) {
	m := newMemory()
	m.Before = func(o nbdtest.Operation) error {
		if o.Kind == nbdtest.Write && o.Offset < diskSize/2 {
			return io.ErrUnexpectedEOF
		}
		return nil
	}
	r, err := job(serve(t, m), "randrw").Run(t.Context())
	if err != nil || r.Errors == 0 || r.Writes == 0 || r.Mismatches != 0 || !strings.Contains(r.First, "error 5") {
		t.Errorf("%+v, %v", r, err)
	}
}

// TestDistinct uses every place once, and then ends.
func TestDistinct(t *testing.T) {
	const places = 101 // no power of two, no multiple of the workers
	m := newMemory()
	var mu sync.Mutex
	seen := map[int64]int{}
	m.Before = func(o nbdtest.Operation) error {
		mu.Lock()
		defer mu.Unlock()
		if o.Kind == nbdtest.Write {
			seen[o.Offset]++
		}
		return nil
	}
	j := job(serve(t, m), "randwrite")
	j.Align, j.Size, j.Distinct, j.Runtime = 64<<10, places*64<<10, true, time.Minute
	r, err := j.Run(t.Context())
	if err != nil || r.Errors != 0 || r.Writes != places-1 {
		t.Errorf("%+v, %v", r, err)
	}
	mu.Lock() // the server may be about to let go of it
	defer mu.Unlock()
	for off, n := range seen {
		if n != 1 || off%(64<<10) != 0 {
			t.Errorf("%d writes at %d", n, off)
		}
	}
	if len(seen) != places-1 { // each of the two connections has the half, rounded down
		t.Errorf("%d places were used", len(seen))
	}
}

// TestStructured talks to a server that sends structured replies, with holes and data in one reply.
func TestStructured(t *testing.T) {
	require.Tool(t, "qemu-nbd")
	dir := t.TempDir()
	disk, socket := filepath.Join(dir, "disk"), filepath.Join(dir, "s")
	if err := os.WriteFile(disk, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(disk, diskSize); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("qemu-nbd", "--format=raw", "--socket="+socket, "--persistent", "--shared=4", disk)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	for range 500 {
		if _, err := os.Stat(socket); err == nil {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	for _, rw := range []string{"randread", "randrw", "read"} {
		for _, verify := range []bool{true, false} {
			j := job("nbd+unix:///?socket="+socket, rw)
			j.Block, j.Align, j.Structured, j.Verify = 192<<10, 4096, true, verify
			r, err := j.Run(t.Context())
			if err != nil || r.Errors+r.Mismatches > 0 || r.Reads == 0 || !r.Structured {
				t.Errorf("%s: %+v, %v", rw, r, err)
			}
		}
	}
}

func TestFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(path, make([]byte, diskSize), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, rw := range []string{"read", "write", "randread", "randwrite", "randrw"} {
		j := job("", rw)
		j.File, j.Depth = path, 64
		r, err := j.Run(t.Context())
		if err != nil || r.Errors+r.Mismatches > 0 || r.Reads+r.Writes == 0 || r.Connections != generator.MaxThreads {
			t.Errorf("%s: %+v, %v", rw, r, err)
		}
	}
}

func TestRefused(t *testing.T) {
	uri := serve(t, newMemory())
	for name, change := range map[string]func(*generator.Job){
		"no target":        func(j *generator.Job) { j.URI = "" },
		"two targets":      func(j *generator.Job) { j.File = "x" },
		"other URI":        func(j *generator.Job) { j.URI = "nbd://localhost" },
		"no server":        func(j *generator.Job) { j.URI += ".not" },
		"no export":        func(j *generator.Job) { j.URI = strings.Replace(j.URI, "disk", "other", 1) },
		"no pattern":       func(j *generator.Job) { j.RW = "trim" },
		"past the end":     func(j *generator.Job) { j.Size = diskSize + 1 },
		"no block":         func(j *generator.Job) { j.Block = 0 },
		"huge block":       func(j *generator.Job) { j.Block = diskSize },
		"odd block":        func(j *generator.Job) { j.Block = 1000 },
		"no depth":         func(j *generator.Job) { j.Depth = 0 },
		"too deep":         func(j *generator.Job) { j.Depth = generator.MaxDepth + 1 },
		"no time":          func(j *generator.Job) { j.Runtime = 0 },
		"mix":              func(j *generator.Job) { j.Mix = 101 },
		"distinct in line": func(j *generator.Job) { j.RW, j.Distinct = "read", true },
	} {
		j := job(uri, "randread")
		change(&j)
		if r, err := j.Run(t.Context()); err == nil {
			t.Errorf("%s: %+v", name, r)
		}
	}
}

// TestCancel ends a job whose server does not answer.
func TestCancel(t *testing.T) {
	m := newMemory()
	release := make(chan struct{})
	m.Before = func(nbdtest.Operation) error {
		<-release
		return nil
	}
	defer close(release)
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if r, err := job(serve(t, m), "randread").Run(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("%+v, %v", r, err)
	}
}
