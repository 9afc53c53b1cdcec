package main

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"io"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/qcow-csi/qcow-csi/nbdexport/nbdtest"
	"github.com/qcow-csi/qcow-csi/test/require"
)

// authority issues certificates.
type authority struct {
	certificate *x509.Certificate
	key         *ecdsa.PrivateKey
	issued      int64 // the last serial number
}

func newAuthority(t *testing.T, name string) *authority {
	t.Helper()
	a := &authority{}
	template := a.template(name)
	template.IsCA, template.BasicConstraintsValid, template.KeyUsage = true, true, x509.KeyUsageCertSign|x509.KeyUsageCRLSign
	var der []byte
	a.key, der = sign(t, template, nil)
	var err error
	if a.certificate, err = x509.ParseCertificate(der); err != nil {
		t.Fatal(err)
	}
	return a
}

func (a *authority) template(name string) *x509.Certificate {
	a.issued++
	return &x509.Certificate{
		SerialNumber: big.NewInt(a.issued), Subject: pkix.Name{CommonName: name}, SubjectKeyId: []byte(name),
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
	}
}

// sign returns a new key and its certificate, from the authority or, without one, from itself.
func sign(t *testing.T, template *x509.Certificate, by *authority) (*ecdsa.PrivateKey, []byte) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	parent, parentKey := template, key
	if by != nil {
		parent, parentKey = by.certificate, by.key
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, key.Public(), parentKey)
	if err != nil {
		t.Fatal(err)
	}
	return key, der
}

// issue writes a certificate and its key into a folder, as role-cert.pem and role-key.pem.
func (a *authority) issue(t *testing.T, dir, role string) (serial int64) {
	t.Helper()
	template := a.template(role)
	template.KeyUsage, template.ExtKeyUsage = x509.KeyUsageDigitalSignature, []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
	if role == "client" {
		template.ExtKeyUsage[0] = x509.ExtKeyUsageClientAuth
	}
	template.DNSNames, template.IPAddresses = []string{"localhost"}, []net.IP{net.IPv4(127, 0, 0, 1), net.IPv6loopback}
	key, der := sign(t, template, a)
	pkcs8, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	writePEM(t, dir, role+"-key.pem", "PRIVATE KEY", pkcs8)
	writePEM(t, dir, role+"-cert.pem", "CERTIFICATE", der)
	return a.issued
}

// revoke writes a list of certificates that were taken back into a folder.
func (a *authority) revoke(t *testing.T, dir string, until time.Time, serials ...int64) {
	t.Helper()
	list := &x509.RevocationList{Number: big.NewInt(1), ThisUpdate: time.Now().Add(-time.Hour), NextUpdate: until}
	for _, n := range serials {
		list.RevokedCertificateEntries = append(list.RevokedCertificateEntries,
			x509.RevocationListEntry{SerialNumber: big.NewInt(n), RevocationTime: time.Now()})
	}
	der, err := x509.CreateRevocationList(rand.Reader, list, a.certificate, a.key)
	if err != nil {
		t.Fatal(err)
	}
	writePEM(t, dir, "ca-crl.pem", "X509 CRL", der)
}

// writePEM puts a file in its place at once, as those do who know that somebody reads it.
func writePEM(t *testing.T, dir, name, kind string, der []byte) {
	t.Helper()
	hidden := write(t, filepath.Join(dir, "."+name), string(pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der})))
	if err := os.Rename(hidden, filepath.Join(dir, name)); err != nil {
		t.Fatal(err)
	}
}

// pki makes a folder with what a server and a client need.
func pki(t *testing.T) (dir string, a *authority) {
	t.Helper()
	dir, a = t.TempDir(), newAuthority(t, "authority")
	writePEM(t, dir, "ca-cert.pem", "CERTIFICATE", a.certificate.Raw)
	a.issue(t, dir, "server")
	a.issue(t, dir, "client")
	return dir, a
}

// clientTLS returns what a client with the certificates of a folder needs.
func clientTLS(t *testing.T, dir string) *tls.Config {
	t.Helper()
	authorities := x509.NewCertPool()
	authorities.AppendCertsFromPEM(read(t, filepath.Join(dir, "ca-cert.pem")))
	own, err := tls.LoadX509KeyPair(filepath.Join(dir, "client-cert.pem"), filepath.Join(dir, "client-key.pem"))
	if err != nil {
		t.Fatal(err)
	}
	return &tls.Config{ServerName: "localhost", RootCAs: authorities, Certificates: []tls.Certificate{own}}
}

// secured connects and initiates TLS. The error is what TLS says.
func secured(t *testing.T, socket string, config *tls.Config) (*nbdtest.Client, *tls.Conn, error) {
	t.Helper()
	plain := nbdtest.Dial(t, unixAddr(socket))
	plain.Greet(3)
	plain.SendOption(nbdtest.OptStartTLS)
	if replies := plain.ReceiveOptionReplies(nbdtest.OptStartTLS); replies[0].Type != nbdtest.RepAck {
		t.Fatalf("no TLS: %+v", replies)
	}
	conn := tls.Client(plain.Conn, config)
	if err := conn.Handshake(); err != nil {
		return nil, nil, err
	}
	// With version 1.3 what the server says of the client's certificate arrives in the place of its first answer.
	if _, err := conn.Write(nbdtest.Message(uint64(nbdtest.OptionMagic), uint32(nbdtest.OptList), uint32(0))); err != nil {
		return nil, nil, err
	}
	if _, err := io.ReadFull(conn, make([]byte, 20+4+20)); err != nil { // an export without a name, and the end of the list
		return nil, nil, err
	}
	return nbdtest.NewClient(t, conn), conn, nil
}

// mustSecure is secured up to the transmission phase.
func mustSecure(t *testing.T, socket string, config *tls.Config) (*nbdtest.Client, *tls.Conn) {
	t.Helper()
	client, conn, err := secured(t, socket, config)
	if err != nil {
		t.Fatal(err)
	}
	if x, reply := client.Info(nbdtest.OptGo, ""); reply != nbdtest.RepAck || x.Size != 10<<20 {
		t.Fatalf("reply %#x, size %d", reply, x.Size)
	}
	return client, conn
}

func TestExportTLS(t *testing.T) {
	image, socket := create(t), filepath.Join(t.TempDir(), "nbd.sock")
	dir, _ := pki(t)
	e := mustExport(t, image, "--socket", socket, "--tls-certificates", dir, "-t")
	if want := "nbds+unix:///?socket=" + socket; e.uri != want {
		t.Errorf("URI %s, want %s", e.uri, want)
	}
	client, conn := mustSecure(t, socket, clientTLS(t, dir))
	if v := conn.ConnectionState().Version; v < tls.VersionTLS12 {
		t.Errorf("version %#x", v)
	}
	put(t, client, 12345, "in secret")
	wantBytes(t, client, 12345, "in secret")
	client.Disconnect()

	plain := nbdtest.Dial(t, unixAddr(socket))
	plain.Greet(3)
	if _, reply := plain.Info(nbdtest.OptGo, ""); reply != 1<<31|5 { // NBD_REP_ERR_TLS_REQD
		t.Errorf("without TLS: reply %#x", reply)
	}
	stranger := clientTLS(t, dir)
	stranger.Certificates = nil
	if _, _, err := secured(t, socket, stranger); err == nil {
		t.Error("served a client without a certificate")
	}
	otherDir, _ := pki(t)
	other := clientTLS(t, otherDir)
	other.RootCAs = stranger.RootCAs
	if _, _, err := secured(t, socket, other); err == nil {
		t.Error("served a client with a certificate from another authority")
	}
	old := clientTLS(t, dir)
	old.MaxVersion = tls.VersionTLS11
	if _, _, err := secured(t, socket, old); err == nil {
		t.Error("served a client with TLS 1.1")
	}
	e.signal()
	e.wantEnd(t)
	mustImage(t, "check", image)
}

func TestExportTLSOptional(t *testing.T) {
	image, socket := create(t), filepath.Join(t.TempDir(), "nbd.sock")
	dir, _ := pki(t)
	if err := os.Remove(filepath.Join(dir, "ca-cert.pem")); err != nil {
		t.Fatal(err)
	}
	e := mustExport(t, image, "--socket", socket, "--tls-certificates", dir, "--tls=on", "--tls-verify-peer=false", "-t")
	plain := nbdtest.Dial(t, unixAddr(socket))
	plain.Go("")
	plain.Disconnect()
	client, _ := mustSecure(t, socket, &tls.Config{InsecureSkipVerify: true})
	client.Disconnect()
	e.signal()
	e.wantEnd(t)
}

// TestExportTLSReload gives the server other certificates: who connects then gets them.
func TestExportTLSReload(t *testing.T) {
	said := captureLog(t)
	image, socket := create(t), filepath.Join(t.TempDir(), "nbd.sock")
	dir, first := pki(t)
	e := mustExport(t, image, "--socket", socket, "--tls-certificates", dir, "-t")
	serial := func() int64 {
		t.Helper()
		client, conn := mustSecure(t, socket, clientTLS(t, dir))
		client.Disconnect()
		return conn.ConnectionState().PeerCertificates[0].SerialNumber.Int64()
	}
	before, _ := mustSecure(t, socket, clientTLS(t, dir))
	was := serial()
	renewed := first.issue(t, dir, "server")
	if got := serial(); got != renewed || got == was {
		t.Errorf("the server shows certificate %d, want %d", got, renewed)
	}
	put(t, before, 0, "still there")
	before.Disconnect()

	// A key that does not fit, as between the renewals of two files.
	good := read(t, filepath.Join(dir, "server-key.pem"))
	stray := t.TempDir()
	first.issue(t, stray, "server")
	write(t, filepath.Join(dir, "server-key.pem"), string(read(t, filepath.Join(stray, "server-key.pem"))))
	if got := serial(); got != renewed {
		t.Errorf("with a bad key the server shows certificate %d, want %d", got, renewed)
	}
	if !strings.Contains(said(), "old ones hold on") {
		t.Errorf("it says %s", said())
	}
	write(t, filepath.Join(dir, "server-key.pem"), string(good))

	// A certificate is taken back; then the list is too old.
	bad := first.issue(t, dir, "client")
	serial()
	first.revoke(t, dir, time.Now().Add(time.Hour), bad)
	if _, _, err := secured(t, socket, clientTLS(t, dir)); err == nil {
		t.Error("served a client whose certificate was taken back")
	}
	first.issue(t, dir, "client")
	serial()
	first.revoke(t, dir, time.Now().Add(-time.Minute))
	if _, _, err := secured(t, socket, clientTLS(t, dir)); err == nil {
		t.Error("served a client although the list is out of date")
	}

	// Another authority: the clients of the first one are strangers.
	old := clientTLS(t, dir)
	if err := os.Remove(filepath.Join(dir, "ca-crl.pem")); err != nil {
		t.Fatal(err)
	}
	second := newAuthority(t, "second")
	writePEM(t, dir, "ca-cert.pem", "CERTIFICATE", second.certificate.Raw)
	if _, _, err := secured(t, socket, old); err == nil {
		t.Error("served a client of the former authority")
	}
	second.issue(t, dir, "server")
	second.issue(t, dir, "client")
	serial()
	e.signal()
	e.wantEnd(t)
}

func TestExportRefusesTLS(t *testing.T) {
	image := create(t)
	good, a := pki(t)
	without := func(names ...string) string {
		dir := t.TempDir()
		for _, name := range []string{"ca-cert.pem", "server-cert.pem", "server-key.pem"} {
			write(t, filepath.Join(dir, name), string(read(t, filepath.Join(good, name))))
		}
		for _, name := range names {
			if err := os.Remove(filepath.Join(dir, name)); err != nil {
				t.Fatal(err)
			}
		}
		return dir
	}
	empty, foreign := without(), without()
	write(t, filepath.Join(empty, "ca-cert.pem"), "nothing\n")
	newAuthority(t, "foreign").revoke(t, foreign, time.Now().Add(time.Hour))
	garbled := without()
	writePEM(t, garbled, "ca-cert.pem", "CERTIFICATE", a.certificate.Raw[1:])
	for _, c := range []struct {
		says string
		args []string
	}{
		{"need --tls-certificates", []string{"--tls", "on"}},
		{"need --tls-certificates", []string{"--tls-verify-peer"}},
		{"need --tls-certificates", []string{"--tls-certificates", ""}},
		{"must be one of on, required", []string{"--tls", "off", "--tls-certificates", good}},
		{"no such file", []string{"--tls-certificates", filepath.Join(good, "nothing")}},
		{"server-key.pem: no such file", []string{"--tls-certificates", without("server-key.pem")}},
		{"--tls-verify-peer=false serves any client", []string{"--tls-certificates", without("ca-cert.pem")}},
		{"there is no CERTIFICATE in it", []string{"--tls-certificates", empty}},
		{"ca-cert.pem: x509", []string{"--tls-certificates", garbled}},
		{"from none of the authorities", []string{"--tls-certificates", foreign}},
	} {
		_, err := startExport(t, image, append(c.args, "--socket", filepath.Join(t.TempDir(), "s"))...)
		if err == nil || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%q: %v, which does not say %q", c.args, err, c.says)
		}
	}
}

// TestExportTLSToOthers lets QEMU and libnbd in, by TCP.
func TestExportTLSToOthers(t *testing.T) {
	require.Tool(t, "qemu-io", "nbdinfo")
	image := create(t)
	dir, _ := pki(t)
	e := mustExport(t, image, "--port", "0", "--tls-certificates", dir, "-t")
	address, ok := strings.CutPrefix(strings.TrimSuffix(e.uri, "/"), "nbds://")
	host, port, err := net.SplitHostPort(address)
	if !ok || err != nil {
		t.Fatalf("URI %s", e.uri)
	}
	if got := nbdinfo(t, "--size", e.uri+"?tls-certificates="+dir); got != "10485760\n" {
		t.Errorf("nbdinfo says %q", got)
	}
	runQEMU(t, "qemu-io", "--object", "tls-creds-x509,id=t,endpoint=client,dir="+dir,
		"--image-opts", "driver=nbd,server.type=inet,server.host="+host+",server.port="+port+",tls-creds=t",
		"-c", "write -P 7 5M 100k", "-c", "read -P 7 5M 100k")
	e.signal()
	e.wantEnd(t)
	mustImage(t, "check", image)
}
