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

// In the environment, playVariable makes a test binary play a process that is killed, in one of two ways, and
// ownerVariable says for whom.
const (
	ownerVariable = "ATTACHTEST_OWNER"
	playVariable  = "ATTACHTEST_PLAY"
	playServe     = "serve"  // until it is killed
	playDetach    = "detach" // with a backend that never ends a flush
)

// Main runs the tests of a package whose attacher has devices: os.Exit(attachtest.Main(m, subject.New)). In some of the
// suite's tests the same binary plays a process that is killed.
func Main(m *testing.M, newAttacher func(owner string) attach.Attacher) int {
	part := os.Getenv(playVariable)
	if part == "" {
		return m.Run()
	}
	if err := play(newAttacher(owner), part); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

// play attaches a volume, says which device that is, and plays its part until it is killed, or its standard input ends.
func play(a attach.Attacher, part string) error {
	b := NewBackend(nil, deviceSize)
	d, err := a.Attach(context.Background(), attach.Request{VolumeID: "v", Backend: b})
	if err != nil {
		return err
	}
	fmt.Println(d.Path)
	if part == playDetach {
		b.Fail(func(op Op, _ int64) error {
			if op == Flush {
				fmt.Println("flushing")
				select {}
			}
			return nil
		})
		go func() {
			if err := a.Detach(context.Background(), "v"); err != nil {
				fmt.Fprintln(os.Stderr, err)
			}
		}()
	}
	_, err = io.Copy(io.Discard, os.Stdin)
	return err
}

// process is another one, which has attached volume v of this owner.
type process struct {
	*rig
	path   string // of the device
	cmd    *exec.Cmd
	stdin  io.Closer
	stdout *bufio.Reader
}

func (r *rig) startProcess(part string) *process {
	r.Helper()
	binary, err := os.Executable()
	if err != nil {
		r.Fatal(err)
	}
	cmd := exec.CommandContext(r.Context(), binary)
	cmd.Env = append(os.Environ(), playVariable+"="+part, ownerVariable+"="+owner)
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
	p := &process{rig: r, cmd: cmd, stdin: stdin, stdout: bufio.NewReader(stdout)}
	p.path = p.line()
	return p
}

// line returns the next line that the process prints.
func (p *process) line() string {
	p.Helper()
	line, err := p.stdout.ReadString('\n')
	if err != nil {
		p.Errorf("the process says no more: %v", err)
	}
	return strings.TrimSuffix(line, "\n")
}

// kill kills the process, and returns when it is dead.
func (p *process) kill() {
	p.Helper()
	if err := p.cmd.Process.Kill(); err != nil {
		p.Error(err)
	}
	_ = p.cmd.Wait() // it was killed, and says so
	_ = p.stdin.Close()
}

// takeOver detaches what the process has left, and attaches the volume anew.
func (p *process) takeOver() {
	p.Helper()
	if got := p.list(p.Context(), p.a)["v"]; got.Path != p.path || got.Served || got.Size != deviceSize {
		p.Errorf("listed %+v, want %s, not served", got, p.path)
	}
	if err := p.a.Detach(p.Context(), "v"); err != nil {
		p.Errorf("detach: %v", err)
	}
	b := NewBackend(p, deviceSize)
	p.attach("v", b)
	p.detach("v", b)
}

func killedProcess(r *rig) {
	p := r.startProcess(playServe)
	fd := r.open(p.path, unix.O_RDWR|unix.O_DIRECT)
	data := r.direct(4096)
	r.pwrite(fd, data, 4096)
	r.same(r.pread(fd, 4096, 4096), data, "the device")
	r.close(fd)
	if got := r.list(r.Context(), r.a)["v"]; got.Path != p.path || got.Served {
		r.Errorf("listed %+v, want %s, served by another process", got, p.path)
	}
	p.kill()
	p.takeOver()
}

// killedMidway: a process that is killed while its device is being flushed dies at once, although nobody ends the flush.
func killedMidway(r *rig) {
	p := r.startProcess(playDetach)
	if got := p.line(); got != "flushing" {
		r.Errorf("the process says %q", got)
	}
	p.kill()
	p.takeOver()
}
