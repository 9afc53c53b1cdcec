package nbdtester_test

import (
	"context"
	"crypto/tls"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/qcow-csi/qcow-csi/nbdexport"
	"github.com/qcow-csi/qcow-csi/nbdexport/nbdtest"
	"github.com/qcow-csi/qcow-csi/qcow"
	"github.com/qcow-csi/qcow-csi/qcow/storage"
)

// serve serves a fresh image of the size at a socket of the network until the end of the test.
func serve(t *testing.T, network string, size int64, readOnly bool, secure *tls.Config) net.Addr {
	t.Helper()
	f, err := storage.Create(filepath.Join(t.TempDir(), "disk.qcow2"))
	if err != nil {
		t.Fatal(err)
	}
	if err := qcow.Create(f, qcow.CreateOptions{Size: size}); err != nil {
		t.Fatal(err)
	}
	img, err := qcow.Open(f, qcow.Options{ReadOnly: readOnly})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := img.Close(); err != nil {
			t.Error(err)
		}
	})
	return nbdtest.Serve(t, network, nbdexport.Config{
		Exports: []nbdexport.Export{{Name: "export", Backend: nbdexport.NewImageBackend(img, nbdexport.ImageOptions{})}},
		TLS:     secure,
	})
}

func TestNBDTesterClient(t *testing.T) {
	if os.Getenv("QCOW_CSI_LONG") == "" {
		t.Skip("fetches and builds another project's program: only with QCOW_CSI_LONG=1 (make crash-long)")
	}
	client := buildTester(t)
	authority := nbdtest.NewAuthority(t)
	certificates := t.TempDir()
	authority.WriteFiles(certificates)
	secure := &tls.Config{Certificates: []tls.Certificate{authority.Server}, ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: authority.Pool}
	withTLS := []string{
		"-C", filepath.Join(certificates, "client-cert.pem"), "-K", filepath.Join(certificates, "client-key.pem"),
		"-A", filepath.Join(certificates, "ca-cert.pem"), "-H", "localhost",
	}
	selfSigned := []string{
		"-C", filepath.Join(client.source, "tests/run/certs/selfsigned-cert.pem"), "-K", filepath.Join(client.source, "tests/run/certs/selfsigned-key.pem"), "-F",
	}
	transactions := func(name string) []string {
		return []string{"-i", "-t", filepath.Join(client.source, "tests/run", name)}
	}
	const small, large = 4 << 20, 50 << 20
	// These requests are longer than 32 MiB, which is what the server takes, says so, and need not exceed.
	const tooLong = "Server errored a transaction"
	for name, test := range map[string]struct { // the names are those of simple_test
		size     int64
		readOnly bool
		secure   *tls.Config
		args     []string
		says     string // it fails, and says why
	}{
		"cfg1":          {size: small},
		"cfgsize":       {size: small, args: []string{"-o"}},
		"write":         {size: small, args: []string{"-w"}},
		"flush":         {size: small, args: []string{"-w", "-f"}},
		"rowrite":       {size: small, readOnly: true, args: []string{"-w", "-F"}},
		"handshake":     {size: small, args: []string{"-h"}},
		"integrity":     {size: large, args: transactions("integrity-test.tr")},
		"integrityhuge": {size: large, args: transactions("integrityhuge-test.tr"), says: tooLong},
		"tls":           {size: large, secure: secure, args: append(transactions("integrity-test.tr"), withTLS...)},
		"tlshuge":       {size: large, secure: secure, args: append(transactions("integrityhuge-test.tr"), withTLS...), says: tooLong},
		"tlswrongcert":  {size: large, secure: secure, args: selfSigned},
	} {
		for _, network := range []string{"tcp", "unix"} {
			t.Run(name+"/"+network, func(t *testing.T) {
				addr := serve(t, network, test.size, test.readOnly, test.secure)
				args := append([]string{"-N", "export"}, test.args...)
				if network == "unix" {
					args = append(args, "-u", addr.String())
				} else {
					host, port, err := net.SplitHostPort(addr.String())
					if err != nil {
						t.Fatal(err)
					}
					args = append(args, host, port)
				}
				ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
				defer cancel()
				out, err := exec.CommandContext(ctx, client.program, args...).CombinedOutput()
				if (err != nil) != (test.says != "") || !strings.Contains(string(out), test.says) {
					t.Errorf("nbd-tester-client %q: %v\n%s", args, err, out)
				}
			})
		}
	}
}
