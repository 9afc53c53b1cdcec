package interop_test

import (
	"crypto/tls"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/qcow-csi/qcow-csi/nbdexport"
	"github.com/qcow-csi/qcow-csi/nbdexport/nbdtest"
	"github.com/qcow-csi/qcow-csi/qcow"
	"github.com/qcow-csi/qcow-csi/test/require"
)

// TestNBDOverTLS has clients with the right certificates, and with those of somebody else.
func TestNBDOverTLS(t *testing.T) {
	require.Tool(t, "nbdinfo", "nbdcopy", "qemu-img")
	const size = 4 << 20
	authority, other := nbdtest.NewAuthority(t), nbdtest.NewAuthority(t)
	right, wrong := t.TempDir(), t.TempDir()
	authority.WriteFiles(right)
	other.WriteFiles(wrong)
	in, content := sparseFile(t, size)
	secure := func(c *nbdexport.Config) {
		c.TLS = &tls.Config{Certificates: []tls.Certificate{authority.Server}, ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: authority.Pool}
	}
	for _, network := range []string{"unix", "tcp"} {
		t.Run(network, func(t *testing.T) {
			path, out := imagePath(t), filepath.Join(t.TempDir(), "out")
			create(t, path, qcow.CreateOptions{Size: size})
			s := export(t, network, path, nbdexport.ImageOptions{}, secure)
			with := func(dir string) string {
				return s.uri("tls-certificates="+url.QueryEscape(dir), "tls-hostname=localhost")
			}
			if got := run(t, "nbdinfo", with(right)); !strings.Contains(got, "TLS") || !strings.Contains(got, "base:allocation") {
				t.Errorf("nbdinfo: %s", got)
			}
			run(t, "nbdcopy", "--flush", in, with(right))
			run(t, "nbdcopy", with(right), out)
			got, err := os.ReadFile(out)
			if err != nil {
				t.Fatal(err)
			}
			content.mustEqual(t, got)
			if got, ok := try(t, "nbdinfo", with(wrong)); ok {
				t.Errorf("nbdinfo with the certificates of somebody else: %s", got)
			}
			s.scheme = "nbd"
			if got, ok := try(t, "nbdinfo", s.uri()); ok {
				t.Errorf("nbdinfo without TLS: %s", got)
			}
			if got, ok := try(t, "nbdinfo", "--list", s.uri()); ok {
				t.Errorf("nbdinfo --list without TLS: %s", got)
			}

			address := "server.type=unix,server.path=" + s.addr.String()
			if network == "tcp" {
				address = "server.type=inet,server.host=127.0.0.1,server.port=" + s.port()
			}
			image := "driver=nbd,export=disk,tls-creds=t0,tls-hostname=localhost," + address
			creds := func(dir string) string { return "tls-creds-x509,id=t0,endpoint=client,dir=" + dir }
			raw := "driver=raw,file.filename=" + in
			run(t, "qemu-img", "compare", "--object", creds(right), "--image-opts", raw, image)
			if got, ok := try(t, "qemu-img", "info", "--object", creds(wrong), "--image-opts", image); ok {
				t.Errorf("qemu-img with the certificates of somebody else: %s", got)
			}
			if got, ok := try(t, "qemu-img", "info", "-f", "raw", s.uri()); ok {
				t.Errorf("qemu-img without TLS: %s", got)
			}
		})
	}
}
