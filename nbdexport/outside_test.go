package nbdexport_test

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"net"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/qcow-csi/qcow-csi/nbdexport"
	"github.com/qcow-csi/qcow-csi/nbdexport/nbdtest"
	"github.com/qcow-csi/qcow-csi/test/require"
)

// Tests with the clients of others: libnbd, QEMU, fio.

const outsideSize = 32 * mib

// forEachServer runs test with every kind of backend on every kind of socket.
func forEachServer(t *testing.T, test func(t *testing.T, uri string)) {
	for name, open := range map[string]func(t *testing.T) nbdexport.Backend{
		"memory": func(*testing.T) nbdexport.Backend {
			return nbdtest.NewMemory(nbdexport.Info{Size: outsideSize, MultiConn: true})
		},
		"qcow2": func(t *testing.T) nbdexport.Backend {
			return nbdexport.NewImageBackend(openImage(t, createImage(t, outsideSize), false), nbdexport.ImageOptions{})
		},
	} {
		for _, network := range []string{"unix", "tcp"} {
			t.Run(name+"/"+network, func(t *testing.T) {
				test(t, uri(nbdtest.Serve(t, network, nbdexport.Config{
					Exports: []nbdexport.Export{{Name: "disk", Description: "a disk", Backend: open(t)}},
				}), "disk"))
			})
		}
	}
}

func uri(addr net.Addr, export string) string {
	if addr.Network() == "unix" {
		return "nbd+unix:///" + export + "?socket=" + url.QueryEscape(addr.String())
	}
	return "nbd://" + addr.String() + "/" + export
}

// command runs a program and returns what it says.
func command(t *testing.T, name string, args ...string) string {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Dir = t.TempDir()
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%s %q: %v\n%s%s", name, args, err, out, stderr.String())
	}
	return string(out)
}

// randomFile writes n bytes, with holes, to a file and returns its path.
func randomFile(t *testing.T, n int) string {
	t.Helper()
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rng := rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8), byte(seed >> 16), byte(seed >> 24)})
	data := make([]byte, n)
	for off := 0; off < n; off += 1 << 20 { // the first half of every MiB
		if _, err := rng.Read(data[off : off+1<<19]); err != nil {
			t.Fatal(err)
		}
	}
	path := filepath.Join(t.TempDir(), "random")
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func wantSameFiles(t *testing.T, a, b string) {
	t.Helper()
	contents := make([][]byte, 2)
	for i, path := range []string{a, b} {
		var err error
		if contents[i], err = os.ReadFile(path); err != nil {
			t.Fatal(err)
		}
	}
	if !bytes.Equal(contents[0], contents[1]) {
		t.Errorf("%s and %s differ", a, b)
	}
}

func TestOutsideNbdinfo(t *testing.T) {
	require.Tool(t, "nbdinfo")
	forEachServer(t, func(t *testing.T, uri string) {
		var info struct {
			Protocol string
			Exports  []struct {
				Name        string `json:"export-name"`
				Description string
				Size        int64 `json:"export-size"`
				ReadOnly    bool  `json:"is_read_only"`
				CanFlush    bool  `json:"can_flush"`
				CanFUA      bool  `json:"can_fua"`
				CanTrim     bool  `json:"can_trim"`
				CanZero     bool  `json:"can_zero"`
				MultiConn   bool  `json:"can_multi_conn"`
				Minimum     int64 `json:"block_size_minimum"`
				Preferred   int64 `json:"block_size_preferred"`
				Maximum     int64 `json:"block_size_maximum"`
			}
		}
		for _, args := range [][]string{{"--json", uri}, {"--json", "--list", uri}} {
			out := command(t, "nbdinfo", args...)
			if err := json.Unmarshal([]byte(out), &info); err != nil {
				t.Fatalf("%v: %s", err, out)
			}
			if len(info.Exports) != 1 {
				t.Fatalf("exports: %s", out)
			}
			e := info.Exports[0]
			if e.Name != "disk" || e.Description != "a disk" || e.Size != outsideSize || e.ReadOnly || !e.CanFlush || !e.CanFUA ||
				!e.CanTrim || !e.CanZero || !e.MultiConn || e.Minimum != 1 || e.Preferred < 4096 || e.Maximum != 32*mib {
				t.Errorf("nbdinfo says %s", out)
			}
		}
		if got := strings.TrimSpace(command(t, "nbdinfo", "--size", uri)); got != fmt.Sprint(outsideSize) {
			t.Errorf("size %s", got)
		}
	})
}

func TestOutsideNbdcopy(t *testing.T) {
	require.Tool(t, "nbdcopy")
	forEachServer(t, func(t *testing.T, uri string) {
		in, out := randomFile(t, outsideSize), filepath.Join(t.TempDir(), "out")
		command(t, "nbdcopy", "--flush", in, uri) // with several connections
		command(t, "nbdcopy", uri, out)
		wantSameFiles(t, in, out)
	})
}

func TestOutsideQemuImg(t *testing.T) {
	require.Tool(t, "qemu-img")
	forEachServer(t, func(t *testing.T, uri string) {
		in := randomFile(t, outsideSize)
		command(t, "qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", in, uri)
		command(t, "qemu-img", "compare", "-f", "raw", "-F", "raw", in, uri)
		out := filepath.Join(t.TempDir(), "out.qcow2")
		command(t, "qemu-img", "convert", "-f", "raw", "-O", "qcow2", uri, out)
		command(t, "qemu-img", "compare", "-f", "raw", "-F", "qcow2", in, out)
	})
}

func TestOutsideQemuIO(t *testing.T) {
	require.Tool(t, "qemu-io")
	forEachServer(t, func(t *testing.T, uri string) {
		args := []string{"-f", "raw"}
		for _, c := range []string{
			"write -P 1 0 32M", "write -P 2 4095 3", "write -f -P 3 1M 64k", "write -P 4 2M 7M", "write -z 3M 128k", "write -z -u 4M 1M",
			"discard 5M 1M", "flush", "aio_write -P 5 6M 1M", "aio_write -P 6 8M 512", "aio_flush",
			"read -P 1 0 4095", "read -P 2 4095 3", "read -P 1 4098 1044478", "read -P 3 1M 64k", "read -P 4 2M 1M", "read -P 0 3M 128k",
			"read -P 4 3200k 896k", "read -P 0 4M 1M", "read -P 5 6M 1M", "read -P 4 7M 1M", "read -P 6 8M 512", "read -P 1 10M 22M",
		} {
			args = append(args, "-c", c)
		}
		out := command(t, "qemu-io", append(args, uri)...)
		if strings.Contains(out, "failed") {
			t.Errorf("qemu-io: %s", out)
		}
	})
}

func TestOutsideFio(t *testing.T) {
	require.Tool(t, "fio")
	forEachServer(t, func(t *testing.T, uri string) {
		for _, job := range [][]string{
			{"--rw=randwrite", "--bsrange=512-128k", "--iodepth=16", "--verify=crc32c", "--verify_fatal=1"},
			{"--rw=write", "--bs=1M", "--iodepth=4", "--numjobs=2", "--offset_increment=16M", "--size=16M", "--verify=crc32c"},
			{"--rw=randtrimwrite", "--bs=4k", "--iodepth=8", "--io_size=4M", "--fsync=32"},
		} {
			args := append([]string{
				"--name=outside", "--ioengine=nbd", "--uri=" + uri, "--size=32M", "--output-format=terse",
			}, job...)
			command(t, "fio", args...)
		}
	})
}

// TestOutsideReadOnly has clients that want to write where they must not.
func TestOutsideReadOnly(t *testing.T) {
	require.Tool(t, "nbdinfo", "qemu-io")
	img := openImage(t, createImage(t, mib), true)
	addr := nbdtest.Serve(t, "unix", offer(nbdexport.NewImageBackend(img, nbdexport.ImageOptions{})))
	if out := command(t, "nbdinfo", uri(addr, "")); !strings.Contains(out, "is_read_only: true") {
		t.Errorf("nbdinfo says %s", out)
	}
	if out := command(t, "qemu-io", "-r", "-f", "raw", "-c", "read -P 0 0 1M", uri(addr, "")); !strings.Contains(out, "read 1048576/1048576") {
		t.Errorf("qemu-io says %s", out)
	}
	if out, err := exec.Command("qemu-io", "-f", "raw", "-c", "write 0 512", uri(addr, "")).CombinedOutput(); err == nil {
		t.Errorf("qemu-io wrote to a read-only export: %s", out)
	}
}
