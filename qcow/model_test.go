package qcow_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/qcow-csi/qcow-csi/qcow"
	"github.com/qcow-csi/qcow-csi/qcow/check"
	"github.com/qcow-csi/qcow-csi/qcow/storage"
)

// TestModel runs random requests of any alignment against a flat model of the disk and of its snapshots, over every refcount width and
// from the smallest to the largest cluster, and opens the image anew now and then, sometimes without closing it first.
func TestModel(t *testing.T) {
	steps, seeds := 250, 1
	if long() {
		steps, seeds = 3000, 6
	}
	for _, cluster := range []int{512, 1024, 4096, 64 << 10, 2 << 20} {
		for _, width := range []int{1, 2, 4, 8, 16, 32, 64} {
			for range seeds {
				o := qcow.CreateOptions{Size: 3<<20 + 3*512, ClusterSize: cluster, RefcountBits: width}
				seed := rand.Uint64()
				t.Run(fmt.Sprintf("cluster=%d/refcount=%d/seed=%d", cluster, width, seed), func(t *testing.T) {
					t.Parallel()
					rng := rand.New(rand.NewPCG(seed, 7))
					s := scenario{image: create(t, o).Bytes(), kills: rng.IntN(2) == 0}
					for range steps {
						s.steps = append(s.steps, randomStep(rng))
					}
					s.test(t)
				})
			}
		}
	}
}

// A scenario is a list of requests to an image. Each of its steps can be done whatever was done before, so that every part of a scenario
// is one too.
type scenario struct {
	image []byte // at rest, reads as zeroes
	kills bool   // the image is left without being closed
	steps []modelStep
}

// test runs the scenario, and tells of the smallest part of it that it can find to fail.
func (s scenario) test(t *testing.T) {
	t.Helper()
	if err := s.run(t.Context()); err != nil {
		part, partErr := s.reduce(t.Context(), err, 300)
		t.Fatalf("%v\nwith %d of %d steps: %v\n%s", err, len(part.steps), len(s.steps), partErr, part)
	}
}

// reduce leaves steps out as long as it fails still, and tries so often at most.
func (s scenario) reduce(ctx context.Context, err error, tries int) (scenario, error) {
	for n := (len(s.steps) + 1) / 2; n > 0; {
		shorter := false
		for i := 0; i < len(s.steps) && tries > 0; tries-- {
			part := s
			part.steps = slices.Delete(slices.Clone(s.steps), i, min(i+n, len(s.steps)))
			if partErr := part.run(ctx); partErr != nil {
				s, err, shorter = part, partErr, true
				continue
			}
			i += n
		}
		if !shorter || n > 1 {
			n /= 2
		}
		if tries == 0 {
			break
		}
	}
	return s, err
}

func (s scenario) String() string {
	var b strings.Builder
	for _, step := range s.steps {
		fmt.Fprintf(&b, "\t{%q, %#x, %#x},\n", step.what, step.a, step.b)
	}
	return b.String()
}

// run does all steps, compares everything at the end, and closes the image.
func (s scenario) run(ctx context.Context) (err error) {
	defer func() {
		if r := recover(); r != nil {
			err = fmt.Errorf("panic: %v", r)
		}
	}()
	m := &model{ctx: ctx, file: storage.NewMemoryFrom(bytes.Clone(s.image)), kills: s.kills}
	if err := m.open(0); err != nil {
		return err
	}
	m.want = make([]byte, m.img.Size())
	m.cluster = int64(m.img.Info().ClusterSize)
	for i, step := range s.steps {
		if err := m.do(step); err != nil {
			return fmt.Errorf("step %d, %s: %w", i, step.what, err)
		}
	}
	for range 2 {
		if err := m.compare(); err != nil {
			return err
		}
		if err := m.reopen(0); err != nil {
			return err
		}
	}
	return nil
}

// modelStep is what to do, with two numbers that everything about it is made of.
type modelStep struct {
	what string
	a, b uint64
}

func randomStep(rng *rand.Rand) modelStep {
	kinds := []string{
		"write", "write", "write", "write", "write", "write", "write", "zero", "discard", "discard", "compressed", "flush", "read",
		"create", "apply", "delete", "look back", "resize",
	}
	what := kinds[rng.IntN(len(kinds))]
	switch rng.IntN(60) {
	case 0:
		what = "reopen"
	case 1:
		what = "kill"
	}
	return modelStep{what, rng.Uint64(), rng.Uint64()}
}

// model is an image and what must be in it.
type model struct {
	ctx     context.Context
	file    *storage.Memory
	img     *qcow.Image
	cluster int64
	disks
	made  int
	kills bool
	leaky bool // it was killed, and so has leaks
}

func (m *model) open(a uint64) (err error) {
	m.img, err = qcow.Open(m.file, qcow.Options{CacheBytes: 1, ReserveBytes: 32 << (a % 16)})
	return err
}

// reopen closes the image, which must leave it without any finding but leaks of an earlier kill, and opens it again.
func (m *model) reopen(a uint64) error {
	if err := m.img.Close(); err != nil {
		return err
	}
	report, err := check.Check(m.ctx, m.file, check.Options{})
	if err != nil {
		return err
	}
	if report.Corruptions > 0 || report.Leaks > 0 && !m.leaky {
		return fmt.Errorf("after close: %v", report.Findings)
	}
	return m.open(a)
}

// kill goes on with the bytes that are in the file now.
func (m *model) kill(a uint64) error {
	if !m.kills {
		return m.reopen(a)
	}
	m.leaky = true
	m.file = storage.NewMemoryFrom(m.file.Bytes())
	report, err := check.Check(m.ctx, m.file, check.Options{})
	if err != nil {
		return err
	}
	if report.Corruptions > 0 {
		return fmt.Errorf("after a kill: %v", report.Findings)
	}
	return m.open(a)
}

func (m *model) compare() error {
	if err := m.matches(m.file.Bytes()); err != nil {
		return err
	}
	if err := holds(m.img, m.want); err != nil {
		return err
	}
	for e, err := range m.img.Extents(0, m.img.Size()) {
		if err != nil {
			return err
		}
		stored := e.Kind == qcow.ExtentData || e.Kind == qcow.ExtentCompressed
		if part := m.want[e.Offset:][:e.Length]; !stored && !bytes.Equal(part, make([]byte, len(part))) {
			return fmt.Errorf("extent %+v holds data", e)
		}
	}
	return nil
}

// place makes a range of the disk of two numbers.
func (m *model) place(a, b uint64) (off, n int64) {
	size := int64(len(m.want))
	if size == 0 {
		return 0, 0
	}
	n = int64(a%uint64(min(6*m.cluster, max(size/3, 1)))) + 1
	if b%10 == 0 {
		return size - n, n
	}
	return int64(b % uint64(size-n+1)), n
}

func (m *model) do(s modelStep) error {
	off, n := m.place(s.a, s.b)
	switch s.what {
	case "zero":
		clear(m.want[off:][:n])
		return m.img.WriteZeroes(off, n, s.a&(1<<40) != 0)
	case "discard":
		return m.discard(off, n)
	case "compressed":
		return m.writeCompressed(off, n, s.b)
	case "flush":
		return m.img.Flush()
	case "read":
		return m.read(off, n)
	case "reopen":
		return m.reopen(s.a)
	case "kill":
		return m.kill(s.a)
	case "create":
		return m.create()
	case "apply":
		return m.apply(s.a)
	case "delete":
		return m.remove(s.a)
	case "look back":
		return m.lookBack(s.a)
	case "resize":
		return m.resize(s.a, s.b)
	}
	scramble(m.want[off:][:n], s.b)
	_, err := m.img.WriteAt(m.want[off:][:n], off)
	return err
}

// scramble fills p with bytes that depend on seed.
func scramble(p []byte, seed uint64) {
	pcg := rand.NewPCG(seed, 0)
	for i := 0; i < len(p); i += 8 {
		v := pcg.Uint64()
		for k := i; k < min(i+8, len(p)); k++ {
			p[k] = byte(v)
			v >>= 8
		}
	}
}

func (m *model) discard(off, n int64) error {
	first, end := (off+m.cluster-1)/m.cluster*m.cluster, (off+n)/m.cluster*m.cluster
	if off+n == int64(len(m.want)) {
		end = off + n
	}
	if first < end {
		clear(m.want[first:end])
	}
	return m.img.Discard(off, n)
}

// writeCompressed writes the whole clusters of a range, with what can be compressed.
func (m *model) writeCompressed(off, n int64, seed uint64) error {
	off = off / m.cluster * m.cluster
	n = min((n+m.cluster-1)/m.cluster*m.cluster, int64(len(m.want))-off)
	p := m.want[off:][:n]
	for i := range p {
		p[i] = byte(seed >> (i / 100 % 64))
	}
	return m.img.WriteCompressed(p, off)
}

func (m *model) read(off, n int64) error {
	got := make([]byte, n)
	if _, err := m.img.ReadAt(got, off); err != nil {
		return err
	}
	if i := firstDifference(got, m.want[off:][:n]); i >= 0 {
		return fmt.Errorf("byte %d differs", off+int64(i))
	}
	return nil
}

// create makes a snapshot, up to three of them.
func (m *model) create() error {
	if len(m.kept) == 3 {
		return nil
	}
	m.made++
	name := fmt.Sprintf("snapshot %d", m.made)
	_, err := m.img.CreateSnapshot(m.ctx, name, time.Unix(int64(m.made), 0))
	if m.refused(err) {
		return nil
	}
	m.kept = append(m.kept, keptDisk{name, bytes.Clone(m.want)})
	return err
}

// refused tells whether a snapshot was refused since refcounts are too narrow: many compressed clusters may have parts in the same one,
// and a kill leaves references more.
func (m *model) refused(err error) bool {
	return errors.Is(err, qcow.ErrInvalid) && m.img.Info().RefcountBits <= 4
}

func (m *model) apply(a uint64) error {
	if len(m.kept) == 0 {
		return nil
	}
	k := m.kept[a%uint64(len(m.kept))]
	err := m.img.ApplySnapshot(m.ctx, k.name)
	if m.refused(err) {
		return nil
	}
	m.want = bytes.Clone(k.content)
	return err
}

func (m *model) remove(a uint64) error {
	if len(m.kept) == 0 {
		return nil
	}
	i := int(a % uint64(len(m.kept)))
	name := m.kept[i].name
	m.kept = slices.Delete(m.kept, i, i+1)
	return m.img.DeleteSnapshot(m.ctx, name)
}

// lookBack reads a snapshot from the file as it is.
func (m *model) lookBack(a uint64) error {
	if len(m.kept) == 0 {
		return nil
	}
	k := m.kept[a%uint64(len(m.kept))]
	img, err := qcow.Open(storage.NewMemoryFrom(m.file.Bytes()), qcow.Options{ReadOnly: true, Snapshot: k.name})
	if err != nil {
		return err
	}
	return holds(img, k.content)
}

// resize makes the disk a little smaller or larger, seldom much smaller.
func (m *model) resize(a, b uint64) error {
	size := int64(len(m.want))
	most := min(8*m.cluster, 512<<10)
	if b%8 == 0 {
		most = size
	}
	change := int64(a%uint64(most+1)) / sector * sector
	if b%2 == 0 {
		size = max(size-change, 0)
	} else {
		size = min(size+change, 4<<20)
	}
	m.want = append(m.want[:min(size, int64(len(m.want)))], make([]byte, max(size-int64(len(m.want)), 0))...)
	return m.img.Resize(m.ctx, size)
}
