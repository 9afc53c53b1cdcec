package main

import (
	"bytes"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"k8s.io/klog/v2"

	"github.com/qcow-csi/qcow-csi/nbdexport/nbdtest"
)

// captureLog returns what is logged from now on, at all levels.
func captureLog(t *testing.T) (said func() string) {
	t.Helper()
	var b lockedBuffer
	klog.SetSlogLogger(slog.New(slog.NewTextHandler(&b, &slog.HandlerOptions{Level: slog.Level(-10)})))
	t.Cleanup(klog.ClearLogger)
	return b.String
}

type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// TestExportMaxClients: one more than may be there waits until somebody leaves.
func TestExportMaxClients(t *testing.T) {
	for _, flag := range []string{"--max-clients=2", "--shared=2", "-e2"} {
		image, socket := create(t), filepath.Join(t.TempDir(), "nbd.sock")
		e := mustExport(t, image, "--socket", socket, flag)
		first, second := nbdtest.Dial(t, unixAddr(socket)), nbdtest.Dial(t, unixAddr(socket))
		first.Go("")
		second.Go("")
		third := nbdtest.Dial(t, unixAddr(socket))
		if err := third.SetReadDeadline(time.Now().Add(50 * time.Millisecond)); err != nil {
			t.Fatal(err)
		}
		if n, err := third.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("%s: the third client got %d bytes, %v", flag, n, err)
		}
		if err := third.SetReadDeadline(time.Time{}); err != nil {
			t.Fatal(err)
		}
		first.Disconnect()
		third.Go("")
		third.Disconnect()
		e.end(t, second)
	}
	image := create(t)
	e, client := exportedTo(t, image, "--shared", "0")
	others := make([]*nbdtest.Client, 63)
	for i := range others {
		others[i] = nbdtest.Dial(t, client.RemoteAddr())
		others[i].Go("")
	}
	for _, c := range others {
		c.Disconnect()
	}
	e.end(t, client)
}

func TestExportHandshakeTimeout(t *testing.T) {
	said := captureLog(t)
	image, socket := create(t), filepath.Join(t.TempDir(), "nbd.sock")
	e := mustExport(t, image, "--socket", socket, "--handshake-timeout", "20ms", "-t")
	silent := nbdtest.Dial(t, unixAddr(socket))
	if err := silent.SetReadDeadline(time.Now().Add(9 * time.Second)); err != nil { // less than without the flag
		t.Fatal(err)
	}
	silent.Greet(3)
	silent.ReceiveEnd()
	e.signal()
	e.wantEnd(t)
	for _, want := range []string{"Client connected", "Client left", "handshake: "} {
		if !strings.Contains(said(), want) {
			t.Errorf("no %q in the log: %s", want, said())
		}
	}
}

// TestExportShutdownGrace ends the server while a client takes no replies.
func TestExportShutdownGrace(t *testing.T) {
	said := captureLog(t)
	e, client := exportedTo(t, create(t), "--shutdown-grace", "30ms", "-t")
	for range 64 {
		client.Send(nbdtest.Request{Command: nbdtest.CmdRead, Length: 8 << 20}.Encode())
	}
	client.Receive(1) // it has begun
	e.signal()
	e.wantEnd(t)
	if !strings.Contains(said(), "did not take its last replies") || !strings.Contains(said(), "30ms") {
		t.Errorf("it says %s", said())
	}
}

func TestExportRefusesLimits(t *testing.T) {
	image := create(t)
	for _, c := range []struct{ flag, says string }{
		{"--max-clients=-1", "can't be negative"},
		{"--handshake-timeout=0", "must be more than 0"},
		{"--handshake-timeout=-1s", "must be more than 0"},
		{"--shutdown-grace=-1s", "can't be negative"},
		{"--shutdown-grace=soon", "invalid"},
	} {
		_, err := startExport(t, image, c.flag, "--socket", filepath.Join(t.TempDir(), "s"))
		if err == nil || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s: %v, which does not say %q", c.flag, err, c.says)
		}
	}
}

// TestExportLogsFailures serves an image that says something impossible of its second cluster: the client learns that it can't be read,
// and the operator why.
func TestExportLogsFailures(t *testing.T) {
	said := captureLog(t)
	e, client := exportedTo(t, damaged(t, damages[5]), "--read-only")
	for range 3 {
		if _, err := client.ReadBytes(1<<16, 512); err == nil {
			t.Error("read what is not there")
		}
	}
	e.end(t, client)
	log := said()
	failed := strings.Count(log, "Request failed") // once, unless this machine is very slow
	for _, m := range regexp.MustCompile(`omitted=(\d+)`).FindAllStringSubmatch(log, -1) {
		omitted, err := strconv.Atoi(m[1])
		if err != nil {
			t.Fatal(err)
		}
		failed += omitted
	}
	if failed != 3 || !strings.Contains(log, "corrupt") || !strings.Contains(log, "operation=read offset=65536 length=512") {
		t.Errorf("it says that %d failed: %s", failed, log)
	}
}

// TestFailures: a line each pause, for each operation, with the number of those that were left out.
func TestFailures(t *testing.T) {
	said := captureLog(t)
	f := newFailures(klog.Background())
	f.report("read", 1, 2, errors.New("first"))
	f.said["read"].since = time.Now().Add(time.Hour) // however slow this machine is
	f.report("read", 1, 2, errors.New("omitted"))
	f.report("write", 3, 4, errors.New("another"))
	f.said["read"].since = time.Now().Add(-failurePause)
	f.report("read", 1, 2, errors.New("second"))
	f.said["read"].since = time.Now().Add(time.Hour)
	f.report("read", 1, 2, errors.New("omitted"))
	f.report("read", 1, 2, errors.New("omitted"))
	f.finish()
	log := said()
	for _, want := range []string{"err=first", "err=another", "err=second", "omitted=1", `"More requests failed"`, "omitted=2"} {
		if strings.Count(log, want) != 1 {
			t.Errorf("not one %q in %s", want, log)
		}
	}
	if strings.Contains(log, "err=omitted") {
		t.Errorf("too much: %s", log)
	}
}
