package nbdexport_test

import (
	"errors"
	"testing"

	"github.com/qcow-csi/qcow-csi/nbdexport"
	"github.com/qcow-csi/qcow-csi/nbdexport/nbdtest"
)

// mib is the size of most exports here.
const mib = 1 << 20

func newServer(t testing.TB, config nbdexport.Config) *nbdexport.Server {
	t.Helper()
	server, err := nbdexport.NewServer(config)
	if err != nil {
		t.Fatal(err)
	}
	return server
}

// connect returns a client in the transmission phase with a backend.
func connect(t testing.TB, b nbdexport.Backend) *nbdtest.Client {
	t.Helper()
	return connectIn(t, nbdtest.Simple, b)
}

// connectIn is connect with a style, and with metadata contexts.
func connectIn(t testing.TB, s nbdtest.Style, b nbdexport.Backend, contexts ...string) *nbdtest.Client {
	t.Helper()
	client := nbdtest.Dial(t, nbdtest.Serve(t, "unix", offer(b)))
	client.GoIn(s, "", contexts...)
	return client
}

// connectRoughly is connectIn for a backend that can't be flushed when its server ends.
func connectRoughly(t *testing.T, s nbdtest.Style, b nbdexport.Backend) *nbdtest.Client {
	t.Helper()
	r := run(t, "unix", offer(b))
	t.Cleanup(func() {
		if err := errors.Join(r.Close(), <-r.served); err != nil {
			t.Error(err)
		}
	})
	client := nbdtest.Dial(t, r.addr)
	client.GoIn(s, "")
	return client
}

// forEachStyle runs a test in each of the styles.
func forEachStyle(t *testing.T, test func(*testing.T, nbdtest.Style)) {
	t.Helper()
	for _, s := range nbdtest.Styles {
		t.Run(s.String(), func(t *testing.T) { test(t, s) })
	}
}

func offer(b nbdexport.Backend) nbdexport.Config {
	return nbdexport.Config{Exports: []nbdexport.Export{{Backend: b}}}
}

func newMemory(size int64) *nbdtest.Memory { return nbdtest.NewMemory(nbdexport.Info{Size: size}) }
