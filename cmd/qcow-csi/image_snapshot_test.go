package main

import (
	"path/filepath"
	"strings"
	"testing"
)

// TestImageSnapshot takes snapshots in turns with QEMU, and goes back to them.
func TestImageSnapshot(t *testing.T) {
	path := create(t)
	raw := filepath.Join(filepath.Dir(path), "raw")
	if out := mustImage(t, "snapshot", path); out != "" {
		t.Errorf("there are none, but: %s", out)
	}
	var empty []snapshotInfo
	if decode(t, mustImage(t, "snapshot", "--output=json", path), &empty); empty == nil || len(empty) > 0 {
		t.Errorf("%+v", empty)
	}
	var made snapshotInfo
	decode(t, mustImage(t, "snapshot", "--output=json", "-c", "first", path), &made)
	if made.ID != "1" || made.Name != "first" || made.Seconds == 0 {
		t.Errorf("%+v", made)
	}
	first := mustImage(t, "sha", "--output=json", path)
	qemuIO(t, path, "write -P 7 64k 1M")
	mustQEMU(t, "snapshot", "-c", "second", path)
	second := mustImage(t, "sha", "--output=json", path)
	qemuIO(t, path, "write -P 8 0 3M")
	if out := mustImage(t, "snapshot", "--create", "third", path); out != "Snapshot 3 of "+path+": third\n" {
		t.Error(out)
	}
	mustQEMU(t, "check", "-q", path)
	if got, want := mustImage(t, "snapshot", "--list", path), mustQEMU(t, "snapshot", "-l", path); !sameFields(got, want) {
		t.Errorf("%s\nQEMU has\n%s", got, want)
	}
	mustQEMU(t, "convert", "-f", "qcow2", "-O", "raw", "-l", "second", path, raw)
	for _, c := range []struct{ args, want string }{{"first", first}, {"1", first}, {"second", second}} {
		var got, want digested
		decode(t, mustImage(t, "sha", "--output=json", "-l", c.args, path), &got)
		decode(t, c.want, &want)
		if got.SHA256 != want.SHA256 || got.Snapshot != c.args {
			t.Errorf("%+v, want %+v", got, want)
		}
	}
	mustImage(t, "snapshot", "-a", "second", path)
	alike(t, "raw", raw, "qcow2", path)
	if out := mustImage(t, "snapshot", "--delete", "second", path); out != "Deleted snapshot second of "+path+"\n" {
		t.Error(out)
	}
	var used usedSnapshot
	if decode(t, mustImage(t, "snapshot", "--output=json", "-d", "1", path), &used); used != (usedSnapshot{path, "1"}) {
		t.Errorf("%+v", used)
	}
	alike(t, "raw", raw, "qcow2", path)
	mustImage(t, "snapshot", "-d", "third", path)
	if out := mustImage(t, "snapshot", path); out != "" {
		t.Errorf("all are deleted, but: %s", out)
	}
	mustQEMU(t, "check", "-q", path)
}

// sameFields compares texts word by word.
func sameFields(a, b string) bool {
	return strings.Join(strings.Fields(a), " ") == strings.Join(strings.Fields(b), " ")
}

func TestImageSnapshotRefuses(t *testing.T) {
	path := create(t)
	before := read(t, path)
	for why, args := range map[string][]string{
		"not found":        {"-a", "none"},
		`"none": not fou`:  {"-d", "none"},
		"none of the othe": {"-c", "a", "-d", "b"},
		"listing only":     {"-c", "a", "-U"},
		"65536 bytes":      {"-c", strings.Repeat("x", 1<<16)},
	} {
		refuses(t, why, append([]string{"snapshot", path}, args...)...)
	}
	if string(before) != string(read(t, path)) {
		t.Error("the image has changed")
	}
}
