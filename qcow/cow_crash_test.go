package qcow_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"

	"github.com/qcow-csi/qcow-csi/qcow"
	"github.com/qcow-csi/qcow-csi/qcow/check"
	"github.com/qcow-csi/qcow-csi/qcow/storage"
	"github.com/qcow-csi/qcow-csi/test/require"
)

// A chainCrash drives the last image of a chain over recorders, and remembers for every sector of its disk which values it may have
// after a crash at any point of the log: what the chain held before, and what was written since. No two sectors of the files before have the
// same value, no write uses one again.
type chainCrash struct {
	t       *testing.T
	rng     *rand.Rand
	group   storage.RecorderGroup
	names   []string // of the files of the group, in order
	initial [][]byte // what they held
	still   files    // files that nobody writes to
	live    files    // all of them, as the image sees them
	kinds   map[string]string
	top     string
	img     *qcow.Image
	cluster int64
	serial  uint64
	sectors [][]event // of every sector; the first event is what it held before
	sizes   []event
	flushes []event
	also    func(s *storage.GroupCrashState, f files) error // more to verify, unless nil
}

// newChainCrash makes a chain, the files of which that are named in changing are recorded, and opens its last image. With an odd seed the
// order of operations is the same each time; with an even one the reserve is filled in the background, whenever that happens. With 2 and 3 of every four seeds there is a journal.
func newChainCrash(t *testing.T, seed uint64, layers []layer, changing []int, o qcow.Options) *chainCrash {
	t.Helper()
	w := &chainCrash{t: t, rng: rand.New(rand.NewPCG(seed, 2)), still: files{}, live: files{}, kinds: map[string]string{}}
	var want []uint64 // values of the sectors
	all := files{}
	for i := range layers {
		name := fmt.Sprintf("%d.%s", i, layers[i].format())
		w.kinds[name] = layers[i].kind
		want = w.addLayer(all, name, &layers[i], want)
		w.top, w.cluster = name, int64(layers[i].cluster)
	}
	for i := range layers {
		name := fmt.Sprintf("%d.%s", i, layers[i].format())
		if !slices.Contains(changing, i) {
			w.still[name], w.live[name] = all[name], all[name]
			continue
		}
		w.names = append(w.names, name)
		w.initial = append(w.initial, contentOf(t, all[name]))
		w.live[name] = w.group.Record(all[name])
	}
	for _, value := range want {
		w.sectors = append(w.sectors, []event{{value: value}})
	}
	w.sizes = []event{{value: uint64(w.size())}}
	o.Gate = w.live.gate
	if seed%2 == 1 {
		o = qcow.FilledByTakers(o)
	}
	if seed%4 >= 2 && o.Journal == nil {
		o.Journal = newJournal(100)
	}
	if o.Journal != nil {
		w.addJournal(&o)
	}
	w.img = open(t, w.live[w.top], o)
	return w
}

// addLayer makes a layer in which about a third of the clusters holds data and a few are zeroes, and returns what the chain reads as then.
func (w *chainCrash) addLayer(all files, name string, l *layer, below []uint64) []uint64 {
	w.t.Helper()
	want := make([]uint64, l.size/sector)
	copy(want, below)
	unit := max(int64(l.cluster), 1024) / sector
	if l.kind == "raw" {
		b := make([]byte, l.size)
		for s := range want {
			if int64(s)/unit%4 != 3 { // the rest is holes, or what a file system has of them
				w.serial++
				want[s] = w.serial
			}
			copy(b[s*sector:], sectorsOf(want[s], sector))
		}
		all[name] = storage.NewMemoryFrom(b)
		return want
	}
	all[name] = l.make(w.t)
	if below != nil {
		if err := qcow.RebaseUnsafe(all[name], w.top, formatOf(w.kinds[w.top])); err != nil {
			w.t.Fatal(err)
		}
	}
	img := open(w.t, all[name], qcow.Options{Gate: all.gate, ReserveBytes: 8 * int64(l.cluster)})
	for first := int64(0); first < int64(len(want)); first += unit {
		n := min(unit, int64(len(want))-first)
		if x := w.rng.IntN(5); x == 0 {
			if err := img.WriteZeroes(first*sector, n*sector, true); err != nil {
				w.t.Fatal(err)
			}
			clear(want[first:][:n])
		} else if x < 3 || below == nil {
			for s := first; s < first+n; s++ {
				w.serial++
				want[s] = w.serial
				writeAt(w.t, img, sectorsOf(w.serial, sector), s*sector)
			}
		}
	}
	if err := img.Close(); err != nil {
		w.t.Fatal(err)
	}
	return want
}

// size returns the largest size that the disk ever had.
func (w *chainCrash) size() int64 { return int64(len(w.sectors)) * sector }

func (w *chainCrash) resize(size int64) {
	w.t.Helper()
	old := w.img.Size()
	for w.size() < size {
		w.sectors = append(w.sectors, []event{{value: 0}})
	}
	e := w.do(fmt.Sprintf("resize %d", size), func() error { return w.img.Resize(w.t.Context(), size) })
	w.note(e, size, max(old-size, 0), 0) // to be seen when it grows again
	e.value = uint64(size)
	w.sizes = append(w.sizes, e)
}

// do makes an operation, which is in the log from the event's start to its end.
func (w *chainCrash) do(what string, fn func() error) event {
	w.t.Helper()
	w.group.Mark(what)
	e := event{start: len(w.group.Ops())}
	if err := fn(); err != nil {
		w.t.Fatalf("%s: %v", what, err)
	}
	e.end = len(w.group.Ops())
	return e
}

func (w *chainCrash) note(e event, off, n int64, value uint64) {
	e.value = value
	for s := off / sector; s < (off+n)/sector; s++ {
		w.sectors[s] = append(w.sectors[s], e)
	}
}

func (w *chainCrash) write(off, n int64) {
	w.t.Helper()
	w.serial++
	value := w.serial
	e := w.do(fmt.Sprintf("write %d+%d", off, n), func() error {
		_, err := w.img.WriteAt(sectorsOf(value, n), off)
		return err
	})
	w.note(e, off, n, value)
}

func (w *chainCrash) flush() { w.flushes = append(w.flushes, w.do("flush", w.img.Flush)) }

// random does a random request; most are writes that cover no cluster as a whole.
func (w *chainCrash) random() {
	w.t.Helper()
	size := w.img.Size()
	n := min((w.rng.Int64N(2*w.cluster)+sector)/sector*sector, size)
	off := w.rng.Int64N(size-n+sector) / sector * sector
	switch w.rng.IntN(12) {
	case 0:
		e := w.do(fmt.Sprintf("zero %d+%d", off, n), func() error { return w.img.WriteZeroes(off, n, w.rng.IntN(2) == 0) })
		w.note(e, off, n, 0)
	case 1:
		n = min(4*n, size-off)
		first, end := wholeClusters(w.img, off, n)
		e := w.do(fmt.Sprintf("discard %d+%d", off, n), func() error { return w.img.Discard(off, n) })
		if w.kinds[w.top] != "v2" || w.img.Chain() == nil {
			w.note(e, first, max(end-first, 0), 0)
		}
	case 2, 3:
		w.flush()
	default:
		w.write(off, n)
	}
}

// survived returns the point of the log up to which requests that had been answered must have survived.
func (w *chainCrash) survived(s *storage.GroupCrashState) int {
	point := 0
	if s.Kind == storage.Kill {
		return slices.Min(s.Durable)
	}
	for _, f := range w.flushes {
		if f.end <= s.Issued {
			point = f.start
		}
	}
	return point
}

// filesOf returns the files of a state.
func (w *chainCrash) filesOf(s *storage.GroupCrashState) files {
	f := maps.Clone(w.still)
	for i, name := range w.names {
		f[name] = storage.NewMemoryFrom(s.Contents[i])
	}
	return f
}

func (w *chainCrash) checkImages(f files) error {
	for _, name := range w.names {
		if w.kinds[name] == "raw" {
			continue
		}
		report, err := check.Check(w.t.Context(), f[name], check.Options{})
		if err != nil {
			return err
		}
		if report.Corruptions > 0 {
			return fmt.Errorf("%s is corrupt: %v", name, report.Findings)
		}
	}
	return nil
}

// verify holds one state against what is allowed.
func (w *chainCrash) verify(s *storage.GroupCrashState) error {
	f := w.filesOf(s)
	if err := w.checkImages(f); err != nil {
		return err
	}
	o := qcow.Options{Gate: f.gate, ReserveBytes: 4 * w.cluster}
	if s.Kind == storage.Kill && f[journalName] != nil {
		if w.rng.IntN(3) == 0 {
			again, err := w.killedAgain(f)
			if err != nil {
				return fmt.Errorf("open: %w", err)
			}
			f = again
			o.Gate = f.gate
		}
		o.Journal = &memoryJournal{f[journalName]}
	}
	if w.also != nil {
		if err := w.also(s, f); err != nil {
			return err
		}
	}
	img, err := qcow.Open(f[w.top], o)
	if err != nil {
		return fmt.Errorf("open: %w", err)
	}
	if r := img.Restored(); r.Lost > 0 {
		return fmt.Errorf("the journal says %+v", r)
	}
	content := make([]byte, img.Size())
	if _, err := img.ReadAt(content, 0); err != nil {
		return fmt.Errorf("read: %w", err)
	}
	returned := s.Issued // a resize that has returned is durable
	if s.Kind == storage.Kill {
		returned = slices.Min(s.Durable)
	}
	if sizes := allowed(w.sizes, returned, max(s.Issued, 1)); !slices.Contains(sizes, uint64(img.Size())) {
		return fmt.Errorf("size %d, allowed: %v", img.Size(), sizes)
	}
	survived := w.survived(s)
	for n, events := range w.sectors[:img.Size()/sector] {
		got := content[n*sector:][:sector]
		value := binary.BigEndian.Uint64(got)
		if !bytes.Equal(got, sectorsOf(value, sector)) {
			return fmt.Errorf("sector %d is torn: % x", n, got[:16])
		}
		if values := allowed(events, survived, max(s.Issued, 1)); !slices.Contains(values, value) {
			return fmt.Errorf("sector %d has value %d, allowed: %v", n, value, values)
		}
	}
	if err := w.useAgain(img, content); err != nil {
		return err
	}
	return w.checkImages(f)
}

// useAgain goes on with a surviving image: what it does must find the image in order.
func (w *chainCrash) useAgain(img *qcow.Image, content []byte) error {
	p := sectorsOf(1<<40, sector)
	for off := int64(0); off+4*w.cluster <= int64(len(content)); off += 4 * w.cluster {
		at := off + w.cluster/2/sector*sector
		if _, err := img.WriteAt(p, at); err != nil {
			return fmt.Errorf("write again: %w", err)
		}
		copy(content[at:], p)
		if err := img.WriteZeroes(off+3*w.cluster, w.cluster, true); err != nil {
			return fmt.Errorf("zero again: %w", err)
		}
		clear(content[off+3*w.cluster:][:w.cluster])
	}
	got := make([]byte, len(content))
	if _, err := img.ReadAt(got, 0); err != nil {
		return fmt.Errorf("read again: %w", err)
	}
	if !bytes.Equal(got, content) {
		return errors.New("content differs after further use")
	}
	return img.Close()
}

// states verifies every state of the log, and lets QEMU judge some. It returns how many there are, and stops at the first that is not allowed.
func (w *chainCrash) states(ops []storage.Op, o storage.CrashOptions, everyQEMU int) (n int, err error) {
	dir := w.t.TempDir()
	for s := range w.crashStates(ops, o) {
		n++
		if n%stride != 0 {
			continue
		}
		if n%everyQEMU == 0 {
			if err := w.qemuCheck(dir, w.filesOf(&s)); err != nil {
				return n, fmt.Errorf("%s: %w", s.Name, err)
			}
		}
		if err := w.verify(&s); err != nil {
			return n, fmt.Errorf("%s: %w", s.Name, err)
		}
	}
	return n, nil
}

// run is states for a log without flaw.
func (w *chainCrash) run(o storage.CrashOptions, everyQEMU int) int {
	w.t.Helper()
	n, err := w.states(w.group.Ops(), o, everyQEMU)
	if err != nil {
		w.t.Fatalf("%v\n%s", err, storage.Trace(w.group.Ops()))
	}
	return n
}

// qemuCheck accepts what a crash may leave: clean images, or leaked clusters.
func (w *chainCrash) qemuCheck(dir string, f files) error {
	for name, file := range f {
		writeFile(w.t, filepath.Join(dir, name), contentOf(w.t, file))
	}
	for _, name := range w.names {
		if w.kinds[name] == "raw" {
			continue
		}
		cmd := exec.CommandContext(w.t.Context(), "qemu-img", "check", "-f", "qcow2", filepath.Join(dir, name))
		if out, err := cmd.CombinedOutput(); err != nil && cmd.ProcessState.ExitCode() != 3 {
			return fmt.Errorf("qemu-img check: %w\n%s", err, out)
		}
	}
	return nil
}

// crashOptions bound an enumeration: in a long run up to 12 operations are enumerated whole.
func crashOptions(seed uint64) storage.CrashOptions {
	o := storage.CrashOptions{Seed: seed, Exhaustive: 6, Random: 8}
	if long() {
		o = storage.CrashOptions{Seed: seed}
	}
	return o
}

// cowShapes are chains on which everything that a request copies matters.
var cowShapes = map[string]struct {
	layers  []layer
	reserve int64 // clusters
	steps   int
}{
	"raw":         {[]layer{{kind: "raw", size: 24 << 10}, {size: 32 << 10, cluster: 2048}}, 4, 60},
	"qcow2":       {[]layer{{size: 24 << 10, cluster: 512}, {size: 24 << 10, cluster: 4096}}, 8, 40},
	"three":       {[]layer{{kind: "raw", size: 16 << 10}, {size: 12 << 10, cluster: 2048}, {size: 20 << 10, cluster: 1024}}, 8, 40},
	"old":         {[]layer{{kind: "raw", size: 24 << 10}, {kind: "v2", size: 24 << 10, cluster: 2048}}, 16, 40},
	"subclusters": {[]layer{{kind: "raw", size: 60 << 10}, {kind: "extended", size: 64 << 10, cluster: 16 << 10}}, 4, 40},
}

// TestCrashOverBacking enumerates what a kill or a power loss leaves of random requests over a backing file. What surrounds a written range
// keeps the backing file's content in every state.
func TestCrashOverBacking(t *testing.T) {
	require.Tool(t, "qemu-img")
	seeds := uint64(4)
	if long() {
		seeds = 40
	}
	total := 0
	for name, x := range cowShapes {
		for seed := range seeds {
			t.Run(fmt.Sprintf("%s/seed=%d", name, seed), func(t *testing.T) {
				w := newChainCrash(t, seed, x.layers, []int{len(x.layers) - 1}, qcow.Options{ReserveBytes: x.reserve * int64(x.layers[len(x.layers)-1].cluster)})
				for range x.steps {
					w.random()
				}
				w.do("close", w.img.Close)
				total += w.run(crashOptions(seed), 50)
			})
		}
	}
	t.Logf("%d states", total)
}

// TestCrashGrowOverBacking enumerates what a crash leaves of a disk that gets larger and smaller: where it was smaller than its backing file
// it shows zeroes, in every state with the larger size.
func TestCrashGrowOverBacking(t *testing.T) {
	require.Tool(t, "qemu-img")
	total := 0
	for _, kind := range []string{"", "v2", "extended"} {
		t.Run(kind, func(t *testing.T) {
			top := layer{kind: kind, size: 12<<10 + 512}
			if kind == "" {
				top.cluster = 1024
			}
			w := newChainCrash(t, 5, []layer{{kind: "raw", size: 64 << 10}, top}, []int{1}, qcow.Options{ReserveBytes: 16 << 10})
			for _, size := range []int64{21<<10 + 512, 33 << 10, 17<<10 + 1536, 40 << 10, 9 << 10, 64 << 10} {
				w.random()
				w.random()
				w.resize(size)
				w.random()
			}
			w.do("close", w.img.Close)
			total += w.run(crashOptions(5), 60)
		})
	}
	t.Logf("%d states", total)
}

// The enumeration finds it when a sync is missing before clusters with copied data are linked.
func TestCrashOverBackingFindsMissingSyncs(t *testing.T) {
	for name, x := range cowShapes {
		t.Run(name, func(t *testing.T) {
			w := newChainCrash(t, 0, x.layers, []int{len(x.layers) - 1}, qcow.FilledByTakers(qcow.Options{ReserveBytes: 64 << 10}))
			for range 20 {
				w.random()
			}
			w.flush()
			ops := w.group.Ops()
			for i := range ops {
				if i > 0 && i+1 < len(ops) && len(ops[i-1].Data) >= 1024 && ops[i].Kind == storage.OpSync && len(ops[i+1].Data) > 0 && len(ops[i+1].Data) <= 64 {
					ops[i] = storage.Op{Kind: storage.OpMark, Mark: "no sync"}
				}
			}
			n, err := w.states(ops, crashOptions(0), 1<<30)
			if err == nil && stride == 1 {
				t.Fatalf("none of %d states shows that syncs are missing", n)
			}
			t.Logf("state %d: %v", n, err)
		})
	}
}
