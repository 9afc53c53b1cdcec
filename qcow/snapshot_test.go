package qcow_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"github.com/qcow-csi/qcow-csi/qcow"
	"github.com/qcow-csi/qcow-csi/qcow/format"
	"github.com/qcow-csi/qcow-csi/qcow/storage"
	"github.com/qcow-csi/qcow-csi/test/require"
)

// TestSnapshotsWithQEMU makes, applies and deletes snapshots, by turns of the engine and of QEMU, and reads them all after every step.
func TestSnapshotsWithQEMU(t *testing.T) {
	require.Tool(t, "qemu-img", "qemu-io")
	steps := 10
	if long() {
		steps = 150
	}
	for _, shape := range []struct {
		cluster    int64
		clusters   int64
		options    string
		compressed bool
		qemu       bool // whether QEMU may make changes: it fails where refcounts are too narrow
	}{
		{512, 200, "refcount_bits=16", false, true},
		{512, 130, "refcount_bits=64", true, true},
		{512, 90, "refcount_bits=1", false, false},
		{1024, 60, "refcount_bits=2", false, false},
		{4096, 40, "refcount_bits=4", false, true},
		{4096, 30, "refcount_bits=8", true, true},
		{4096, 1200, "compat=0.10", false, true},
		{65536, 25, "compat=0.10", true, true},
		{65536, 20, "refcount_bits=32", false, true},
		{16384, 30, "extended_l2=on", false, true},
		{65536, 30, "extended_l2=on", true, true},
		{65536, 20, "compression_type=zstd", true, true},
		{2 << 20, 7, "refcount_bits=16", false, true},
	} {
		t.Run(fmt.Sprintf("cluster=%d,%s,compressed=%v", shape.cluster, shape.options, shape.compressed), func(t *testing.T) {
			t.Parallel()
			seed := rand.Uint64()
			t.Logf("seed %d", seed)
			s := newShelf(t, seed, shape.cluster*shape.clusters-512, shape.cluster, shape.options, shape.compressed)
			for range steps {
				qemu := shape.qemu && s.rng.IntN(2) == 0
				t.Logf("QEMU %v: %s", qemu, s.step(qemu))
				s.verify()
			}
			for len(s.kept) > 0 {
				s.remove(shape.qemu && s.rng.IntN(2) == 0)
				s.verify()
			}
		})
	}
}

// listed is what qemu-img tells of a snapshot.
type listed struct {
	ID      string `json:"id"`
	Name    string `json:"name"`
	VMState uint64 `json:"vm-state-size"`
	Sec     int64  `json:"date-sec"`
	Nsec    int64  `json:"date-nsec"`
	ICount  uint64 `json:"icount"`
}

func (s *shelf) listedByQEMU() []listed {
	var info struct {
		Snapshots []listed `json:"snapshots"`
	}
	if err := json.Unmarshal(s.run("qemu-img", "info", "-f", "qcow2", "--output=json", s.path), &info); err != nil {
		s.t.Fatal(err)
	}
	return info.Snapshots
}

// Names, IDs and dates are listed as they were given, by the engine as by QEMU, whoever made the snapshot.
func TestSnapshotList(t *testing.T) {
	require.Tool(t, "qemu-img", "qemu-io")
	s := newShelf(t, 1, 1<<20, 4096, "compat=1.1", false)
	when := time.Unix(1234567890, 987654321).UTC()
	names := []string{"first", "", "with spaces", strings.Repeat("n", 255), "first", "Grüße"}
	s.engine(func(img *qcow.Image) error {
		for i, name := range names {
			made, err := img.CreateSnapshot(t.Context(), name, when.Add(time.Duration(i)*time.Hour))
			if err != nil {
				return err
			}
			if made.ID != fmt.Sprint(i+1) || made.Name != name || made.DiskSize != 1<<20 {
				t.Fatalf("made %+v", made)
			}
		}
		return nil
	})
	s.run("qemu-img", "snapshot", "-c", "of QEMU", s.path)
	s.engine(func(img *qcow.Image) error {
		if err := img.DeleteSnapshot(t.Context(), "3"); err != nil {
			return err
		}
		made, err := img.CreateSnapshot(t.Context(), "8", when)
		if made.ID != "8" {
			t.Fatalf("made %+v", made)
		}
		return err
	})
	var ours []format.Snapshot
	s.engine(func(img *qcow.Image) error { ours = img.Snapshots(); return nil })
	theirs := s.listedByQEMU()
	if len(ours) != 7 || len(theirs) != len(ours) {
		t.Fatalf("%d snapshots, listed by QEMU: %d", len(ours), len(theirs))
	}
	for i, l := range theirs {
		o := ours[i]
		if l.ID != o.ID || l.Name != o.Name || l.Sec != int64(o.Seconds) || l.Nsec != int64(o.Nanoseconds) || l.VMState != o.VMStateSize {
			t.Errorf("the engine lists %+v, QEMU %+v", o, l)
		}
	}
	human := strings.Split(string(s.run("qemu-img", "snapshot", "-l", s.path)), "\n")[2:]
	for i, want := range []string{"1 first 0 B 2009-02-13 23:31:30 00:00:00.000", "2 0 B 2009-02-14 00:31:30 00:00:00.000"} {
		if got := strings.Join(strings.Fields(human[i]), " "); got != want {
			t.Errorf("QEMU lists %q instead of %q", got, want)
		}
	}
	s.verify()
}

// A request that can't be met is refused, and changes nothing.
func TestSnapshotRefused(t *testing.T) {
	f := create(t, qcow.CreateOptions{Size: 1 << 20, ClusterSize: 512, RefcountBits: 1})
	change(t, f, func(img *qcow.Image) { writeAt(t, img, repeated(1, 4096), 8192) })
	before := f.Bytes()
	canceled, cancel := context.WithCancel(t.Context())
	cancel()
	change(t, f, func(img *qcow.Image) {
		ctx := t.Context()
		_, err := img.CreateSnapshot(ctx, "one", time.Now())
		expectClass(t, "more references than one bit can count", err, qcow.ErrInvalid)
		_, err = img.CreateSnapshot(ctx, "a\x00b", time.Now())
		expectClass(t, "a name with a NUL", err, qcow.ErrInvalid)
		_, err = img.CreateSnapshot(ctx, strings.Repeat("n", 65536), time.Now())
		expectClass(t, "too long a name", err, qcow.ErrInvalid)
		_, err = img.CreateSnapshot(ctx, "old", time.Unix(-1, 0))
		expectClass(t, "before the epoch", err, qcow.ErrInvalid)
		_, err = img.CreateSnapshot(ctx, "new", time.Unix(1<<32, 0))
		expectClass(t, "after the last second of the format", err, qcow.ErrInvalid)
		_, err = img.CreateSnapshot(canceled, "one", time.Now())
		expectClass(t, "canceled", err, context.Canceled)
		expectClass(t, "apply", img.ApplySnapshot(ctx, "one"), qcow.ErrNotFound)
		expectClass(t, "delete", img.DeleteSnapshot(ctx, "1"), qcow.ErrNotFound)
		if n := len(img.Snapshots()); n != 0 {
			t.Errorf("%d snapshots", n)
		}
	})
	if !bytes.Equal(f.Bytes(), before) {
		t.Error("a refused snapshot has changed the image")
	}
	_, err := qcow.Open(f, qcow.Options{Snapshot: "one"})
	expectClass(t, "open a snapshot for writing", err, qcow.ErrInvalid)
	_, err = qcow.Open(f, qcow.Options{ReadOnly: true, Snapshot: "one"})
	expectClass(t, "open a snapshot that is not there", err, qcow.ErrNotFound)
	read := open(t, f, qcow.Options{ReadOnly: true})
	_, err = read.CreateSnapshot(t.Context(), "one", time.Now())
	expectClass(t, "create, read-only", err, qcow.ErrReadOnly)
	expectClass(t, "delete, read-only", read.DeleteSnapshot(t.Context(), "one"), qcow.ErrReadOnly)
	if err := read.Close(); err != nil {
		t.Fatal(err)
	}
	expectClass(t, "apply, closed", read.ApplySnapshot(t.Context(), "one"), qcow.ErrClosed)
}

// A disk of no bytes and one that nothing was written to have snapshots, with refcounts of any width.
func TestSnapshotOfNothing(t *testing.T) {
	require.Tool(t, "qemu-img", "qemu-io")
	for _, size := range []int64{0, 64 << 10} {
		s := newShelf(t, 1, size, 512, "refcount_bits=1", false)
		s.engine(func(img *qcow.Image) error {
			if _, err := img.CreateSnapshot(t.Context(), "empty", time.Now()); err != nil {
				return err
			}
			if err := img.Resize(t.Context(), 3<<20); err != nil {
				return err
			}
			_, err := img.WriteAt(repeated(9, 1000), 2<<20)
			return err
		})
		s.kept = []keptDisk{{"empty", make([]byte, size)}}
		s.want = make([]byte, 3<<20)
		copy(s.want[2<<20:], repeated(9, 1000))
		s.verify()
		s.engine(func(img *qcow.Image) error { return img.ApplySnapshot(t.Context(), "empty") })
		s.want = make([]byte, size)
		s.verify()
		s.engine(func(img *qcow.Image) error {
			if err := img.Resize(t.Context(), 1<<20); err != nil {
				return err
			}
			_, err := img.WriteAt(repeated(8, 1000), 1<<20-1000)
			return err
		})
		s.want = make([]byte, 1<<20)
		copy(s.want[1<<20-1000:], repeated(8, 1000))
		s.verify()
		s.run("qemu-img", "snapshot", "-a", "empty", s.path)
		s.want = make([]byte, size)
		s.verify()
		s.remove(false)
		s.verify()
	}
}

// A snapshot takes the size of the disk with it, and applying it brings that back.
func TestSnapshotOfOtherSize(t *testing.T) {
	require.Tool(t, "qemu-img", "qemu-io")
	for _, options := range []string{"compat=1.1", "compat=0.10"} {
		s := newShelf(t, 1, 100<<10, 512, options, false)
		resize := func(size int64) {
			t.Helper()
			s.engine(func(img *qcow.Image) error { return img.Resize(t.Context(), size) })
			s.want = append(s.want[:min(size, int64(len(s.want)))], make([]byte, max(size-int64(len(s.want)), 0))...)
			s.verify()
		}
		for _, size := range []int64{100 << 10, 300<<10 + 512, 50 << 10, 200<<10 - 512} {
			resize(size)
			for range 5 {
				s.write(false)
			}
			s.create(false)
		}
		s.run("qemu-img", "snapshot", "-c", "of QEMU", s.path)
		s.kept = append(s.kept, keptDisk{"of QEMU", bytes.Clone(s.want)})
		for i := range s.kept {
			k := s.kept[(3*i)%len(s.kept)]
			s.engine(func(img *qcow.Image) error { return img.ApplySnapshot(t.Context(), k.name) })
			s.want = bytes.Clone(k.content)
			s.verify()
			s.write(false)
			s.verify()
		}
		for len(s.kept) > 0 {
			s.remove(options == "compat=1.1" && s.rng.IntN(2) == 0)
			s.verify()
		}
	}
}

// editSnapshots changes the snapshot table of an image at rest.
func (s *shelf) editSnapshots(edit func(table []byte) []byte) {
	s.t.Helper()
	b := s.load()
	h, err := format.DecodeHeader(b)
	if err != nil {
		s.t.Fatal(err)
	}
	_, used, err := format.DecodeSnapshots(b[h.SnapshotsOffset:], h.Snapshots)
	if err != nil {
		s.t.Fatal(err)
	}
	table := b[h.SnapshotsOffset:][:used]
	edited := edit(bytes.Clone(table))
	if room := h.ClustersFor(used) << h.ClusterBits; uint64(len(edited)) > room {
		s.t.Fatalf("a table of %d bytes for %d", len(edited), room)
	}
	b = append(b, make([]byte, max(0, int(h.SnapshotsOffset)+len(edited)-len(b)))...)
	table = b[h.SnapshotsOffset:][:max(len(table), len(edited))]
	clear(table)
	copy(table, edited)
	s.store(b)
}

// The entries of an image of version 2 may lack the size of the disk: it is the image's, until that changes. And their table is
// smaller than it becomes when it is written anew.
func TestSnapshotWithoutSize(t *testing.T) {
	require.Tool(t, "qemu-img", "qemu-io")
	const size = 100 << 10
	s := newShelf(t, 1, size, 512, "compat=0.10", false)
	for range 12 {
		s.write(true)
		s.create(true)
	}
	s.editSnapshots(func(table []byte) (bare []byte) {
		list, _, err := format.DecodeSnapshots(table, 12)
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range list {
			entry := format.EncodeSnapshots([]format.Snapshot{e})
			binary.BigEndian.PutUint32(entry[36:], 0)
			entry = append(entry[:40:40], entry[64:]...)
			bare = append(bare, make([]byte, -len(bare)&7)...)
			bare = append(bare, entry...)
		}
		return bare
	})
	s.verify()
	s.engine(func(img *qcow.Image) error { return img.Resize(t.Context(), 3*size) })
	s.want = append(s.want, make([]byte, 2*size)...)
	s.verify()
	s.engine(func(img *qcow.Image) error { return img.Resize(t.Context(), size/2) })
	s.want = s.want[:size/2]
	s.verify()
	for range 3 {
		s.apply(false)
		s.verify()
	}
	for len(s.kept) > 0 {
		s.remove(false)
		s.verify()
	}
}

// What a later version of the format may put into an entry stays there when others come and go.
func TestSnapshotExtraDataIsKept(t *testing.T) {
	require.Tool(t, "qemu-img", "qemu-io")
	s := newShelf(t, 1, 64<<10, 4096, "compat=1.1", false)
	s.write(false)
	s.create(false)
	extra := []byte("something new that nobody knows")
	s.editSnapshots(func(table []byte) []byte {
		list, _, err := format.DecodeSnapshots(table, 1)
		if err != nil {
			t.Fatal(err)
		}
		list[0].Extra, list[0].ICount, list[0].VMClock = extra, 77, 5e9
		return format.EncodeSnapshots(list)
	})
	s.verify()
	s.write(false)
	s.create(false)
	s.verify()
	s.engine(func(img *qcow.Image) error {
		if err := img.DeleteSnapshot(t.Context(), "2"); err != nil {
			return err
		}
		if got := img.Snapshots()[0]; !bytes.Equal(got.Extra, extra) || got.ICount != 77 || got.VMClock != 5e9 {
			t.Errorf("kept %+v", got)
		}
		return nil
	})
	s.kept = s.kept[:1]
	s.verify()
	if l := s.listedByQEMU(); len(l) != 1 || l[0].ICount != 77 {
		t.Errorf("QEMU lists %+v", l)
	}
}

// The state of a virtual machine lies behind the disk, in a part of the snapshot's L1 table that the disk has not.
func TestSnapshotWithMachineState(t *testing.T) {
	require.Tool(t, "qemu-img", "qemu-io")
	const disk, state = 64 << 10, 100 << 10
	s := newShelf(t, 1, disk+state, 512, "compat=1.1", false)
	for range 20 {
		s.write(false)
	}
	s.create(false)
	s.editSnapshots(func(table []byte) []byte {
		binary.BigEndian.PutUint32(table[32:], state)
		binary.BigEndian.PutUint64(table[40:], state)
		binary.BigEndian.PutUint64(table[48:], disk)
		return table
	})
	s.kept[0].content = s.kept[0].content[:disk]
	s.engine(func(img *qcow.Image) error { return img.Resize(t.Context(), disk) })
	s.want = s.want[:disk]
	s.verify()
	if l := s.listedByQEMU(); len(l) != 1 || l[0].VMState != state {
		t.Fatalf("QEMU lists %+v", l)
	}
	withState := s.load()
	for _, qemu := range []bool{false, true} {
		s.write(qemu)
		s.verify()
		s.apply(qemu) // QEMU leaves the state in the active L1 table, too
		s.verify()
		s.write(qemu)
		s.create(false)
		s.verify()
		s.engine(func(img *qcow.Image) error { return img.Resize(t.Context(), disk+state) })
		s.want = append(s.want, make([]byte, state)...)
		s.verify()
		for len(s.kept) > 0 {
			s.remove(!qemu)
			s.verify()
		}
		s.store(withState)
		s.expectState(disk, state)
	}
}

// expectState sets the model back to the snapshot with the state of a machine.
func (s *shelf) expectState(disk, state int64) {
	s.t.Helper()
	img := open(s.t, storage.NewMemoryFrom(s.load()), qcow.Options{ReadOnly: true})
	s.want = make([]byte, disk)
	if _, err := img.ReadAt(s.want, 0); err != nil {
		s.t.Fatal(err)
	}
	list := img.Snapshots()
	if len(list) != 1 || list[0].VMStateSize != uint64(state) || list[0].DiskSize != uint64(disk) {
		s.t.Fatalf("snapshots %+v", list)
	}
	if err := img.Close(); err != nil {
		s.t.Fatal(err)
	}
	s.kept = []keptDisk{{list[0].Name, bytes.Clone(s.want)}}
}

// With refcounts of two bits a cluster has three references at most. Applying a snapshot needs no fourth on the way.
func TestSnapshotNarrowRefcounts(t *testing.T) {
	f := create(t, qcow.CreateOptions{Size: 64 << 10, ClusterSize: 512, RefcountBits: 2})
	change(t, f, func(img *qcow.Image) {
		writeAt(t, img, repeated(1, 30<<10), 3000)
		for _, name := range []string{"a", "b"} {
			if _, err := img.CreateSnapshot(t.Context(), name, time.Now()); err != nil {
				t.Fatal(err)
			}
		}
		_, err := img.CreateSnapshot(t.Context(), "c", time.Now())
		expectClass(t, "a fourth reference", err, qcow.ErrInvalid)
		for _, name := range []string{"a", "b", "a"} {
			if err := img.ApplySnapshot(t.Context(), name); err != nil {
				t.Fatal(err)
			}
		}
		expectAt(t, img, repeated(1, 30<<10), 3000)
		if err := img.DeleteSnapshot(t.Context(), "a"); err != nil {
			t.Fatal(err)
		}
		if _, err := img.CreateSnapshot(t.Context(), "c", time.Now()); err != nil {
			t.Fatal(err)
		}
	})
	expectClean(t, f.Bytes())
}
