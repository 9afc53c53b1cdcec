package qcow_test

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"testing"
	"time"

	"github.com/qcow-csi/qcow-csi/qcow"
	"github.com/qcow-csi/qcow-csi/qcow/storage"
	"github.com/qcow-csi/qcow-csi/test/require"
)

// QEMU keeps the state of a machine behind the disk, as far away as it likes, and makes the L1 table as long as that needs. A snapshot
// made before has a shorter table than the disk then, one made after keeps the state, whatever the engine does with the others.
func TestSnapshotsBesideMachineState(t *testing.T) {
	require.Tool(t, "qemu-img", "qemu-io")
	const size = 1 << 20
	for _, c := range []struct {
		cluster int64
		state   string // where the state is, for qemu-io
	}{{64 << 10, "0"}, {1024, "0"}, {64 << 10, "1T"}, {4096, "40G"}} {
		t.Run(fmt.Sprintf("cluster=%d/state=%s", c.cluster, c.state), func(t *testing.T) {
			s := newShelf(t, 29, size, c.cluster, "compat=1.1", false)
			s.qemuIO("write -P 1 0 1M")
			s.run("qemu-img", "snapshot", "-c", "without", s.path)
			s.kept = append(s.kept, keptDisk{"without", repeated(1, size)})
			s.qemuIO("write -P 2 0 100k")
			s.qemuIO("write -b -P 11 %s 5k", c.state)
			copy(s.want, append(repeated(2, 100<<10), repeated(1, size-100<<10)...))
			s.run("qemu-img", "snapshot", "-c", "with", s.path)
			s.kept = append(s.kept, keptDisk{"with", bytes.Clone(s.want)})
			before := len(s.load())

			s.engine(func(img *qcow.Image) error { return img.ApplySnapshot(t.Context(), "without") })
			copy(s.want, repeated(1, size))
			s.verify()
			s.engine(func(img *qcow.Image) error {
				writeAt(t, img, repeated(3, 10<<10), 200<<10)
				_, err := img.CreateSnapshot(t.Context(), "of the engine", time.Unix(1, 0))
				return err
			})
			copy(s.want[200<<10:], repeated(3, 10<<10))
			s.kept = append(s.kept, keptDisk{"of the engine", bytes.Clone(s.want)})
			s.engine(func(img *qcow.Image) error { return img.ApplySnapshot(t.Context(), "with") })
			s.want = bytes.Clone(s.kept[1].content)
			s.verify()
			s.engine(func(img *qcow.Image) error { return img.DeleteSnapshot(t.Context(), "without") })
			s.kept = s.kept[1:]
			s.verify()
			if after := len(s.load()); after > before+4<<20 {
				t.Errorf("the file has grown from %d to %d bytes", before, after)
			}

			s.run("qemu-img", "snapshot", "-a", "with", s.path)
			s.qemuIO("read -b -P 11 %s 5k", c.state)
			s.verify()
		})
	}
}

// A snapshot is read through its own L1 table and with its own size, however short the disk has become that the header speaks of.
func TestSnapshotOfALongerTable(t *testing.T) {
	require.Tool(t, "qemu-img", "qemu-io")
	const size = 4 << 20
	s := newShelf(t, 29, size, 1024, "compat=1.1", false)
	s.qemuIO("write -P 11 3M 1M")
	s.run("qemu-img", "snapshot", "-c", "foo", s.path)
	b := s.load()
	binary.BigEndian.PutUint64(b[atSize:], 64<<10)
	binary.BigEndian.PutUint32(b[atL1Entries:], 1)
	want := append(make([]byte, 3<<20), repeated(11, 1<<20)...)
	s.expect(b, "", make([]byte, 64<<10))
	s.expect(b, "foo", want)
	f := storage.NewMemoryFrom(b)
	change(t, f, func(img *qcow.Image) {
		do(t, img.ApplySnapshot(t.Context(), "foo"))
		expectAt(t, img, want, 0)
	})
	s.store(f.Bytes())
	s.run("qemu-img", "check", "-r", "leaks", "-f", "qcow2", s.path) // of the tables that the header no longer speaks of
	s.want, s.kept = want, []keptDisk{{"foo", want}}
	s.verify()
}
