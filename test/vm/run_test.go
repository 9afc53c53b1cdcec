package vm

import (
	"strings"
	"testing"
	"time"

	"github.com/qcow-csi/qcow-csi/test/require"
)

// TestRun looks at what Run makes of guests that go wrong.
func TestRun(t *testing.T) {
	t.Parallel()
	require.Tool(t, kernel, "go")
	for name, test := range map[string]struct {
		guest Guest
		want  string // a part of the error
	}{
		"the host is safe":  {Guest{Args: []string{"-test.run=TestHostIsSafe"}, Disk: 64 << 20}, ""},
		"a test fails":      {Guest{Args: []string{"-test.run=TestFails"}}, "the tests failed: exit status 1"},
		"a test hangs":      {Guest{Args: []string{"-test.run=TestHangs"}, Timeout: 10 * time.Second}, "the tests failed: signal: killed"},
		"there are no such": {Guest{Args: []string{"-test.run=TestNothing"}}, "there was no such test"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			test.guest.Package = "test/vm/guest"
			test.guest.Memory = 256
			console, err := run(t, test.guest)
			got := ""
			if err != nil {
				got = err.Error()
			}
			if (got == "") != (test.want == "") || !strings.Contains(got, test.want) {
				t.Errorf("error %q, want %q; the guest printed:\n%s", got, test.want, console)
			}
		})
	}
}
