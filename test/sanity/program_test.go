package sanity

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
)

// program is a running qcow-csi.
type program struct {
	endpoint string
	end      func(signal syscall.Signal) // once; after SIGTERM its status has to be 0
}

// build builds qcow-csi and returns its path.
func build(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "qcow-csi")
	cmd := exec.CommandContext(t.Context(), "go", "build", "-o", path, "../../cmd/qcow-csi")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	return path
}

// start runs qcow-csi on a storage directory until the end of the test. It uses FUSE and loop devices, which most
// kernels have; the kernel's NBD client has its tests in a virtual machine.
func start(t *testing.T, path, storage string) *program {
	t.Helper()
	p := &program{endpoint: "unix://" + filepath.Join(t.TempDir(), "csi.sock")}
	cmd := exec.Command(path, "all", "--endpoint", p.endpoint, "--storage-dir", storage, "--run-dir", t.TempDir(), "--node-id", "node-1",
		"--driver-name", fmt.Sprintf("test-%d.qcow-csi.io", os.Getpid()), "--attacher", "fuse", "-v", "4")
	stderr, err := cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	serving, logged := make(chan bool, 1), make(chan string, 1)
	go func() { logged <- follow(stderr, serving) }()
	var once sync.Once
	p.end = func(signal syscall.Signal) {
		once.Do(func() {
			if err := cmd.Process.Signal(signal); err != nil {
				t.Error(err)
			}
			log := <-logged
			if err := cmd.Wait(); err != nil && signal == syscall.SIGTERM {
				t.Errorf("the program ended with %v", err)
			}
			if t.Failed() {
				t.Logf("log of the program:\n%s", log)
			}
		})
	}
	t.Cleanup(func() { p.end(syscall.SIGTERM) })
	if !<-serving {
		t.Fatal("the program does not serve")
	}
	return p
}

// follow reads a log to its end, and tells on serving whether and when it says so.
func follow(stderr io.Reader, serving chan<- bool) string {
	defer close(serving)
	var log strings.Builder
	lines := bufio.NewReader(stderr)
	for {
		line, err := lines.ReadString('\n')
		log.WriteString(line)
		if strings.Contains(line, `"serving"`) {
			serving <- true
		}
		if err != nil {
			return log.String()
		}
	}
}
