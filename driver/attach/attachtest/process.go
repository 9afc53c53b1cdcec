package attachtest

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/qcow-csi/qcow-csi/driver/attach"
)

// playVariable in the environment makes a test binary play the process that is killed.
const playVariable = "ATTACHTEST_PLAY"

// Main runs the tests of a package whose attacher has devices: os.Exit(attachtest.Main(m, subject.New)). In one of the suite's
// tests the same binary plays a process that is killed.
func Main(m *testing.M, newAttacher func(owner string) attach.Attacher) int {
	if os.Getenv(playVariable) == "" {
		return m.Run()
	}
	if err := play(newAttacher(owner)); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

// play attaches a volume, says which device that is, and serves it until standard input ends or it is killed.
func play(a attach.Attacher) error {
	d, err := a.Attach(context.Background(), attach.Request{VolumeID: "v", Backend: NewBackend(nil, deviceSize)})
	if err != nil {
		return err
	}
	fmt.Println(d.Path)
	_, err = io.Copy(io.Discard, os.Stdin)
	return err
}

func killedProcess(r *rig) {
	binary, err := os.Executable()
	if err != nil {
		r.Fatal(err)
	}
	cmd := exec.CommandContext(r.Context(), binary)
	cmd.Env = append(os.Environ(), playVariable+"=1")
	cmd.Stderr = os.Stderr
	stdin, err := cmd.StdinPipe()
	if err != nil {
		r.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		r.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		r.Fatal(err)
	}
	line, err := bufio.NewReader(stdout).ReadString('\n')
	if err != nil {
		r.Errorf("the process says nothing: %v", err)
	}
	path := strings.TrimSpace(line)
	if err == nil {
		fd := r.open(path, unix.O_RDWR|unix.O_DIRECT)
		p := r.direct(4096)
		r.pwrite(fd, p, 4096)
		r.same(r.pread(fd, 4096, 4096), p, "the device")
		r.close(fd)
		if got := r.list(r.Context(), r.a)["v"]; got.Path != path || got.Served {
			r.Errorf("listed %+v, want %s, served by another process", got, path)
		}
	}
	if err := cmd.Process.Kill(); err != nil {
		r.Error(err)
	}
	_ = cmd.Wait() // killed: it says so
	_ = stdin.Close()
	if got := r.list(r.Context(), r.a)["v"]; got.Path != path || got.Served || got.Size != deviceSize {
		r.Errorf("listed %+v, want %s, not served", got, path)
	}
	if err := r.a.Detach(r.Context(), "v"); err != nil {
		r.Errorf("detach: %v", err)
	}
	b := NewBackend(r, deviceSize)
	r.attach("v", b)
	r.detach("v", b)
}
