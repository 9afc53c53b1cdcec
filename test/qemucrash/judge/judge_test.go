package judge

import (
	"encoding/binary"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"slices"
	"testing"

	"github.com/qcow-csi/qcow-csi/qcow/storage"
	"github.com/qcow-csi/qcow-csi/test/require"
)

// newImage returns an image of 1 MiB with a snapshot s1 of a disk full of ones, of which the first 128 KiB have been
// overwritten since.
func newImage(t *testing.T) []byte {
	t.Helper()
	require.Tool(t, "qemu-img", "qemu-io")
	path := filepath.Join(t.TempDir(), "disk.qcow2")
	for _, command := range [][]string{
		{"qemu-img", "create", "-q", "-f", "qcow2", path, "1M"},
		{"qemu-io", "-f", "qcow2", "-c", "write -P 1 0 1M", path},
		{"qemu-img", "snapshot", "-c", "s1", path},
		{"qemu-io", "-f", "qcow2", "-c", "write -P 2 0 128k", path},
	} {
		if out, err := exec.CommandContext(t.Context(), command[0], command[1:]...).CombinedOutput(); err != nil {
			t.Fatalf("%v: %v\n%s", command, err, out)
		}
	}
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// entry reads a 64-bit number of an image.
func entry(b []byte, off int64) int64 { return int64(binary.BigEndian.Uint64(b[off:])) }

// place follows a table entry to where it points.
func place(b []byte, off int64) int64 { return entry(b, off) & 0x00fffffffffffe00 }

func write(b []byte, off int64, data ...byte) storage.Op {
	return storage.Op{Kind: storage.OpWrite, Offset: off, Data: data}
}

// judgeWrites judges what a broken program does that makes these writes and syncs in between. The states are all before the first
// write, and all after each.
func judgeWrites(t *testing.T, image []byte, keep string, writes ...storage.Op) *Result {
	t.Helper()
	trial := &Trial{Operation: "damage", Shape: "small", Images: []Image{{Name: "disk.qcow2", Initial: image, Final: image}}}
	for _, op := range writes {
		trial.Ops = append(trial.Ops, op, storage.Op{Kind: storage.OpSync})
	}
	r, err := Judge(t.Context(), trial, Options{States: 1000, Seed: 1, Dir: t.TempDir(), Keep: keep})
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// A state is judged by what is wrong with it. Each of these writes fits in a sector, so that the states are: before it
// (nothing issued, or issued and lost), and after it (killed, or a power loss that kept it).
func TestJudgeSeesDamage(t *testing.T) {
	image := newImage(t)
	l1 := entry(image, 40)
	l2 := place(image, l1)
	block := place(image, entry(image, 48))
	snapshotL1 := entry(image, entry(image, 64))
	oldData := place(image, place(image, snapshotL1))
	newData := place(image, l2)

	two := Count{States: 2, Distinct: 1}
	clean := Verdicts{Clean: two}
	for name, c := range map[string]struct {
		op    storage.Op
		qemu  Verdicts // none: bad in some way
		wrong bool
		later bool
	}{
		"nothing":                    {op: write(image, oldData, image[oldData]), qemu: clean},
		"data of the disk":           {op: write(image, newData, 3), qemu: clean, wrong: true},
		"data of the snapshot":       {op: write(image, oldData+9, 3), qemu: clean, wrong: true},
		"a refcount too high":        {op: write(image, block+2*(newData>>16), 0, 2), qemu: Verdicts{Corrupt: two}}, // against COPIED
		"a refcount of nothing":      {op: write(image, block+2*200, 0, 1), qemu: clean},
		"a missing refcount":         {op: write(image, block+2*(oldData>>16), 0, 0), qemu: Verdicts{Corrupt: two}, later: true},
		"COPIED on a shared L2":      {op: write(image, l2+16, 0x80), qemu: Verdicts{Corrupt: two}, later: true},
		"no header":                  {op: write(image, 0, 0, 0, 0, 0), qemu: Verdicts{Unusable: two}, wrong: true},
		"a snapshot that is gone":    {op: write(image, 60, 0, 0, 0, 0), qemu: Verdicts{Leaks: two}, wrong: true},
		"an unreadable snapshot":     {op: write(image, entry(image, 64), 0xff), wrong: true},
		"a disk of another size":     {op: write(image, 24, 0, 0, 0, 0, 0, 8, 0, 0), qemu: clean, wrong: true},
		"an L2 table somewhere else": {op: write(image, l1, 0, 0, 0, 0, 0x7f, 0xff, 0, 0), wrong: true},
	} {
		t.Run(name, func(t *testing.T) {
			r := judgeWrites(t, image, "", c.op)
			if name == "nothing" {
				if r.States != (Count{3, 1}) || r.QEMU.Clean != r.States || r.Own.Clean != r.States || r.WrongData.States+r.WrongLater.States > 0 {
					t.Errorf("%+v", r)
				}
				return
			}
			if r.Possible != 3 || r.States != (Count{3, 2}) {
				t.Errorf("states: %d, %v", r.Possible, r.States)
			}
			before := Count{1, 1}
			if c.qemu.Clean == two {
				before = r.States
			}
			if r.QEMU.Clean != before || c.qemu != (Verdicts{}) && !says(r.QEMU, c.qemu) {
				t.Errorf("qemu-img check: %+v, want %+v", r.QEMU, c.qemu)
			}
			if got := r.WrongData == two; got != c.wrong || !got && r.WrongData.States != 0 {
				t.Errorf("wrong: %v", r.WrongData)
			}
			if got := r.WrongLater == two; got != c.later || !got && r.WrongLater.States != 0 {
				t.Errorf("later: %v", r.WrongLater)
			}
		})
	}
}

// says compares verdicts, but for what is clean.
func says(got, want Verdicts) bool {
	got.Clean, want.Clean = Count{}, Count{}
	return got == want
}

// The bad states are kept as they were judged, beside what they came from.
func TestJudgeKeepsExamples(t *testing.T) {
	image := newImage(t)
	dir := t.TempDir()
	oldData := place(image, place(image, entry(image, entry(image, 64))))
	r := judgeWrites(t, image, dir, write(image, oldData, 3))
	bad := slices.Clone(image)
	bad[oldData] = 3
	for name, want := range map[string][]byte{"before": image, "wrong-data": bad} {
		got, err := os.ReadFile(filepath.Join(dir, "damage-small", name, "disk.qcow2"))
		if err != nil {
			t.Fatal(err)
		}
		if !slices.Equal(got, want) {
			t.Errorf("%s has another content", name)
		}
	}
	text, err := os.ReadFile(filepath.Join(dir, "damage-small", "wrong-data", "state.txt"))
	if want := r.Examples[0].State + "\nsnapshot s1 has another content\n"; err != nil || string(text) != want {
		t.Errorf("state.txt: %q, %v; want %q", text, err, want)
	}
	if log, err := os.ReadFile(filepath.Join(dir, "damage-small", "log.txt")); err != nil || len(log) == 0 {
		t.Errorf("log.txt: %q, %v", log, err)
	}
}

// An image that is marked dirty is repaired by the next one who opens it, and judged after that.
func TestJudgeRepairsDirtyImages(t *testing.T) {
	image := newImage(t)
	block := place(image, entry(image, 48))
	image[72+7] |= 1
	r := judgeWrites(t, image, "", write(image, block+2, 0, 0), write(image, 72+7, 1))
	if r.Dirty != r.States || r.QEMU.Clean != r.States || r.WrongData.States+r.WrongLater.States > 0 {
		t.Errorf("%+v", r)
	}
}

func TestJudgeIsRepeatable(t *testing.T) {
	image := newImage(t)
	l1 := entry(image, 40)
	var results []*Result
	for range 2 {
		results = append(results, judgeWrites(t, image, "", write(image, l1, make([]byte, 2048)...), write(image, l1+1024, 1)))
	}
	if !reflect.DeepEqual(results[0], results[1]) {
		t.Errorf("%+v\n%+v", results[0], results[1])
	}
}
