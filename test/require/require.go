// Package require skips tests that this machine cannot run, and makes such skips visible: with QCOW_CSI_REQUIRE=all in
// the environment, as continuous integration sets it, a test that would skip fails instead.
package require

import (
	"os"
	"os/exec"
	"testing"
)

// Feature skips the test, saying why, unless ok.
func Feature(t testing.TB, ok bool, why string) {
	t.Helper()
	if ok {
		return
	}
	if os.Getenv("QCOW_CSI_REQUIRE") == "all" {
		t.Fatalf("cannot run here, but QCOW_CSI_REQUIRE=all: %s", why)
	}
	t.Skipf("cannot run here: %s", why)
}

// Root skips the test unless it runs as root.
func Root(t testing.TB) {
	t.Helper()
	Feature(t, os.Geteuid() == 0, "needs root")
}

// Tool skips the test unless every named program is on the PATH.
func Tool(t testing.TB, names ...string) {
	t.Helper()
	for _, name := range names {
		_, err := exec.LookPath(name)
		Feature(t, err == nil, "needs the program "+name)
	}
}
