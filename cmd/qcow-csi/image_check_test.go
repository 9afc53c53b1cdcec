package main

import (
	"bytes"
	"encoding/binary"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/qcow-csi/qcow-csi/qcow/format"
)

// damage is something that is wrong with the image that create makes.
type damage struct {
	name   string
	change func(b []byte) []byte
	exit   int // of a check
	leaks  int // of a check after leaks were repaired; after everything was it is 0
	says   string
}

const cluster = 1 << 16

// refcountAt returns where the refcount of a cluster is in the image b.
func refcountAt(b []byte, n int) int {
	table := binary.BigEndian.Uint64(b[48:])
	return int(binary.BigEndian.Uint64(b[table:])) + 2*n
}

// l2At returns where the L2 table is, whose second entry is that of the first data cluster.
func l2At(b []byte) int {
	l1 := binary.BigEndian.Uint64(b[40:])
	return int(binary.BigEndian.Uint64(b[l1:]) & (1<<56 - 1))
}

// leak adds a cluster that nothing refers to.
func leak(b []byte) []byte {
	b[refcountAt(b, len(b)/cluster)+1] = 1
	return append(b, make([]byte, cluster)...)
}

var damages = []damage{
	{"none", func(b []byte) []byte { return b }, 0, 0, "No errors were found on the image."},
	{"leak", leak, exitLeaks, 0, "leak"},
	{"refcount too low", func(b []byte) []byte {
		b[refcountAt(b, len(b)/cluster-1)+1] = 0
		return b
	}, exitCorrupt, exitCorrupt, "refcount too low"},
	{"COPIED missing", func(b []byte) []byte {
		b[l2At(b)+8] &^= 0x80
		return b
	}, exitCorrupt, exitCorrupt, "COPIED missing"},
	{"both", func(b []byte) []byte {
		b[l2At(b)+8] &^= 0x80
		return leak(b)
	}, exitCorrupt, exitCorrupt, "leaked cluster"},
	{"pointer outside", func(b []byte) []byte {
		b[l2At(b)+8+3] = 1
		return b
	}, exitCorrupt, exitCorrupt, "outside the file"},
	{"marked dirty", func(b []byte) []byte {
		binary.BigEndian.PutUint64(b[format.IncompatibleOffset:], format.IncompatDirty)
		return b
	}, 0, 0, "marked dirty"},
}

// damaged makes an image with a damage.
func damaged(t *testing.T, d damage) string {
	t.Helper()
	path := create(t)
	return write(t, path, string(d.change(read(t, path))))
}

// TestImageCheckIsQEMUs compares exit status and JSON with those of qemu-img check.
func TestImageCheckIsQEMUs(t *testing.T) {
	for _, d := range damages {
		t.Run(d.name, func(t *testing.T) {
			path := damaged(t, d)
			out, err := image(t, "check", "--output=json", path)
			theirs, status := qemuImg(t, "check", "-f", "qcow2", "--output=json", path)
			if exitCode(err) != status || status != d.exit {
				t.Errorf("exit status %d, QEMU's %d, want %d: %v", exitCode(err), status, d.exit, err)
			}
			var got, want imageCheck
			decode(t, out, &got)
			decode(t, theirs, &want)
			if n := got.Leaks + got.Corruptions; n != len(got.Findings) {
				t.Errorf("%d findings, but %d are counted", len(got.Findings), n)
			}
			if got.Corruptions > 0 && want.Corruptions > 0 { // QEMU counts some twice
				got.Corruptions = want.Corruptions
			}
			got.Findings = nil
			if !reflect.DeepEqual(got, want) {
				t.Errorf("got  %+v\nwant %+v", got, want)
			}
			text, err := image(t, "check", path)
			if exitCode(err) != d.exit || !strings.Contains(text, d.says) || err != nil && strings.Contains(err.Error(), "\n") {
				t.Errorf("exit status %d, error %v, %s", exitCode(err), err, text)
			}
			if out, err := image(t, "check", "-q", path); out != "" || exitCode(err) != d.exit {
				t.Errorf("quiet: %q, %v", out, err)
			}
		})
	}
}

func TestImageCheckSays(t *testing.T) {
	want := "No errors were found on the image.\n3/160 = 1.88% allocated, 0.00% fragmented, 0.00% compressed clusters\nImage end offset: "
	if out := mustImage(t, "check", create(t)); !strings.HasPrefix(out, want) {
		t.Error(out)
	}
}

func TestImageCheckRefuses(t *testing.T) {
	path := create(t)
	refuses(t, "memory", "check", "--max-memory", "1K", path)
	refuses(t, "must be", "check", "-r", "some", path)
	refuses(t, "force-share", "check", "-r", "all", "-U", path)
	write(t, path, string(read(t, path)[:100]))
	refuses(t, "header", "check", path)
	refuses(t, "header", "repair", path)
}

// TestImageRepair repairs what can be damaged, and lets QEMU judge the result.
func TestImageRepair(t *testing.T) {
	for _, d := range damages {
		for _, c := range []struct {
			args []string
			exit int
		}{{[]string{"check", "-r", "leaks"}, d.leaks}, {[]string{"repair"}, 0}} {
			t.Run(d.name+"/"+c.args[0], func(t *testing.T) {
				path := damaged(t, d)
				out, err := image(t, append(c.args, "--output=json", path)...)
				var got imageCheck
				decode(t, out, &got)
				if exitCode(err) != c.exit || c.exit == 0 && got.Leaks+got.Corruptions > 0 {
					t.Errorf("exit status %d, want %d: %v, %+v", exitCode(err), c.exit, err, got)
				}
				if d.name == "leak" && (got.LeaksFixed != 1 || got.CorruptionsFixed != 0 || len(got.Changes) != 1) {
					t.Errorf("%+v", got)
				}
				if _, status := qemuImg(t, "check", "-q", "-f", "qcow2", path); status != c.exit {
					t.Errorf("QEMU's exit status is %d afterwards, not %d", status, c.exit)
				}
			})
		}
	}
}

// TestImageRepairIsACheck: both commands do the same, and say the same.
func TestImageRepairIsACheck(t *testing.T) {
	path := damaged(t, damages[4])
	before := string(read(t, path))
	for mode, exit := range map[string]int{"leaks": exitCorrupt, "all": 0} {
		for _, output := range []string{"json", "human"} {
			write(t, path, before)
			one, err := image(t, "check", "-r", mode, "--output", output, path)
			if exitCode(err) != exit {
				t.Errorf("check -r %s: %v", mode, err)
			}
			write(t, path, before)
			other, err := image(t, "repair", "--mode", mode, "--output", output, path)
			if exitCode(err) != exit || one != other || one == "" {
				t.Errorf("check -r %s says\n%s\nrepair says (%v)\n%s", mode, one, err, other)
			}
		}
	}
}

// TestImageRepairDryRun changes nothing, and says what it would.
func TestImageRepairDryRun(t *testing.T) {
	path := damaged(t, damages[1])
	before := read(t, path)
	out, err := image(t, "repair", "--dry-run", path)
	if exitCode(err) != exitLeaks || !strings.Contains(out, "A repair would make 1 change") || !bytes.Equal(before, read(t, path)) {
		t.Errorf("%v, %s", err, out)
	}
	if out := mustImage(t, "repair", path); !strings.Contains(out, "The repair made 1 change") || !strings.Contains(out, "leak repaired") {
		t.Error(out)
	}
	if out := mustImage(t, "repair", path); !strings.Contains(out, "Nothing had to be repaired") {
		t.Error(out)
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	refuses(t, filepath.Base(path), "repair", "--dry-run", path)
	path = damaged(t, damages[2])
	if out, err := image(t, "repair", "--mode", "leaks", path); exitCode(err) != exitCorrupt || !strings.HasPrefix(out, "Nothing was repaired") {
		t.Errorf("%v, %s", err, out)
	}
}
