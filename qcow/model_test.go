package qcow_test

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"testing"

	"github.com/qcow-csi/qcow-csi/qcow"
	"github.com/qcow-csi/qcow-csi/qcow/check"
	"github.com/qcow-csi/qcow-csi/qcow/storage"
)

// TestModel runs random requests of any alignment against a flat model, over every refcount width and from the smallest to the largest
// cluster, and opens the image anew now and then.
func TestModel(t *testing.T) {
	steps := 250
	if long() {
		steps = 5000
	}
	for _, cluster := range []int{512, 1024, 4096, 64 << 10, 2 << 20} {
		for _, width := range []int{1, 2, 4, 8, 16, 32, 64} {
			t.Run(fmt.Sprintf("cluster=%d/refcount=%d", cluster, width), func(t *testing.T) {
				t.Parallel()
				m := newModel(t, qcow.CreateOptions{Size: 5<<20 + 3*512, ClusterSize: cluster, RefcountBits: width})
				for range steps {
					m.step()
				}
				m.compare()
				m.reopen()
				m.compare()
				m.reopen()
			})
		}
	}
}

type model struct {
	t       *testing.T
	rng     *rand.Rand
	file    *storage.Memory
	img     *qcow.Image
	cluster int64
	want    []byte
	noise   []byte // random bytes to write pieces of
}

func newModel(t *testing.T, o qcow.CreateOptions) *model {
	m := &model{t: t, rng: rand.New(rand.NewPCG(7, uint64(o.RefcountBits))), file: storage.NewMemory(), cluster: int64(o.ClusterSize), want: make([]byte, o.Size), noise: make([]byte, 1<<20)}
	for i := range m.noise {
		m.noise[i] = byte(m.rng.Uint32())
	}
	if err := qcow.Create(m.file, o); err != nil {
		t.Fatal(err)
	}
	m.open()
	return m
}

func (m *model) open() {
	var err error
	m.img, err = qcow.Open(m.file, qcow.Options{CacheBytes: 1, ReserveBytes: 32 << m.rng.IntN(16)})
	if err != nil {
		m.t.Fatal(err)
	}
}

// reopen closes the image, which must leave it without any finding, and opens it again.
func (m *model) reopen() {
	m.t.Helper()
	if err := m.img.Close(); err != nil {
		m.t.Fatal(err)
	}
	report, err := check.Check(m.t.Context(), m.file, check.Options{})
	if err != nil {
		m.t.Fatal(err)
	}
	if !report.Clean() {
		m.t.Fatalf("after close: %v", report.Findings)
	}
	m.open()
}

func (m *model) compare() {
	m.t.Helper()
	got := make([]byte, len(m.want))
	if _, err := m.img.ReadAt(got, 0); err != nil {
		m.t.Fatal(err)
	}
	if !bytes.Equal(got, m.want) {
		m.t.Fatal("content differs from the model")
	}
	for e, err := range m.img.Extents(0, m.img.Size()) {
		if err != nil {
			m.t.Fatal(err)
		}
		part := m.want[e.Offset:][:e.Length]
		if e.Kind != qcow.ExtentData && !bytes.Equal(part, make([]byte, len(part))) {
			m.t.Fatalf("extent %+v holds data", e)
		}
	}
}

func (m *model) step() {
	m.t.Helper()
	size := int64(len(m.want))
	n := m.rng.Int64N(min(6*m.cluster, size/3)) + 1
	off := m.rng.Int64N(size - n + 1)
	if m.rng.IntN(10) == 0 {
		off = size - n
	}
	var err error
	switch m.rng.IntN(14) {
	case 0, 1:
		err = m.img.WriteZeroes(off, n, m.rng.IntN(2) == 0)
		clear(m.want[off:][:n])
	case 2, 3:
		err = m.img.Discard(off, n)
		first, end := (off+m.cluster-1)/m.cluster*m.cluster, (off+n)/m.cluster*m.cluster
		if off+n == size {
			end = size
		}
		if first < end {
			clear(m.want[first:end])
		}
	case 4:
		err = m.img.Flush()
	case 5:
		if m.rng.IntN(8) == 0 {
			m.reopen()
		}
		got := make([]byte, n)
		if _, err = m.img.ReadAt(got, off); !bytes.Equal(got, m.want[off:][:n]) {
			m.t.Fatalf("read %d+%d differs from the model", off, n)
		}
	default:
		for done := int64(0); done < n; {
			done += int64(copy(m.want[off+done:off+n], m.noise[m.rng.IntN(len(m.noise)/2):]))
		}
		_, err = m.img.WriteAt(m.want[off:][:n], off)
	}
	if err != nil {
		m.t.Fatal(err)
	}
}
