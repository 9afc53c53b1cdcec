package qcow_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"testing"
	"time"

	"github.com/qcow-csi/qcow-csi/qcow"
	"github.com/qcow-csi/qcow-csi/qcow/check"
	"github.com/qcow-csi/qcow-csi/qcow/format"
	"github.com/qcow-csi/qcow-csi/qcow/repair"
	"github.com/qcow-csi/qcow-csi/qcow/storage"
	"github.com/qcow-csi/qcow-csi/test/require"
)

const heldCluster = 4096

// heldImage opens an image over a raw file, in which no link is durable that a write makes, and writes to so many clusters.
func heldImage(t testing.TB, o qcow.CreateOptions, j *memoryJournal, clusters int64) (*qcow.Image, files, []byte) {
	t.Helper()
	o.Size, o.BackingFile, o.BackingFormat = 256<<10, "base", "raw"
	if o.ClusterSize == 0 {
		o.ClusterSize = heldCluster
	}
	f := files{"base": storage.NewMemoryFrom(repeated(0x55, o.Size)), "top": create(t, o)}
	img := open(t, f["top"], qcow.FilledByTakers(qcow.Options{Gate: f.gate, Journal: j}))
	want := repeated(0x55, o.Size)
	for i := range clusters {
		p := repeated(byte(i+1), 512)
		writeAt(t, img, p, i*int64(o.ClusterSize)+512)
		copy(want[i*int64(o.ClusterSize)+512:], p)
	}
	return img, f, want
}

func memoryOf(f files) *storage.Memory { return f["top"].(*storage.Memory) }

// autoclear returns the field of the header.
func autoclear(b []byte) uint64 { return binary.BigEndian.Uint64(b[format.AutoclearOffset:]) }

// Copy-on-write with a journal syncs nothing and changes no entry in the file until there is a flush; the clusters that the guest had before
// are free only then.
func TestHeldLinks(t *testing.T) {
	mem := create(t, qcow.CreateOptions{Size: 256 << 10, ClusterSize: heldCluster})
	change(t, mem, func(img *qcow.Image) {
		writeAt(t, img, repeated(1, 64<<10), 0)
		if _, err := img.CreateSnapshot(t.Context(), "s", time.Unix(1, 0)); err != nil {
			t.Fatal(err)
		}
	})
	rec := storage.NewRecorder(mem)
	img := open(t, rec, qcow.FilledByTakers(qcow.Options{Journal: newJournal(100)}))
	writeAt(t, img, repeated(2, 512), 100<<10) // sets the bit in the header, and is held back too
	from := len(rec.Ops())
	for i := range int64(4) {
		writeAt(t, img, repeated(3, 512), i*heldCluster+512)
	}
	if got, want := lengths(rec.Ops()[from:]), []string{"4096", "4096", "4096", "4096"}; !slices.Equal(got, want) {
		t.Errorf("writing did %v, not %v", got, want)
	}
	expectAt(t, img, append(repeated(1, 512), repeated(3, 512)...), heldCluster)
	from = len(rec.Ops())
	if err := img.Flush(); err != nil {
		t.Fatal(err)
	}
	if got, want := lengths(rec.Ops()[from:])[:4], []string{"sync", "32", "8", "sync"}; !slices.Equal(got, want) {
		t.Errorf("the flush did %v, not %v", got, want)
	}
	if err := img.DeleteSnapshot(t.Context(), "s"); err != nil {
		t.Fatal(err)
	}
	if err := img.Close(); err != nil {
		t.Fatal(err)
	}
	if bits := autoclear(mem.Bytes()); bits != 0 {
		t.Errorf("after close the autoclear features are %#x", bits)
	}
	expectClean(t, mem.Bytes())
}

// A killed process's journal restores what it had acknowledged, once; after a close there is nothing in it.
func TestJournalRestores(t *testing.T) {
	for _, o := range []qcow.CreateOptions{{}, {ClusterSize: 512, RefcountBits: 1}, {ClusterSize: 16 << 10, ExtendedL2: true}, {ClusterSize: 64 << 10}} {
		j := newJournal(100)
		img, f, want := heldImage(t, o, j, 3)
		again, left := killed(t, memoryOf(f), j, qcow.Options{Gate: f.gate})
		if r := again.Restored(); r != (qcow.Restored{Clusters: 3}) {
			t.Errorf("%+v", r)
		}
		expectAt(t, again, want, 0)
		if err := again.Close(); err != nil {
			t.Fatal(err)
		}
		if bits := autoclear(left.Bytes()); bits != 0 {
			t.Errorf("the autoclear features are %#x", bits)
		}
		if err := img.Close(); err != nil {
			t.Fatal(err)
		}
		again, _ = killed(t, memoryOf(f), j, qcow.Options{Gate: f.gate})
		if r := again.Restored(); r != (qcow.Restored{}) {
			t.Errorf("after a close: %+v", r)
		}
		expectAt(t, again, want, 0)
		if err := again.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

// Whatever makes things durable, or changes what the file means without its links, settles them before: the file alone has everything then.
func TestHeldLinksAreSettled(t *testing.T) {
	for what, do := range map[string]func(img *qcow.Image, f files) error{
		"flush":  func(img *qcow.Image, _ files) error { return img.Flush() },
		"shrink": func(img *qcow.Image, _ files) error { return img.Resize(t.Context(), 100<<10) },
		"grow":   func(img *qcow.Image, _ files) error { return img.Resize(t.Context(), 300<<10) },
		"stream": func(img *qcow.Image, _ files) error { return img.Stream(t.Context(), qcow.StreamOptions{}) },
		"durable write": func(img *qcow.Image, _ files) error {
			_, err := img.WriteSync(repeated(0x99, 512), heldCluster+1024)
			return err
		},
		"snapshot": func(img *qcow.Image, _ files) error {
			_, err := img.CreateSnapshot(t.Context(), "s", time.Unix(1, 0))
			return err
		},
		"rebase": func(img *qcow.Image, f files) error {
			return img.Rebase(t.Context(), qcow.RebaseOptions{BackingFile: "other", BackingFormat: "raw", Gate: f.gate})
		},
	} {
		t.Run(what, func(t *testing.T) {
			img, f, _ := heldImage(t, qcow.CreateOptions{}, newJournal(100), 0)
			f["other"] = storage.NewMemoryFrom(repeated(0x66, 256<<10))
			writeAt(t, img, repeated(1, 512), 50*heldCluster)
			if err := img.Flush(); err != nil { // every table is durable
				t.Fatal(err)
			}
			for i := range int64(8) {
				writeAt(t, img, repeated(byte(i+2), 512), i*heldCluster)
			}
			if err := do(img, f); err != nil {
				t.Fatal(err)
			}
			left := open(t, storage.NewMemoryFrom(memoryOf(f).Bytes()), qcow.Options{Gate: f.gate})
			expect(t, what, diskOf(t, left), diskOf(t, img))
			if err := errors.Join(left.Close(), img.Close()); err != nil {
				t.Fatal(err)
			}
		})
	}
}

// A process that is killed while it restores leaves what the next one restores, also of an entry that both banks speak of.
func TestJournalKilledWhileRestoring(t *testing.T) {
	for _, younger := range []int{0, 1} {
		const cluster = 16 << 10
		j := newJournal(20)
		img, f, _ := heldImage(t, qcow.CreateOptions{ClusterSize: cluster, ExtendedL2: true}, j, 3)
		for i := range int64(3) { // another subcluster of each
			writeAt(t, img, repeated(byte(i+11), 512), i*cluster+8192)
		}
		want := diskOf(t, img)
		b := j.Load()
		banks := [2][]byte{b[:len(b)/2], b[len(b)/2:]}
		clear(banks[1])
		copy(banks[1][journalRecord:], banks[0][4*journalRecord:7*journalRecord])
		clear(banks[0][4*journalRecord:])
		binary.LittleEndian.PutUint64(banks[0], 7)
		binary.LittleEndian.PutUint64(banks[1], 8)
		if younger == 0 {
			b = slices.Concat(banks[1], banks[0])
		}
		qcow.SealJournal(b)
		var group storage.RecorderGroup
		initial := [][]byte{memoryOf(f).Bytes(), b}
		rec := group.Record(storage.NewMemoryFrom(bytes.Clone(initial[0])))
		again := open(t, rec, qcow.Options{Gate: f.gate, Journal: &memoryJournal{group.Record(storage.NewMemoryFrom(bytes.Clone(b)))}})
		if r := again.Restored(); r != (qcow.Restored{Clusters: 3}) {
			t.Fatalf("%+v", r)
		}
		for s := range storage.GroupCrashStates(initial, group.Ops(), storage.CrashOptions{}) {
			if s.Kind != storage.Kill {
				break
			}
			last := open(t, storage.NewMemoryFrom(s.Contents[0]), qcow.Options{Gate: f.gate, Journal: &memoryJournal{storage.NewMemoryFrom(s.Contents[1])}})
			if r := last.Restored(); r.Lost > 0 {
				t.Errorf("younger bank %d, %s: %+v", younger, s.Name, r)
			}
			expectAt(t, last, want, 0)
			if err := last.Close(); err != nil {
				t.Fatal(err)
			}
		}
		if err := errors.Join(again.Close(), img.Close()); err != nil {
			t.Fatal(err)
		}
	}
}

// Version 2 has no bit to say that there is a journal: it is not used.
func TestJournalOfVersion2(t *testing.T) {
	j := newJournal(100)
	img, f, want := heldImage(t, qcow.CreateOptions{Version: 2}, j, 3)
	again, _ := killed(t, memoryOf(f), newJournal(16), qcow.Options{Gate: f.gate})
	expectAt(t, again, want, 0)
	if err := errors.Join(again.Close(), img.Close()); err != nil {
		t.Fatal(err)
	}
}

// A journal that is too short to be one is refused.
func TestJournalTooShort(t *testing.T) {
	f := create(t, qcow.CreateOptions{Size: 1 << 20})
	_, err := qcow.Open(f, qcow.Options{Journal: newJournal(2)})
	expectClass(t, "open", err, qcow.ErrInvalid)
}

// What another program does to an image after a kill makes the journal void; what only reads does not.
func TestJournalAndQEMU(t *testing.T) {
	require.Tool(t, "qemu-img")
	require.Tool(t, "qemu-io")
	for _, x := range []struct {
		what  string
		tool  string
		args  []string
		voids bool
	}{
		{"info", "qemu-img", []string{"info", "-f", "qcow2"}, false},
		{"check", "qemu-img", []string{"check", "-f", "qcow2"}, false},
		{"map", "qemu-img", []string{"map", "-f", "qcow2"}, false},
		{"read", "qemu-io", []string{"-r", "-f", "qcow2", "-c", "read 0 64k"}, false},
		{"write", "qemu-io", []string{"-f", "qcow2", "-c", "write -P 9 8k 4k"}, true},
		{"write elsewhere", "qemu-io", []string{"-f", "qcow2", "-c", "write -P 9 200k 4k"}, true},
		{"repair", "qemu-img", []string{"check", "-f", "qcow2", "-r", "all"}, true},
		{"snapshot", "qemu-img", []string{"snapshot", "-c", "s"}, true},
	} {
		t.Run(x.what, func(t *testing.T) {
			j := newJournal(100)
			img, f, want := heldImage(t, qcow.CreateOptions{}, j, 8)
			s := &shelf{t: t, path: filepath.Join(t.TempDir(), "top")}
			writeFile(t, filepath.Join(filepath.Dir(s.path), "base"), contentOf(t, f["base"]))
			s.store(memoryOf(f).Bytes())
			if x.what == "check" { // which says that there are leaks
				s.run("sh", "-c", "qemu-img check -f qcow2 "+s.path+"; test $? = 3")
			} else {
				s.run(x.tool, append(x.args, s.path)...)
			}
			left := storage.NewMemoryFrom(s.load())
			if bit := autoclear(left.Bytes())&format.AutoclearHeldLinks != 0; bit == x.voids {
				t.Errorf("the bit is set: %v", bit)
			}
			again, left := killed(t, left, j, qcow.Options{Gate: f.gate})
			if r := again.Restored(); r.Lost > 0 != x.voids || r.Clusters > 0 == x.voids {
				t.Errorf("%+v", r)
			}
			if !x.voids {
				expectAt(t, again, want, 0)
			}
			endSound(t, left, again, img)
		})
	}
}

// endSound closes the images, after which the file must have no corruptions.
func endSound(t *testing.T, left *storage.Memory, images ...*qcow.Image) {
	t.Helper()
	for _, img := range images {
		if err := img.Close(); err != nil {
			t.Fatal(err)
		}
	}
	report, err := check.Check(t.Context(), left, check.Options{})
	if err != nil || report.Corruptions > 0 {
		t.Errorf("%v, %v", report, err)
	}
}

// So does this engine, where it is given no journal, and what repairs or changes images without it.
func TestJournalOfAnotherWriter(t *testing.T) {
	for what, do := range map[string]func(left *storage.Memory, f files) error{
		"open": func(left *storage.Memory, f files) error {
			img := open(t, left, qcow.Options{Gate: f.gate})
			expectAt(t, img, repeated(0x55, 256<<10), 0)
			return img.Close()
		},
		"repair": func(left *storage.Memory, _ files) error {
			_, err := repair.Run(t.Context(), left, repair.Options{Mode: repair.All})
			return err
		},
		"repair leaks": func(left *storage.Memory, _ files) error {
			_, err := repair.Run(t.Context(), left, repair.Options{Mode: repair.Leaks})
			return err
		},
		"rebase": func(left *storage.Memory, _ files) error { return qcow.RebaseUnsafe(left, "base", "raw") },
	} {
		t.Run(what, func(t *testing.T) {
			j := newJournal(100)
			img, f, _ := heldImage(t, qcow.CreateOptions{}, j, 8)
			left := storage.NewMemoryFrom(bytes.Clone(memoryOf(f).Bytes()))
			if err := do(left, f); err != nil {
				t.Fatal(err)
			}
			again, left := killed(t, left, j, qcow.Options{Gate: f.gate})
			if r := again.Restored(); r != (qcow.Restored{Lost: 8}) {
				t.Errorf("%+v", r)
			}
			expectAt(t, again, repeated(0x55, 256<<10), 0)
			endSound(t, left, again, img)
		})
	}
}

// What the journal says is not done where it does not fit the image, and the rest is.
func TestJournalThatDoesNotFit(t *testing.T) {
	const guest, at, old, now = 8, 16, 24, 40
	for what, edit := range map[string]func(record []byte, f *storage.Memory){
		"another entry":    func(r []byte, _ *storage.Memory) { binary.LittleEndian.PutUint64(r[at:], 8) },
		"another guest":    func(r []byte, _ *storage.Memory) { binary.LittleEndian.PutUint64(r[guest:], 1<<50) },
		"another value":    func(r []byte, _ *storage.Memory) { binary.LittleEndian.PutUint64(r[old:], 1) },
		"the header":       func(r []byte, _ *storage.Memory) { binary.LittleEndian.PutUint64(r[now:], 1<<63) },
		"a table":          func(r []byte, _ *storage.Memory) { binary.LittleEndian.PutUint64(r[now:], 1<<63|heldCluster) },
		"behind the end":   func(r []byte, _ *storage.Memory) { binary.LittleEndian.PutUint64(r[now:], 1<<63|1<<40) },
		"without COPIED":   func(r []byte, _ *storage.Memory) { r[now+7] &^= 0x80 },
		"another's target": func(r []byte, _ *storage.Memory) { copy(r[now:now+8], r[journalRecord+now:]) },
		"a change since": func(r []byte, f *storage.Memory) {
			b := binary.BigEndian.AppendUint64(nil, 1)
			if _, err := f.WriteAt(b, int64(binary.LittleEndian.Uint64(r[at:]))); err != nil {
				panic(err)
			}
		},
	} {
		t.Run(what, func(t *testing.T) {
			j := newJournal(100)
			img, f, want := heldImage(t, qcow.CreateOptions{}, j, 8)
			left := storage.NewMemoryFrom(bytes.Clone(memoryOf(f).Bytes()))
			b := j.Load()
			edit(b[journalRecord:], left)
			qcow.SealJournal(b)
			again, left := killed(t, left, &memoryJournal{storage.NewMemoryFrom(b)}, qcow.Options{Gate: f.gate})
			r := again.Restored()
			if r.Lost == 0 || r.Clusters < 6 || r.Clusters+r.Lost != 8 {
				t.Errorf("%+v", r)
			}
			if what != "a change since" {
				copy(want, repeated(0x55, int64(r.Lost)*heldCluster))
			} else {
				copy(want, make([]byte, heldCluster))
			}
			expectAt(t, again, want, 0)
			endSound(t, left, again, img)
		})
	}
}

const journalRecord = 64

// TestFaultJournal lets the k-th change of the file fail while links are held back: what was acknowledged stays readable, also when the process is
// killed then and when the image is closed.
func TestFaultJournal(t *testing.T) {
	for name, fault := range map[string]storage.Fault{
		"EIO once":             {Err: syscall.EIO},
		"EIO for ever":         {Err: syscall.EIO, Forever: true},
		"ENOSPC for ever":      {Err: fmt.Errorf("%w: %w", storage.ErrNoSpace, syscall.ENOSPC), Forever: true},
		"short write once":     {Err: syscall.EIO, Short: true},
		"short write for ever": {Err: syscall.ENOSPC, Short: true, Forever: true},
	} {
		t.Run(name, func(t *testing.T) {
			injected := 0
			for at := 0; ; at += stride {
				fault.At = at
				n := faultJournalCase(t, fault)
				if n == 0 {
					break
				}
				injected += n
			}
			t.Logf("%d faults", injected)
		})
	}
}

func faultJournalCase(t *testing.T, fault storage.Fault) (injected int) {
	t.Helper()
	const size = 64 << 10
	o := qcow.CreateOptions{Size: size, ClusterSize: 512, RefcountBits: 32, BackingFile: "base", BackingFormat: "raw"}
	f := files{"base": storage.NewMemoryFrom(sectorsOf(1<<50, size)), "top": create(t, o)}
	mem, j := memoryOf(f), newJournal(40)
	faults := storage.NewFaults(mem, &fault)
	img := open(t, faults, qcow.FilledByTakers(qcow.Options{ReserveBytes: 16 << 10, Journal: j, Gate: f.gate}))
	r := &faultRun{img: img, cluster: 512, rng: rand.New(rand.NewPCG(1, 2)), possible: make([][]uint64, size/sector)}
	for s := range r.possible {
		r.possible[s] = []uint64{1 << 50}
	}
	for range 120 {
		r.step()
	}
	verify := func(what string, img *qcow.Image) {
		t.Helper()
		if err := r.verify(img); err != nil {
			t.Fatalf("fault at %d, %s: %v", fault.At, what, err)
		}
		if n := img.Restored().Lost; n > 0 {
			t.Fatalf("fault at %d, %s: %d clusters lost", fault.At, what, n)
		}
	}
	verify("at once", img)
	reopen := func(what string) {
		t.Helper()
		again, left := killed(t, mem, j, qcow.Options{Gate: f.gate})
		verify(what, again)
		if err := again.Close(); err != nil {
			t.Fatalf("fault at %d, %s: %v", fault.At, what, err)
		}
		report, err := check.Check(t.Context(), left, check.Options{})
		if err != nil || report.Corruptions > 0 {
			t.Fatalf("fault at %d, %s: %v, %v", fault.At, what, err, report)
		}
	}
	reopen("after a kill")
	closeErr := img.Close()
	_, injected = faults.Count()
	for _, err := range append(r.failures, closeErr) {
		if err != nil && !errors.Is(err, fault.Err) {
			t.Fatalf("fault at %d surfaced as %v", fault.At, err)
		}
	}
	reopen("after close")
	return injected
}

// TestFaultJournalReplay lets the k-th change fail while an image is opened with the journal of a killed process: the next one that opens it finds
// everything.
func TestFaultJournalReplay(t *testing.T) {
	for _, fault := range []storage.Fault{{Err: syscall.EIO}, {Err: syscall.EIO, Forever: true}, {Err: syscall.EIO, Short: true, Forever: true}} {
		for fault.At = 0; ; fault.At++ {
			j := newJournal(100)
			img, f, want := heldImage(t, qcow.CreateOptions{ClusterSize: 16 << 10, ExtendedL2: true}, j, 5)
			left, journal := storage.NewMemoryFrom(bytes.Clone(memoryOf(f).Bytes())), j.copied()
			faults := storage.NewFaults(left, &fault)
			again, err := qcow.Open(faults, qcow.Options{Gate: f.gate, Journal: journal})
			if err == nil {
				expectAt(t, again, want, 0)
				_ = again.Close() // it may fail
			} else {
				expectClass(t, "open", err, fault.Err)
			}
			_, injected := faults.Count()
			last, left := killed(t, left, journal, qcow.Options{Gate: f.gate})
			if r := last.Restored(); r.Lost > 0 {
				t.Errorf("fault at %d: %+v", fault.At, r)
			}
			expectAt(t, last, want, 0)
			if err := errors.Join(last.Close(), img.Close()); err != nil {
				t.Fatal(err)
			}
			report, err := check.Check(t.Context(), left, check.Options{})
			if err != nil || report.Corruptions > 0 {
				t.Fatalf("fault at %d: %v, %v", fault.At, report, err)
			}
			if injected == 0 {
				break
			}
		}
	}
}

// An image that can't settle its links, since a sync fails, gives its memory back all the same, and leaves the links in the journal.
func TestJournalOfPoisonedImage(t *testing.T) {
	j, budget := newJournal(100), qcow.NewCacheBudget(1<<20)
	f := files{"base": storage.NewMemoryFrom(repeated(0x55, 256<<10)), "top": create(t, qcow.CreateOptions{Size: 256 << 10, BackingFile: "base", BackingFormat: "raw"})}
	h := &hooked{File: f["top"]}
	img := open(t, h, qcow.FilledByTakers(qcow.Options{Gate: f.gate, Journal: j, Budget: budget}))
	writeAt(t, img, repeated(1, 512), 0)
	h.set(func() { h.beforeSync = func() error { return syscall.EIO } })
	expectClass(t, "flush", img.Flush(), syscall.EIO)
	expectAt(t, img, repeated(1, 512), 0)
	_, err := img.WriteAt(repeated(2, 512), 100<<10)
	expectClass(t, "write", err, syscall.EIO)
	expectClass(t, "close", img.Close(), syscall.EIO)
	if n := budget.Used(); n != 0 {
		t.Errorf("%d bytes are in use", n)
	}
	again, _ := killed(t, memoryOf(f), j, qcow.Options{Gate: f.gate})
	if r := again.Restored(); r != (qcow.Restored{Clusters: 1}) {
		t.Errorf("%+v", r)
	}
	expectAt(t, again, repeated(1, 512), 0)
	if err := again.Close(); err != nil {
		t.Fatal(err)
	}
}

// FuzzJournal opens a sound image of a killed process with any journal, which has valid seals: the image stays as sound as it was.
func FuzzJournal(f *testing.F) {
	j := newJournal(20)
	img, all, _ := heldImage(f, qcow.CreateOptions{}, j, 8)
	if _, err := img.CreateSnapshot(f.Context(), "s", time.Unix(1, 0)); err != nil {
		f.Fatal(err)
	}
	for i := range int64(12) {
		writeAt(f, img, repeated(9, 512), i*heldCluster)
	}
	left := bytes.Clone(memoryOf(all).Bytes())
	f.Add(j.Load())
	f.Add(make([]byte, len(j.Load())))
	if err := img.Close(); err != nil {
		f.Fatal(err)
	}
	before, err := check.Check(f.Context(), storage.NewMemoryFrom(left), check.Options{})
	if err != nil || before.Corruptions > 0 {
		f.Fatal(err, before)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		b = bytes.Clone(b)
		qcow.SealJournal(b)
		mem := storage.NewMemoryFrom(bytes.Clone(left))
		img, err := qcow.Open(mem, qcow.FilledByTakers(qcow.Options{Gate: all.gate, Journal: &memoryJournal{storage.NewMemoryFrom(b)}}))
		if err == nil {
			writeAt(t, img, repeated(7, 512), 2048)
			err = img.Close()
		}
		if err != nil && len(b) >= 2*17*journalRecord {
			t.Fatal(err)
		}
		after, err := check.Check(t.Context(), mem, check.Options{})
		if err != nil || after.Corruptions > 0 || after.Leaks > before.Leaks {
			t.Fatalf("%v\nbefore: %v\nafter: %v", err, before, after)
		}
	})
}

// The file of a journal belongs to one image, as long as the machine runs, and to one process at a time.
func TestJournalFile(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(shared(t), "journal")
	file := func(name string) *storage.OSFile {
		f, err := storage.Create(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = f.Close() })
		return f
	}
	a, b := file("a"), file("b")
	use := func(image *storage.OSFile, want string) {
		t.Helper()
		j, err := storage.OpenJournal(path, image)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := storage.OpenJournal(path, image); !errors.Is(err, storage.ErrBusy) {
			t.Errorf("opened twice: %v", err)
		}
		if got := string(bytes.Trim(j.Load(), "\x00")); got != want {
			t.Errorf("%q is in it, not %q", got, want)
		}
		j.Store(24, []byte("something"))
		j.Store(40, []byte("8 bytes."))
		if err := j.Close(); err != nil {
			t.Fatal(err)
		}
	}
	use(a, "")
	use(a, "something\x00\x00\x00\x00\x00\x00\x008 bytes.")
	use(b, "")
	use(b, "something\x00\x00\x00\x00\x00\x00\x008 bytes.")
	content, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	content[20]++ // as if the machine had been booted since
	if err := os.WriteFile(path, content, 0o600); err != nil {
		t.Fatal(err)
	}
	use(b, "")
}
