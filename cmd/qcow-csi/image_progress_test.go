package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"os"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/qcow-csi/qcow-csi/test/require"
)

// pipe is the writing end of a pipe for --progress-fd.
type pipe struct {
	t *testing.T
	w *os.File
}

func (p pipe) number() string { return strconv.Itoa(int(p.w.Fd())) }

func (p pipe) close() {
	if err := p.w.Close(); err != nil {
		p.t.Error(err)
	}
}

// progressPipe returns a pipe, and the lines that come out of it until it is closed.
func progressPipe(t *testing.T) (pipe, <-chan progressLine) {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	lines := make(chan progressLine)
	go func() {
		defer close(lines)
		defer r.Close() //nolint:errcheck // it was only read
		for scan := bufio.NewScanner(r); scan.Scan(); {
			var l progressLine
			d := json.NewDecoder(bytes.NewReader(scan.Bytes()))
			d.DisallowUnknownFields()
			if err := d.Decode(&l); err != nil {
				t.Errorf("%v in %s", err, scan.Bytes())
			}
			lines <- l
		}
	}()
	return pipe{t, w}, lines
}

// TestImageProgressFD reads what programs read of a command that takes long.
func TestImageProgressFD(t *testing.T) {
	path := create(t)
	mustImage(t, "create", "-b", path, "-F", "qcow2", path+".overlay")
	mustImage(t, "write", path+".overlay", "0", "--from", write(t, path+".data", strings.Repeat("data", 1<<16)))
	for _, args := range [][]string{
		{"convert", "-O", "qcow2", path, path + ".new"},
		{"convert", "-O", "raw", path, path + ".raw"},
		{"create", "-o", "preallocation=full", path + ".full", "1M"},
		{"sha", path},
		{"discard", path},
		{"repair", path},
		{"resize", "--preallocation=full", path, "+1M"},
		{"commit", "-d", path + ".overlay"},
		{"rebase", "-b", "", path + ".overlay"},
	} {
		pipe, lines := progressPipe(t)
		done := make(chan []progressLine)
		go func() {
			var all []progressLine
			for l := range lines {
				all = append(all, l)
			}
			done <- all
		}()
		mustImage(t, append(args, "--progress-fd", pipe.number())...)
		pipe.close()
		all := <-done
		last := progressLine{}
		for _, l := range all {
			if l.Done < last.Done || l.Fraction < last.Fraction || l.Fraction > 1 || l.Total > 0 && l.Fraction != float64(l.Done)/float64(l.Total) {
				t.Errorf("image %q: %+v after %+v", args, l, last)
			}
			last = l
		}
		if last.Fraction != 1 || len(all) > 1001 {
			t.Errorf("image %q: %d lines, the last one is %+v", args, len(all), last)
		}
	}
}

// TestImageProgressNobodyListens goes on when the reader of the progress has gone.
func TestImageProgressNobodyListens(t *testing.T) {
	path := create(t)
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	mustImage(t, "sha", "--progress-fd", strconv.Itoa(int(w.Fd())), path)
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
}

func TestImageProgressRefuses(t *testing.T) {
	path := create(t)
	refuses(t, "--progress-fd 12345", "sha", "--progress-fd", "12345", path)
	refuses(t, "--progress-fd -1", "sha", "--progress-fd", "-1", path)
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	refuses(t, "open for reading", "sha", "--progress-fd", strconv.Itoa(int(f.Fd())), path)
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
}

// withStderr runs the image command with a file as stderr.
func withStderr(t *testing.T, stderr io.Writer, args ...string) error {
	t.Helper()
	cmd := newImageCommand()
	cmd.SilenceErrors = true
	cmd.SetOut(io.Discard)
	cmd.SetErr(stderr)
	cmd.SetArgs(args)
	return cmd.ExecuteContext(t.Context())
}

// TestImageProgressBar looks for a bar where one is asked for, and nowhere else.
func TestImageProgressBar(t *testing.T) {
	path := create(t)
	for _, c := range []struct {
		flag string
		bar  bool
	}{{"-p", true}, {"--progress=false", false}, {"--quiet", false}} {
		var stderr bytes.Buffer
		if err := withStderr(t, &stderr, "sha", c.flag, path); err != nil {
			t.Error(err)
		}
		if out := stderr.String(); strings.Contains(out, "100.00%") != c.bar || !c.bar && out != "" || strings.Contains(out, "\x1b") {
			t.Errorf("%s: %q", c.flag, out)
		}
	}
}

// TestImageProgressOnTerminal gives the command a terminal.
func TestImageProgressOnTerminal(t *testing.T) {
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	require.Feature(t, err == nil, "needs pseudo terminals")
	var slave *os.File
	if err == nil {
		var n int
		if n, err = unix.IoctlGetInt(int(master.Fd()), unix.TIOCGPTN); err == nil {
			err = unix.IoctlSetPointerInt(int(master.Fd()), unix.TIOCSPTLCK, 0)
		}
		if err == nil {
			slave, err = os.OpenFile("/dev/pts/"+strconv.Itoa(n), os.O_RDWR|unix.O_NOCTTY, 0)
		}
	}
	if err != nil {
		t.Fatal(err)
	}
	path := create(t)
	shown := make(chan string)
	go func() {
		b, _ := io.ReadAll(master) // ends with an error when the other end is closed
		shown <- string(b)
	}()
	err = errors.Join(withStderr(t, slave, "sha", path), withStderr(t, slave, "sha", "-q", path), withStderr(t, slave, "sha", "--progress=false", path))
	if err := errors.Join(err, slave.Close()); err != nil {
		t.Error(err)
	}
	if out := <-shown; strings.Count(out, "100.00%") != 1 {
		t.Errorf("%q", out)
	}
	if err := master.Close(); err != nil {
		t.Error(err)
	}
}
