package main

import (
	"bytes"
	"encoding/json"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/qcow-csi/qcow-csi/test/require"
)

// TestRepeated has QEMU check and read images in which data clusters are shared.
func TestRepeated(t *testing.T) {
	require.Tool(t, "qemu-img")
	for _, c := range []struct{ size, data int64 }{
		{1 << 20, 1 << 20},             // nothing is shared
		{7 * clusterSize, 3 << 16},     // some are shared once more than others
		{3<<30 + clusterSize, 4 << 20}, // several L2 tables
	} {
		dir := t.TempDir()
		path, raw := filepath.Join(dir, "i.qcow2"), filepath.Join(dir, "i.raw")
		seed := [32]byte{7}
		if err := writeRepeated(path, c.size, c.data, rand.NewChaCha8(seed)); err != nil {
			t.Fatal(err)
		}
		if out, err := exec.Command("qemu-img", "check", "-f", "qcow2", path).CombinedOutput(); err != nil {
			t.Errorf("%+v: %v: %s", c, err, out)
		}
		out, err := exec.Command("qemu-img", "info", "--output=json", "-f", "qcow2", path).Output()
		var info struct {
			Size int64 `json:"virtual-size"`
		}
		if err := json.Unmarshal(out, &info); err != nil || info.Size != c.size {
			t.Errorf("%+v: size %d, %v", c, info.Size, err)
		}
		if err != nil || c.size > 1<<30 {
			continue
		}
		if out, err := exec.Command("qemu-img", "convert", "-f", "qcow2", "-O", "raw", path, raw).CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		got, err := os.ReadFile(raw)
		if err != nil {
			t.Fatal(err)
		}
		data := make([]byte, c.data)
		_, _ = rand.NewChaCha8(seed).Read(data) // never fails
		want := bytes.Repeat(data, int(c.size/c.data)+1)[:c.size]
		if !bytes.Equal(got, want) {
			t.Errorf("%+v: wrong data", c)
		}
	}
}
