package main

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"runtime/debug"
	"strings"
	"testing"

	"github.com/qcow-csi/qcow-csi/test/load/generator"
)

func TestRun(t *testing.T) {
	defer debug.SetGCPercent(100) // run turns it off
	path := filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(path, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	args := []string{"-file", path, "-rw", "randrw", "-bs", "8k", "-runtime", "20ms", "-verify"}
	var text bytes.Buffer
	if err := run(t.Context(), args, &text); err != nil || !strings.Contains(text.String(), " IOPS, ") {
		t.Errorf("%q, %v", &text, err)
	}
	text.Reset()
	if err := run(t.Context(), append(args, "-json"), &text); err != nil {
		t.Fatal(err)
	}
	var r generator.Result
	if err := json.Unmarshal(text.Bytes(), &r); err != nil || r.IOPS <= 0 || r.Reads == 0 || r.Writes == 0 {
		t.Errorf("%+v, %v", r, err)
	}
	for _, wrong := range [][]string{{"x"}, {"-bs", "4q"}, {"-file", path + ".not"}, nil} {
		if err := run(t.Context(), wrong, &text); err == nil {
			t.Errorf("%q was accepted", wrong)
		}
	}
}

func TestSizeFlag(t *testing.T) {
	var n int64
	for s, want := range map[string]int64{"0": 0, "4096": 4096, "4k": 4096, "1M": 1 << 20, "2g": 2 << 30, "1T": 1 << 40} {
		if err := (sizeFlag{&n, ""}).Set(s); err != nil || n != want {
			t.Errorf("%q is %d, %v", s, n, err)
		}
	}
	for _, s := range []string{"", "k", "-1", "4kb", "1.5g", "99999999999t"} {
		if err := (sizeFlag{&n, ""}).Set(s); err == nil {
			t.Errorf("%q is accepted as %d", s, n)
		}
	}
}
