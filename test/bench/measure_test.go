package main

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/qcow-csi/qcow-csi/test/require"
)

// TestMain lets the tests run their own program as a host of exports.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == hostCommand {
		if err := host(os.Args[2:]); err != nil {
			panic(err)
		}
		return
	}
	os.Exit(m.Run())
}

// TestTake measures everything once, for a moment.
func TestTake(t *testing.T) {
	require.Tool(t, "qemu-img", "qemu-nbd", "nbdkit", "fio", "nbdcopy")
	dir := t.TempDir()
	o, err := parseOptions([]string{
		"-servers", "^(qcow-csi|qemu-nbd|nbdkit file|raw)$", "-workloads", "mixed|allocating|sequential write|nbdcopy",
		"-clients", "load", "-depths", "4", "-connections", "2", "-rounds", "1", "-runtime", "20ms",
		"-image-size", "64m", "-copy-size", "16m", "-idle-exports", "2", "-dir", dir, "-copy-dir", dir,
		"-json", filepath.Join(t.TempDir(), "r.json"),
	})
	if err != nil {
		t.Fatal(err)
	}
	r, err := take(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	for _, failure := range r.failures() {
		if strings.Contains(failure, "io_uring") {
			continue // which not every kernel allows
		}
		t.Error(failure)
	}
	for _, row := range r.Rows {
		for i, c := range row.Cells {
			if c.Error != "" {
				continue
			}
			if len(c.Samples) != 1 || c.Samples[0].Value <= 0 {
				t.Errorf("%s, %s: %+v", r.Servers[i].Name, row, c)
			} else if s := c.Samples[0]; r.Servers[i].Family != limit && (s.CPU <= 0 || s.Idle.RSS <= 0 || s.End.Peak < s.End.RSS) {
				t.Errorf("%s, %s: %+v", r.Servers[i].Name, row, s)
			}
		}
	}
	if r.Idle.Base.RSS <= 0 || r.Idle.Idle.RSS <= 0 || r.Idle.Loaded.Anon <= 0 {
		t.Errorf("idle exports: %+v", r.Idle)
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
	if saved, err := readReport(o.json); err != nil || saved.markdown() != r.markdown() {
		t.Errorf("the file differs from the report: %v", err)
	}
}

// TestServersStart starts every server that is there, the extra ones as well.
func TestServersStart(t *testing.T) {
	require.Tool(t, "qemu-img", "qemu-nbd", "nbdkit")
	dir := t.TempDir()
	l := &laboratory{socket: filepath.Join(dir, "s")}
	for _, s := range newServers(1 << 20) {
		if s.Family == ours || s.Family == limit {
			continue // TestTake has them
		}
		if _, err := exec.LookPath(s.program()); err != nil {
			t.Logf("no %s: %v", s.Name, err)
			continue
		}
		image := filepath.Join(dir, "image."+s.format())
		if s.format() != "" {
			if _, err := output(t.Context(), "qemu-img", "create", "-q", "-f", s.format(), image, "1M"); err != nil {
				t.Fatal(err)
			}
		}
		serving, err := start(t.Context(), l.place(&row{Workload: workloads[0]}, s.Command, image), l.socket)
		if err == nil {
			err = serving.stop()
		}
		if err != nil && !strings.Contains(err.Error(), "io_uring") && !strings.Contains(err.Error(), "O_DIRECT") { // not everywhere
			t.Errorf("%s: %v", s.Name, err)
		}
	}
}

// TestInterrupted leaves nothing behind.
func TestInterrupted(t *testing.T) {
	require.Tool(t, "qemu-img")
	dir := t.TempDir()
	o, err := parseOptions([]string{"-dir", dir, "-copy-dir", dir, "-image-size", "64m", "-idle-exports", "0"})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := take(ctx, o); err == nil {
		t.Error("an interrupted run reports no error")
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
}

func TestMemoryOf(t *testing.T) {
	m, err := memoryOf(os.Getpid())
	if err != nil || m.RSS <= 0 || m.Anon <= 0 || m.Anon > m.RSS || m.Peak < m.RSS {
		t.Errorf("%+v, %v", m, err)
	}
}
