package interop_test

import (
	"errors"
	"net"
	"net/url"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/qcow-csi/qcow-csi/nbdexport"
	"github.com/qcow-csi/qcow-csi/nbdexport/nbdtest"
	"github.com/qcow-csi/qcow-csi/qcow"
	"github.com/qcow-csi/qcow-csi/qcow/storage"
)

// The tests in the files nbd_* serve images by nbdexport, in this process, to the clients of others.

// served is an image that is exported as "disk".
type served struct {
	addr   net.Addr
	image  *qcow.Image
	scheme string // "nbds" with TLS
}

// export serves the image at path at a socket of the network until the end of the test, which then wants it to be clean.
func export(t *testing.T, network, path string, o nbdexport.ImageOptions, configure ...func(*nbdexport.Config)) *served {
	t.Helper()
	f, err := storage.Open(path, storage.ReadWrite)
	if err != nil {
		t.Fatal(err)
	}
	img, err := qcow.Open(f, qcow.Options{Gate: qcow.Beside(path)})
	if err != nil {
		t.Fatal(errors.Join(err, f.Close()))
	}
	o.Failed = func(operation string, off, n int64, err error) {
		t.Errorf("%s of %d bytes at %d: %v", operation, n, off, err)
	}
	config := nbdexport.Config{Exports: []nbdexport.Export{{Name: "disk", Description: "a disk", Backend: nbdexport.NewImageBackend(img, o)}}}
	for _, c := range configure {
		c(&config)
	}
	t.Cleanup(func() {
		if err := img.Close(); err != nil {
			t.Error(err)
		}
		out, err := exec.Command("qemu-img", "check", "-f", "qcow2", path).CombinedOutput()
		if err != nil {
			t.Errorf("qemu-img check: %v\n%s", err, out)
		}
	})
	s := &served{addr: nbdtest.Serve(t, network, config), image: img, scheme: "nbd"}
	if config.TLS != nil {
		s.scheme = "nbds"
	}
	return s
}

// uri returns the address of the export, with further parameters in the form "name=value".
func (s *served) uri(parameters ...string) string {
	if s.addr.Network() == "unix" {
		parameters = append([]string{"socket=" + url.QueryEscape(s.addr.String())}, parameters...)
		return s.scheme + "+unix:///disk?" + strings.Join(parameters, "&")
	}
	uri := s.scheme + "://" + s.addr.String() + "/disk"
	if len(parameters) > 0 {
		uri += "?" + strings.Join(parameters, "&")
	}
	return uri
}

// port is that of a server on TCP.
func (s *served) port() string {
	_, port, _ := net.SplitHostPort(s.addr.String()) // it is a listener's
	return port
}

// eventually waits until ok says yes.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !ok(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("waited in vain for %s", what)
		}
	}
}

// running starts a program in the background, which is ended with the test.
func running(t *testing.T, name string, args ...string) {
	t.Helper()
	cmd := exec.Command(name, args...)
	var out strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() {
		_ = cmd.Wait() // it is told to end
		close(ended)
	}()
	t.Cleanup(func() {
		_ = cmd.Process.Signal(os.Interrupt)
		select {
		case <-ended:
		case <-time.After(10 * time.Second):
			_ = cmd.Process.Kill()
			<-ended
		}
		if t.Failed() {
			t.Logf("%s: %s", name, out.String())
		}
	})
}
